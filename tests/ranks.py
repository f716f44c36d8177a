"""What test_parallel.py runs in two processes: a table of scenarios, and what they measured.

    python ranks.py RANK STORE OUTPUT [NAME ...]

Both ranks run all scenarios in one process group (gloo). Each trains a model in DDP, or
sharded, and the same model alone on the batches of both ranks. Rank 0 writes the results.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import json
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

import memrewrite
from memrewrite import GaLore, MemrewriteWarning, VeLoRA
from memrewrite.methods.vectors import Vectors
from memrewrite.parallel.data_parallel import replica_of
from memrewrite.session.session import session_of

EVERY = 7
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "velora": {"velora": VeLoRA(8, sites="all")},
    "velora dense": {"velora": VeLoRA(8, sites="all", gradients="dense")},
    "galore": {"galore": GaLore(2, EVERY, sites="all")},
    "galore coordinates": {"galore": GaLore(2, EVERY, sites="all", gradients="coordinates")},
    "both": {
        "velora": VeLoRA(8, sites=["*down"]),
        "galore": GaLore(2, EVERY, sites="all", gradients="coordinates"),
    },
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16, bias=False)
        self.head = nn.Linear(16, 4)

    def body(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))


class Checkpointed(Net):
    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        y: Any = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return self.head(y)


class Modern(Checkpointed):
    reentrant = False


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(16, 16)


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        torch._dynamo.graph_break()
        return self.head(y)


class Tied(Net):
    """As GPT-2's: a table of embeddings that is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 16)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x + self.table((x[:, 0] > 0).long()))
        return y


class Bare(nn.Module):
    """Nothing is left to the reducer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


class Box:
    """An output in which nobody finds a tensor."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


class Boxed(Net):
    def forward(self, x: Tensor) -> Box:
        return Box(super().forward(x))


class Nested(nn.Module):
    """Blocks are compiled, and checkpointed outside of that: backwards inside of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(16, 16), nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Bare(), Net()])

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return self.out(x)


class BoxedNested(Nested):
    def forward(self, x: Tensor) -> Any:
        return Box(super().forward(x))


class Skipping(Net):
    def forward(self, x: Tensor, use: bool = True) -> Tensor:
        return self.head(self.body(x) if use else x)


class Shards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Net()])
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return kind()


def compiled(model: nn.Module, mode: str = "velora") -> nn.Module:
    return memrewrite.compile(model, backend="aot_eager", **MODES[mode])


def batch(step: int) -> Tensor:
    return torch.randn(16, 16, generator=torch.Generator().manual_seed(step))


def loss_of(y: Any) -> Tensor:
    loss: Tensor = (y.y if isinstance(y, Box) else y).square().mean()
    return loss


@dataclass(frozen=True)
class Loop:
    """A user's training loop; `rank` None is the single process that sees both halves."""

    steps: int = 4
    micro: int = 1
    clip: bool = False
    scale: bool = False
    uneven: bool = False
    set_to_none: bool = True

    def __call__(
        self, model: Any, rank: int | None, optimizer: Any = None, start: int = 0
    ) -> torch.optim.Optimizer:
        optimizer = optimizer or AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", 128.0, enabled=self.scale)
        for step in range(start, start + self.steps):
            for part in range(self.micro):
                last = rank is None or part == self.micro - 1
                with contextlib.nullcontext() if last else model.no_sync():
                    loss = self.loss(model, rank, step, batch(step * self.micro + part))
                    scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if self.clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=self.set_to_none)
        return optimizer

    def loss(self, model: Any, rank: int | None, step: int, x: Tensor) -> Tensor:
        half = 12 if self.uneven and step == 2 else 8
        if rank is not None:
            return loss_of(model((x[:half], x[half:])[rank]))
        y = model(x)
        y = y.y if isinstance(y, Box) else y
        return (loss_of(y[:half]) + loss_of(y[half:])) / 2


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    states = [t for state in optimizer.state.values() for t in state.values()]
    return sum(t.nbytes for t in states if isinstance(t, Tensor) and t.ndim)


def spread_over_ranks(optimizer: torch.optim.Optimizer) -> float:
    """The largest difference between two ranks' states."""
    states = [t for state in optimizer.state.values() for t in state.values()]
    worst = 0.0
    for tensor in (t.double() for t in states if isinstance(t, Tensor)):
        least, most = tensor.clone(), tensor.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        worst = max(worst, float((most - least).max()))
    return worst


