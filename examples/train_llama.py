"""Train a small LLaMA on Python's standard library: torch.compile beside memrewrite.

Each configuration trains in a fresh process, from the same weights, on the same batches, with
the same stock fused AdamW; the one line that differs is in CONFIGURATIONS. Printed at the end:
what autograd saved, the optimizer's state, the physical peak, time and loss. Written:
<output>/loss.png and demo.json.

    python examples/train_llama.py
    python examples/train_llama.py --size 60m --device cuda --dtype bfloat16 --steps 1000
    python examples/train_llama.py --configurations galore-torch "memrewrite galore"
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import memrewrite
from memrewrite.bench.tasks.text import VOCABULARIES, batches, stdlib_ids

RANK = 128
CONFIGURATIONS: dict[str, Callable[[LlamaForCausalLM], object]] = {
    "torch.compile": lambda model: model.compile(),
    "galore-torch": lambda model: model.compile(),  # and its own optimizer: see _optimizer
    "memrewrite exact": lambda model: memrewrite.compile(model),
    "memrewrite velora": lambda model: memrewrite.compile(model, velora=True),
    "memrewrite velora all": lambda model: memrewrite.compile(
        model, velora=memrewrite.VeLoRA(sites="all")
    ),
    "memrewrite galore": lambda model: memrewrite.compile(model, galore_rank=RANK),
    "memrewrite galore rotate": lambda model: memrewrite.compile(
        model, galore=memrewrite.GaLore(RANK, moments="rotate")
    ),
    "memrewrite galore svd": lambda model: memrewrite.compile(
        model, galore=memrewrite.GaLore(RANK, refresh="svd")
    ),
    "memrewrite velora + galore": lambda model: memrewrite.compile(
        model, velora=True, galore_rank=RANK
    ),
    "memrewrite velora all + galore": lambda model: memrewrite.compile(
        model, velora=memrewrite.VeLoRA(sites="all"), galore_rank=RANK
    ),
}
DEFAULTS = ["torch.compile", "memrewrite velora + galore", "memrewrite velora all + galore"]
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES = {
    "tiny": (256, 704, 1, 4),
    "small": (256, 704, 4, 4),
    "60m": (512, 1376, 8, 8),  # GaLore's LLaMA 60M
}
WARM_UP = 3  # steps that compile and fill caches: not timed
PEAK = 3  # the last steps: their peak is read, and they are not timed
VALIDATION_BATCHES = 8
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
MB = 1e6


@dataclass(frozen=True)
class Result:
    """What one child measured, in bytes, seconds, and nats per token."""

    name: str
    saved: int
    state: int  # of the optimizer
    idle: int | None  # None: this platform does not tell
    peak: int | None
    seconds: list[float]  # per step, the WARM_UP and PEAK ones included
    losses: list[float]
    validation: float
    report: str

    @property
    def above_idle(self) -> float | None:
        """Activations, gradients and workspace; weights and moments are there at idle."""
        return None if self.peak is None or self.idle is None else (self.peak - self.idle) / MB


def train(name: str, args: argparse.Namespace) -> Result:
    """The child's work: a usual training loop with meters around it."""
    ids, held_out = stdlib_ids(args.output, args.vocab)
    model = _model(args)
    CONFIGURATIONS[name](model)
    lr = args.galore_lr if "galore" in name else args.lr
    optimizer = _optimizer(name, model, lr)
    # One cycle: a short warm-up, then a cosine.
    scheduler = OneCycleLR(optimizer, lr, args.steps, pct_start=0.1, cycle_momentum=False)
    data = batches(ids, args.batch, args.sequence, args.seed)
    losses: list[float] = []
    seconds: list[float] = []
    idle = None
    for step in _progress(name, args.steps, losses):
        if step == max(0, args.steps - PEAK):
            idle = _reset_peak(args.device)
        start = time.perf_counter()
        batch = next(data).to(args.device)  # (B, S)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device, so the clock sees the whole step
        seconds.append(time.perf_counter() - start)
    peak = None if idle is None else _peak(args.device)
    saved = _saved_bytes(model, next(data).to(args.device))
    validation = _validation_loss(model, batches(held_out, args.batch, args.sequence, 0))
    report = ""
    if name.startswith("memrewrite"):
        told = memrewrite.report(model)
        report = f"{told.status}\n{told.optimizer_status}".strip()
    state = _state_bytes(optimizer)
    return Result(name, saved, state, idle, peak, seconds, losses, validation, report)


