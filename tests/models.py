"""Small models, and how a compiled one is held against the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memrewrite
from memrewrite import VeLoRA
from memrewrite.session.session import session_of
from memrewrite.sites.weights import candidates

Run = Callable[[nn.Module], Tensor]  # model -> loss


class Block(nn.Module):
    """Norm and a gated MLP, as in LLaMA."""

    def __init__(self, features: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.gate_proj = nn.Linear(features, hidden)
        self.up_proj = nn.Linear(features, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Stack(nn.Module):
    """A few blocks and a head."""

    def __init__(self, depth: int = 2, features: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(features, hidden) for _ in range(depth))
        self.head = nn.Linear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_of(x: Tensor) -> Run:
    return lambda model: model(x).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def relative_errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Per gradient |a - b| / |b|; a gradient that is zero by symmetry is held to the largest."""
    assert ours.keys() == theirs.keys()
    scale = max(g.norm().item() for g in theirs.values())
    return {
        n: (ours[n] - theirs[n]).norm().item() / max(theirs[n].norm().item(), 1e-6 * scale)
        for n in ours
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bit by bit: the same keys, of which there are some, and equal values."""
    assert ours.keys() == theirs.keys() != set()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def vectors_of(compiled: nn.Module) -> dict[str, Tensor]:
    """What a compiled model holds, by the names of the weights that read an input."""
    state = session_of(compiled).vectors
    return state.vectors if state is not None else {}


def vectors(compiled: nn.Module, eager: nn.Module) -> dict[int, Tensor]:
    """The v that each compressed weight of `compiled` reads, by id of its twin in `eager`."""
    session = session_of(compiled)
    held = vectors_of(compiled)
    by_name: dict[str, Tensor] = {}
    for binding in (b for g in session.graphs for b in g.bindings.values()):
        for position, leader in binding.variant.leader_of.items():
            by_name[binding.names[position]] = held[binding.names[leader]]
    return {id(c.parameter): by_name[c.name] for c in candidates(eager) if c.name in by_name}


def check_against_oracle(
    model: nn.Module,
    run: Run,
    velora: VeLoRA,
    tolerance: float,
    run_eager: Run | None = None,
    **kwargs: Any,
) -> memrewrite.Report:
    """Compressed weights follow the oracle, all others plain autograd; v is the paper's.

    `run_eager` writes out, for the oracle, what `run` does where the oracle cannot see it.
    """
    eager, plain = copy.deepcopy(model), copy.deepcopy(model)
    run_eager = run_eager or run
    memrewrite.compile(model, velora=velora, **kwargs)
    torch.manual_seed(1)
    run(model).backward()
    report = memrewrite.report(model)
    compressed = {r.name for r in report.sites if r.decision == "compressed"}
    assert compressed, report  # the plain gradients would agree with an oracle that does nothing
    of = vectors(model, eager)
    check_vectors(model, eager, run_eager, velora)
    torch.manual_seed(1)
    with oracle.velora(of, velora.scale):
        run_eager(eager).backward()
    torch.manual_seed(1)
    run(plain).backward()
    worst = relative_errors(gradients(model), gradients(eager))
    assert max(worst.values()) < tolerance, worst
    named = {c.name: c.parameter for c in candidates(model)}
    touched = {id(named[name]) for name in compressed}
    exact = relative_errors(gradients(model), gradients(plain))
    for name, parameter in model.named_parameters():
        if name in exact and id(parameter) not in touched:
            assert exact[name] < tolerance, (name, exact[name])
    return report


def check_vectors(compiled: nn.Module, eager: nn.Module, run: Run, velora: VeLoRA) -> None:
    """With init="batch_mean", each v is the oracle's normalised mean."""
    if velora.init != "batch_mean":
        return
    torch.manual_seed(1)
    with torch.no_grad(), oracle.recording() as recorded:
        run(eager)
    twins = {c.name: id(c.parameter) for c in candidates(eager)}
    for name, v in vectors_of(compiled).items():
        expected = oracle.unit_mean(recorded.inputs[twins[name]], velora.subtoken_size)
        torch.testing.assert_close(v.double(), expected, rtol=1e-5, atol=1e-5)


def count_saved(model: nn.Module, run: Run, besides: tuple[Tensor, ...] = ()) -> int:
    """Bytes of distinct memories that one forward hands to backward, parameters apart."""
    free = [*model.parameters(), *model.buffers(), *besides]
    known = {t.untyped_storage().data_ptr() for t in free}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run(model)
    del loss
    return sum(sizes.values())


def hooked(run: Callable[[], Any], without: Collection[int] = ()) -> int:
    """Bytes of distinct memories that autograd packs, but for those at these addresses."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return sum(size for address, size in sizes.items() if address not in without)


class Wrapped(nn.Module):
    """A model and its loss as one module without arguments."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self) -> Tensor:
        return self.run(self.model)