def whole(model: nn.Module) -> list[Tensor]:
    found: list[Any] = list(model.parameters())
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in found]


def compared(
    ours: tuple[nn.Module, torch.optim.Optimizer], theirs: tuple[nn.Module, torch.optim.Optimizer]
) -> dict[str, Any]:
    """ours: in DDP or sharded; theirs: the single process."""
    with torch.no_grad():
        pairs = zip(whole(ours[0]), whole(theirs[0]), strict=True)
        result: dict[str, Any] = {"off": max(float((a - b).abs().max()) for a, b in pairs)}
    result |= {"bytes": state_bytes(ours[1]), "alone": state_bytes(theirs[1])}
    replica = replica_of(ours[0])
    if replica is not None:
        result |= vars(replica.averager.sent)
        result["ranks"] = spread_over_ranks(ours[1])
    return result


@functools.cache
def alone_on(kind: Callable[[], nn.Module], mode: str, loop: Loop) -> Any:
    """One process, on the batches of both ranks."""
    model = compiled(made(kind), mode)
    return model, loop(model, None)


@functools.cache
def blocks_alone(mode: str) -> Any:
    model: Any = made(Shards)
    compiled(model.blocks[0], mode)
    return model, Loop()(model, None)


def trained(
    rank: int,
    kind: Callable[[], nn.Module] = Net,
    mode: str = "velora",
    loop: Loop | None = None,
    order: str = "before",
    prepare: Callable[[Any], object] = lambda ddp: None,
    **ddp_options: Any,
) -> dict[str, Any]:
    loop = loop or Loop()
    theirs = alone_on(kind, mode, loop)
    model = made(kind)
    model = compiled(model, mode) if order == "before" else model
    ddp: Any = DDP(model, **ddp_options)
    prepare(ddp)
    if order != "before":
        compiled(ddp.module if order == "after" else ddp, mode)
    result = compared((ddp, loop(ddp, rank)), theirs)
    return result | {"graphs": len(session_of(ddp).graphs)}


# --- the scenarios ---------------------------------------------------------------------------

Scenario = Callable[[int], dict[str, Any]]
SCENARIOS: dict[str, Scenario] = {}


def _table() -> None:
    def add(name: str, **options: Any) -> None:
        SCENARIOS[name] = lambda rank: trained(rank, **options)

    for mode in MODES:
        add(f"mode {mode}", mode=mode, loop=Loop(steps=20))
    for order in ("after", "whole"):
        add(f"order {order}", order=order, mode="both", loop=Loop(steps=20))
    add("static_graph", static_graph=True)
    add("bucket views", gradient_as_bucket_view=True)
    add("bucket views, zeroed", gradient_as_bucket_view=True, loop=Loop(set_to_none=False))
    add("no_sync", loop=Loop(micro=3))
    add("unused", kind=Unused, find_unused_parameters=True, loop=Loop(micro=2))
    add("unused, static", kind=Unused, static_graph=True)
    add("uneven", loop=Loop(uneven=True), mode="both")
    add("clip and scaler", loop=Loop(clip=True, scale=True))
    add("graph break", kind=Broken)
    add("tied", kind=Tied)
    add("reentrant", kind=Checkpointed)
    add("reentrant, static", kind=Checkpointed, static_graph=True)
    add("checkpoint", kind=Modern)
    add("bare", kind=Bare)
    add("bare, static", kind=Bare, static_graph=True)
    add("boxed", kind=Boxed)
    hook = default_hooks.allreduce_hook
    add("known hook", prepare=lambda ddp: ddp.register_comm_hook(None, hook))
    sharded = {"shard, blocks": "sb", "blocks, shard": "bs", "shard, whole": "sw"}
    for name, order in {**sharded, "whole, shard": "ws"}.items():
        SCENARIOS[f"fsdp {name}"] = _sharded(order)
    SCENARIOS["fsdp exact"] = _sharded("sb", "exact")
    for name, order in {"shard, blocks": "sb", "blocks, shard": "bs"}.items():
        SCENARIOS[f"galore {name}"] = _sharded(order, "galore")


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__.replace("_", " ")] = function
    return function