def _optimizer(name: str, model: LlamaForCausalLM, lr: float) -> torch.optim.Optimizer:
    if name != "galore-torch":
        return torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    from galore_torch import GaLoreAdamW  # the reference, on the weights that it projects

    body = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    rest = [p for p in model.parameters() if all(p is not w for w in body)]
    how = {"rank": RANK, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": rest}, {"params": body, **how}]
    optimizer: torch.optim.Optimizer = GaLoreAdamW(
        groups, lr=lr, weight_decay=0.01, eps=1e-8, no_deprecation_warning=True
    )
    return optimizer


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    total = 0
    for state in optimizer.state.values():
        held = [*state.values(), getattr(state.get("projector"), "ortho_matrix", None)]
        total += sum(v.nbytes for v in held if isinstance(v, Tensor))
    return total


def _model(args: argparse.Namespace) -> LlamaForCausalLM:
    shape: dict[str, Any] = dict(zip(SHAPE, SIZES[args.size], strict=True))
    shape |= {"vocab_size": args.vocab, "max_position_embeddings": args.sequence}
    config = LlamaConfig(**shape, use_cache=False)
    torch.manual_seed(args.seed)
    # Not .to(dtype): that would round the rotary frequencies too.
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    return cast(LlamaForCausalLM, model.to(args.device))


def _progress(name: str, steps: int, losses: list[float]) -> Iterator[int]:
    """A bar on a terminal, ten lines elsewhere."""
    bar = tqdm(range(steps), name, file=sys.stdout, disable=not sys.stdout.isatty())
    for step in bar:
        yield step
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
        if bar.disable and (step + 1) % max(1, steps // 10) == 0:
            print(f"{name}: step {step + 1}/{steps}, loss {losses[-1]:.3f}", flush=True)


def _reset_peak(device: torch.device) -> int | None:
    """Forget the peak so far; returns the bytes held between two steps."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        libc = ctypes.CDLL("libc.so.6")
        # From here on glibc gives freed blocks back at once, so resident memory is live
        # memory. Not before: it would slow the steps that are timed.
        libc.mallopt(M_MMAP_THRESHOLD, 65536)
        libc.mallopt(M_TRIM_THRESHOLD, 65536)
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except OSError:  # no glibc, no /proc, or a sandbox that forbids the reset
        return None


def _peak(device: torch.device) -> int | None:
    cuda = device.type == "cuda"
    return torch.cuda.max_memory_allocated(device) if cuda else _resident("VmHWM")


def _resident(field: str) -> int | None:
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(found[1]) * 1024 if found else None


def _saved_bytes(model: LlamaForCausalLM, batch: Tensor) -> int:
    """Bytes that autograd keeps for backward: each storage once, parameters and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=batch, labels=batch).loss
    del loss  # alive until here, so no storage was freed and its address counted again
    return sum(kept.values())


def _validation_loss(model: LlamaForCausalLM, data: Iterator[Tensor]) -> float:
    held_out = [batch.to(model.device) for batch in islice(data, VALIDATION_BATCHES)]
    with torch.no_grad():
        # forward() is the eager model: every configuration is judged by the same arithmetic,
        # and no inference graph has to be compiled.
        losses = [float(model.forward(input_ids=b, labels=b).loss) for b in held_out]
    return sum(losses) / len(losses)


def run_child(name: str, args: argparse.Namespace) -> Result:
    """Train `name` in a process of its own. Exits, naming it, where the child fails."""
    log = args.output / f"{name.replace(' ', '-')}.log"
    with tempfile.TemporaryDirectory() as scratch, log.open("w+") as stderr:
        result = Path(scratch, "result.json")
        cold = {"TORCHINDUCTOR_CACHE_DIR": str(Path(scratch, "inductor"))}  # so comparable
        command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
        command += ["--result", str(result)]
        done = subprocess.run(command, env=os.environ | cold, stderr=stderr)
        if done.returncode != 0:
            tail = "\n".join(log.read_text().splitlines()[-20:])
            sys.exit(f"{tail}\n{name!r} failed with exit status {done.returncode}; see {log}")
        return Result(**json.loads(result.read_text()))


def table(results: list[Result]) -> str:
    header = [
        "",
        "saved MB",
        "optimizer state MB",
        "peak above idle MB",
        "process peak MB",
        "step s (quartiles)",
    ]
    header += ["first step s", "validation loss"]
    return tabulate([_row(r, results[0]) for r in results], header, disable_numparse=True)


def _row(result: Result, base: Result) -> list[str]:
    low, median, high = _quartiles(result)
    return [
        result.name,
        _ratio(result.saved / MB, base.saved / MB),
        _ratio(result.state / MB, base.state / MB),
        _ratio(result.above_idle, base.above_idle),
        "n/a" if result.peak is None else f"{result.peak / MB:.0f}",
        f"{_ratio(median, _quartiles(base)[1], 3)} {low:.3f}..{high:.3f}",
        f"{result.seconds[0]:.1f}",
        f"{result.validation:.3f}",
    ]


def _quartiles(result: Result) -> list[float]:
    steady = result.seconds[WARM_UP:-PEAK] or result.seconds[-1:]
    return [float(q) for q in np.percentile(steady, (25, 50, 75))]


def _ratio(value: float | None, base: float | None, digits: int = 1) -> str:
    if value is None or not base:
        return "n/a"
    return f"{value:.{digits}f} ({value / base:.2f}x)"


def draw(results: list[Result], path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")  # no pyplot: no window, no display
    axes = figure.subplots()
    for result in results:
        window = min(10, len(result.losses))
        smooth = np.convolve(result.losses, np.full(window, 1 / window), "valid")
        label = f"{result.name} (validation {result.validation:.3f})"
        axes.plot(np.arange(window, len(result.losses) + 1), smooth, label=label)
    axes.set(xlabel="step", ylabel="training loss, nats per token (mean of 10 steps)")
    axes.set_title("LLaMA on Python's standard library")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def write_json(results: list[Result], args: argparse.Namespace) -> None:
    machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "torch": torch.__version__}
    record = {"arguments": vars(args), "machine": machine, "results": [*map(asdict, results)]}
    (args.output / "demo.json").write_text(json.dumps(record, indent=1, default=str))


def main() -> None:
    args = _arguments()
    if args.child:
        args.result.write_text(json.dumps(asdict(train(args.child, args))))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    ids, held_out = stdlib_ids(args.output, args.vocab)
    print(f"{len(ids):,} tokens to train on, {len(held_out):,} to validate on", flush=True)
    results = [run_child(name, args) for name in args.configurations]
    draw(results, args.output / "loss.png")
    write_json(results, args)
    print(f"\n{table(results)}\n")
    for result in results:
        if result.report:
            print(f"{result.name}: {result.report}")
    print(f"\nRatios are to {results[0].name}. Times on shared CPUs are noisy: see the quartiles.")
    print("VeLoRA's and GaLore's losses differ: their gradients and steps are approximations.")
    print(
        f"Learning rate: {args.lr}; with GaLore, whose steps are scaled by 0.25, {args.galore_lr}."
    )
    print(f"Written: {args.output / 'loss.png'}, {args.output / 'demo.json'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    for name, default in {"steps": 120, "batch": 8, "sequence": 128, "vocab": 4096}.items():
        parser.add_argument(f"--{name}", type=_positive, default=default)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--galore-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=_device, default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    parser.add_argument(
        "--configurations", nargs="+", choices=CONFIGURATIONS, default=DEFAULTS, metavar="NAME"
    )
    parser.add_argument("--child", choices=CONFIGURATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.vocab not in VOCABULARIES:
        parser.error(f"--vocab {args.vocab}: choose from {VOCABULARIES[0]} to {VOCABULARIES[-1]}")
    return args


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not available here: {error}") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r}: only cpu and cuda are measured here")
    return device


if __name__ == "__main__":
    main()