@scenario
def split(rank: int) -> dict[str, Any]:
    """DDPOptimizer cuts the graph where buckets end; shapes become dynamic on the way."""
    known = dist._DEFAULT_FIRST_BUCKET_BYTES
    dist._DEFAULT_FIRST_BUCKET_BYTES = 64  # type: ignore[misc]
    try:
        return trained(rank, mode="both", loop=Loop(uneven=True), bucket_cap_mb=0.0005)
    finally:
        dist._DEFAULT_FIRST_BUCKET_BYTES = known  # type: ignore[misc]


@scenario
def each_block(rank: int) -> dict[str, Any]:
    theirs = blocks_alone("velora")
    model: Any = made(Shards)
    compiled(model.blocks[0])
    ddp = DDP(model)
    return compared((ddp, Loop()(ddp, rank)), theirs)


@scenario
def two_in_one_loss(rank: int) -> dict[str, Any]:
    """Parts of a compiled model are in a DDP each."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Bare(), Net()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x))
            return y

    alone = compiled(made(Pair))
    theirs = alone, Loop()(alone, None)
    model: Any = made(Pair)
    model.first, model.second = DDP(model.first), DDP(model.second)
    compiled(model)
    result = compared((model, Loop()(model, rank)), theirs)
    sent = [replica_of(part).averager.sent.small for part in (model.first, model.second)]  # type: ignore[union-attr]
    return result | {"sent": sent}


@scenario
def rebuilt(rank: int) -> dict[str, Any]:
    """One DDP is dropped, and another takes the model."""
    theirs = alone_on(Net, "velora", Loop(steps=6))
    model = compiled(made(Net))
    ddp = DDP(model)
    optimizer = Loop(steps=3)(ddp, rank)
    dropped = weakref.ref(ddp)
    del ddp
    gc.collect()
    hooks = sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
    ddp = DDP(model)
    Loop(steps=3)(ddp, rank, optimizer, 3)
    result = compared((ddp, optimizer), theirs)
    return result | {"alive": dropped() is not None, "hooks": hooks}


@scenario
def loaded(rank: int) -> dict[str, Any]:
    """A checkpoint of a run under DDP goes on in a new one."""
    theirs = alone_on(Net, "velora", Loop(steps=6))
    ddp = DDP(compiled(made(Net)))
    optimizer = Loop(steps=3)(ddp, rank)
    weights, state = copy.deepcopy(ddp.state_dict()), copy.deepcopy(optimizer.state_dict())
    ours = memrewrite.state_dict(ddp)
    ddp = DDP(compiled(made(Net)))
    optimizer = AdamW(ddp.parameters(), lr=1e-3)
    ddp.load_state_dict(weights)
    optimizer.load_state_dict(state)
    memrewrite.load_state_dict(ddp, ours)
    Loop(steps=3)(ddp, rank, optimizer, 3)
    return compared((ddp, optimizer), theirs)


@scenario
def midway(rank: int) -> dict[str, Any]:
    """Compiled after some steps: gradients are views of the first reducer's buckets by then."""
    alone = made(Net)
    theirs = Loop(steps=2)(alone, None)
    compiled(alone)
    Loop(steps=2)(alone, None, theirs, 2)
    ddp = DDP(made(Net), gradient_as_bucket_view=True, static_graph=True)
    optimizer = Loop(steps=2, set_to_none=False)(ddp, rank)
    compiled(ddp)
    Loop(steps=2)(ddp, rank, optimizer, 2)
    return compared((ddp, optimizer), (alone, theirs))


@scenario
def used_on_one_rank(rank: int) -> dict[str, Any]:
    alone, model = compiled(made(Skipping)), compiled(made(Skipping))
    ddp = DDP(model, find_unused_parameters=True)
    theirs, ours = AdamW(alone.parameters(), lr=1e-3), AdamW(ddp.parameters(), lr=1e-3)
    for step in range(4):
        halves = batch(step).chunk(2)
        use = (True, step != 2)
        if step == 0:  # v is of both halves
            loss = loss_of(alone(batch(0)))
        else:
            loss = sum(loss_of(alone(x, u)) for x, u in zip(halves, use, strict=True)) / 2  # type: ignore[assignment]
        loss.backward()  # type: ignore[no-untyped-call]
        loss_of(ddp(halves[rank], use[rank])).backward()  # type: ignore[no-untyped-call]
        for optimizer in (theirs, ours):
            optimizer.step()
            optimizer.zero_grad()
    return compared((ddp, ours), (alone, theirs))


@scenario
def copied(rank: int) -> dict[str, Any]:
    """A deepcopy of a DDP is trained without us: nothing may be missing in its reducer."""
    ddp = DDP(compiled(made(Net)))
    Loop(steps=1)(ddp, rank)
    twin = copy.deepcopy(ddp)
    alone = copy.deepcopy(ddp.module)
    return compared((twin, Loop()(twin, rank)), (alone, Loop()(alone, None)))


def _strange(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations
    return default_hooks.allreduce_hook(state, bucket)


@scenario
def strange_hook(rank: int) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = trained(rank, prepare=lambda ddp: ddp.register_comm_hook(None, _strange))
    return result | {"said": _ours(caught)}


@scenario
def joined_from_the_start(rank: int) -> dict[str, Any]:
    ddp = DDP(compiled(made(Net)))
    optimizer = AdamW(ddp.parameters(), lr=1e-3)
    with warnings.catch_warnings(record=True) as caught, Join([ddp]):
        warnings.simplefilter("always")
        for step in range(2 + rank):
            loss_of(ddp(batch(step)[:8])).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    return {"said": _ours(caught), "bytes": state_bytes(optimizer)}


@scenario
def joined_later(rank: int) -> dict[str, Any]:
    ddp = DDP(compiled(made(Net)))
    Loop(steps=1)(ddp, rank)
    return _error_of(lambda: ddp(batch(0)[:8]), Join([ddp]))


@scenario
def boxed_and_reentrant(rank: int) -> dict[str, Any]:
    model: Any = made(BoxedNested)
    for block in model.blocks:
        compiled(block)
    ddp = DDP(model)
    return _error_of(lambda: Loop(steps=1)(ddp, rank))


@scenario
def nested_backward(rank: int) -> dict[str, Any]:
    alone, model = made(Nested), made(Nested)
    for one in (alone, model):
        for block in one.blocks:  # type: ignore[union-attr]
            compiled(block)
    theirs = alone, Loop()(alone, None)
    ddp = DDP(model)
    return compared((ddp, Loop()(ddp, rank)), theirs)


@scenario
def another_basis(rank: int) -> dict[str, Any]:
    """A checkpoint was loaded on one rank alone."""
    ddp = DDP(compiled(made(Net)))
    Loop(steps=1)(ddp, rank)
    if rank == 0:
        state = memrewrite.state_dict(ddp)
        memrewrite.load_state_dict(ddp, {n: v.flip(0) for n, v in state.items()})
    return _error_of(lambda: Loop(steps=1)(ddp, rank))


def _sharded(order: str, mode: str = "velora") -> Scenario:
    def run(rank: int) -> dict[str, Any]:
        theirs = blocks_alone(mode)
        model: Any = made(Shards)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            part = _shard_and_compile(model, order, mode)
            ours = model, Loop()(model, rank)
        session = session_of(part)
        rows = memrewrite.report(part).to_dict()["sites"]
        reasons = [row["reason"] for row in rows if row["decision"] == "compressed"]
        small = bool(session.returned(Vectors)) or None
        more = {"said": _ours(caught), "reasons": reasons, "small": small}
        return compared(ours, theirs) | more

    return run


def _shard_and_compile(model: Any, order: str, mode: str) -> Any:
    part = model if "w" in order else model.blocks[0]
    for what in order:
        if what == "s":
            fully_shard(model.blocks[0])
            fully_shard(model)
        else:
            compiled(part, mode)
    return part


def _error_of(run: Callable[[], object], context: Any = None) -> dict[str, Any]:
    try:
        with context or contextlib.nullcontext():
            run()
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"error": None}


def _ours(caught: Any) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, MemrewriteWarning)]


_table()


def main(rank: int, store: str, output: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = {name: SCENARIOS[name](rank) for name in names or SCENARIOS}
    dist.destroy_process_group()
    if rank == 0:
        Path(output).write_text(json.dumps(results, default=str))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
