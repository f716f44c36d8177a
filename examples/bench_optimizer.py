"""Measure GaLore's optimizer step on a LLaMA: stock AdamW, galore-torch, memrewrite; raw JSON out.

    python examples/bench_optimizer.py --output docs/results/NAME.json

step        The optimizer's step alone, between refreshes, on one fixed gradient. All
            contestants live in one process and step in turn; a ratio is the median of the
            ratios within a round.
refresh     All projectors of the model from one gradient: galore-torch's SVD and ours, in turn,
            layer by layer; and the energy |P^T G|^2 / |G|^2 that each captures.
state       Bytes of every tensor in optimizer.state, and what stock AdamW holds.
shapes      State of the paper's LLaMAs by formula, from models on the meta device, as a share of
            Adam's; no optimizer exists.
compile     The optimizer's first step in a fresh process with cold caches, less its second,
            for several depths. Both refresh.

The gradient is a real one: the model's, on a batch of the standard library's source, after
--warm-up steps of AdamW. MB are 10^6 bytes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

import memrewrite
from memrewrite import GaLore
from memrewrite.bench.tasks.text import batches, stdlib_ids
from memrewrite.gradients import range_finder

MB = 1e6
SHAPE = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
MARK = "bench_optimizer: "


def llama(args: argparse.Namespace, layers: int) -> nn.Module:
    config = LlamaConfig(
        **SHAPE, num_hidden_layers=layers, vocab_size=args.vocab, use_cache=False,
        max_position_embeddings=args.sequence,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def with_real_gradient(args: argparse.Namespace) -> nn.Module:
    """A model a few steps into training, its gradient in place."""
    model = llama(args, args.layers)
    ids, _ = stdlib_ids(args.data, args.vocab)
    data = batches(ids, args.batch, args.sequence, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for step in tqdm(range(args.warm_up + 1), "warm-up", file=sys.stdout):
        if step:
            optimizer.step()
            optimizer.zero_grad()
        batch = next(data)
        model(input_ids=batch, labels=batch).loss.backward()
    return model


# --- contestants ------------------------------------------------------------------------


def body(model: nn.Module) -> list[nn.Parameter]:
    """The weights that the reference projects: attention and MLP linears."""
    return [
        m.weight
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and ("self_attn" in name or "mlp" in name)
    ]


def stock(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def reference(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    projected = body(model)
    chosen = set(map(id, projected))
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in chosen]},
        {"params": projected, "rank": args.rank, "update_proj_gap": 10**9, "scale": 0.25,
         "proj_type": "std"},
    ]  # fmt: skip
    optimizer: torch.optim.Optimizer = GaLoreAdamW(
        groups, lr=1e-5, weight_decay=0.01, no_deprecation_warning=True
    )
    return optimizer


def ours(backend: str) -> Callable[[nn.Module, argparse.Namespace], torch.optim.Optimizer]:
    def build(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
        galore = GaLore(args.rank, update_every=10**9)
        memrewrite.compile(model, galore=galore, backend=backend)
        return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    return build


CONTESTANTS = {
    "AdamW fused": stock,
    "galore-torch": reference,
    "memrewrite": ours("inductor"),
    "memrewrite, not compiled": ours("aot_eager"),
}


def step_times(model: nn.Module, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    optimizers, state = {}, {}
    for name, build in CONTESTANTS.items():
        copied = copy.deepcopy(model)
        for p, q in zip(model.parameters(), copied.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizers[name] = build(copied, args)
        optimizers[name].step()  # projectors, compilation
        optimizers[name].step()
        state[name] = state_bytes(optimizers[name])
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in tqdm(range(args.rounds), "steps", file=sys.stdout):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            times[name].append(time.perf_counter() - start)
    return {n: {"state_bytes": state[n], "step_s": t} for n, t in times.items()}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    total = 0
    for state in optimizer.state.values():
        held = [*state.values(), getattr(state.get("projector"), "ortho_matrix", None)]
        total += sum(v.nbytes for v in held if isinstance(v, Tensor) and v.ndim)
    return total


# --- refreshes --------------------------------------------------------------------------


def refreshes(model: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    from galore_torch.galore_projector import GaLoreProjector

    rows = []
    for name, module in tqdm(list(model.named_modules()), "refreshes", file=sys.stdout):
        if not isinstance(module, nn.Linear) or module.weight not in set(body(model)):
            continue
        g = module.weight.grad
        assert g is not None
        left = g.shape[0] < g.shape[1]
        row: dict[str, Any] = {"name": name, "shape": list(g.shape)}
        times: dict[str, list[float]] = {"svd": [], "randomized": []}
        for repeat in range(args.repeats):
            start = time.perf_counter()
            theirs = GaLoreProjector(args.rank, update_proj_gap=1, proj_type="std")
            basis = theirs.get_orthogonal_matrix(g, args.rank, type="left" if left else "right")
            times["svd"].append(time.perf_counter() - start)
            start = time.perf_counter()
            new = range_finder.refresh(g, None, args.rank, left, "randomized", repeat)
            times["randomized"].append(time.perf_counter() - start)
        assert isinstance(new, range_finder.Refreshed)
        held = basis.t() @ g if left else g @ basis.t()
        row["svd_energy"] = float(held.square().sum() / g.square().sum())
        row["randomized_energy"] = new.energy
        row |= {f"{k}_s": v for k, v in times.items()}
        rows.append(row)
    return rows


# --- the paper's shapes ------------------------------------------------------------------

# hidden, intermediate, layers, rank; vocabulary 32000. Paper: table 2 (60M to 1B) and
# section 5.3 (7B), optimizer state saved; 60M to 1B from its "GaLore" and "full" columns.
PAPER = {
    "60M": (512, 1376, 8, 128, 1 - 0.13 / 0.23),
    "130M": (768, 2048, 12, 256, 1 - 0.28 / 0.51),
    "350M": (1024, 2736, 24, 256, 1 - 0.54 / 1.37),
    "1B": (2048, 5461, 24, 512, 1 - 1.78 / 5.20),
    "7B": (4096, 11008, 32, 1024, 0.655),
}


def shapes() -> list[dict[str, Any]]:
    rows = []
    for name, (hidden, intermediate, layers, rank, saved) in PAPER.items():
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, vocab_size=32000,
        )  # fmt: skip
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        memrewrite.compile(model, galore_rank=rank)
        totals = memrewrite.report(model).totals
        before, after = totals["state_bytes_before"], totals["state_bytes_after"]
        rows.append({"shape": name, "rank": rank, "adam": before, "galore": after, "paper": saved})
    return rows


# --- first steps ------------------------------------------------------------------------


def first_step(args: argparse.Namespace) -> None:
    """The child's work: one optimizer step on random gradients."""
    model = llama(args, args.child)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    # Every step refreshes, so that the first one has nothing but compilation besides.
    memrewrite.compile(model, galore=GaLore(args.rank, update_every=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    print(MARK + json.dumps(seconds))


def first_steps(args: argparse.Namespace) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {str(depth): [] for depth in args.depths}
    for _ in range(args.repeats):
        for depth in args.depths:
            with tempfile.TemporaryDirectory() as cache:
                command = [sys.executable, __file__, *sys.argv[1:], "--child", str(depth)]
                environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"the first step at {depth} layers failed")
            line = next(x for x in done.stdout.splitlines() if x.startswith(MARK))
            found[str(depth)].append(json.loads(line.removeprefix(MARK)))
    return found


# --- tables -----------------------------------------------------------------------------


def report(record: dict[str, Any]) -> str:
    steps = record["steps"]
    base, theirs = steps["AdamW fused"], steps["galore-torch"]["step_s"]
    rows = [
        (
            name,
            f"{one['state_bytes'] / MB:.1f}",
            f"{one['state_bytes'] / base['state_bytes']:.3f}",
            f"{median(one['step_s']) * 1e3:.1f}",
            f"{ratio(one['step_s'], base['step_s']):.2f}",
            f"{ratio(one['step_s'], theirs):.2f}",
        )
        for name, one in steps.items()
    ]
    header = ["", "state MB", "ratio", "step ms", "to AdamW fused", "to galore-torch"]
    parts = [tabulate(rows, header, tablefmt="github", disable_numparse=True)]
    if record["refreshes"]:
        lines = [
            (
                row["name"],
                "x".join(map(str, row["shape"])),
                f"{median(row['svd_s']) * 1e3:.1f}",
                f"{median(row['randomized_s']) * 1e3:.1f}",
                f"{ratio(row['randomized_s'], row['svd_s']):.3f}",
                f"{row['svd_energy']:.4f}",
                f"{row['randomized_energy']:.4f}",
                f"{row['randomized_energy'] / row['svd_energy']:.4f}",
            )
            for row in record["refreshes"]
        ]
        header = ["weight", "shape", "SVD ms", "ours ms", "ratio", "SVD energy", "ours", "share"]
        parts.append(tabulate(lines, header, tablefmt="github", disable_numparse=True))
        totals = [
            sum(median(row[f"{kind}_s"]) for row in record["refreshes"])
            for kind in ("svd", "randomized")
        ]
        parts.append(
            f"All {len(record['refreshes'])} layers: SVD {totals[0]:.2f} s, ours {totals[1]:.2f} s "
            f"({totals[1] / totals[0]:.3f} x)"
        )
    lines = [
        (
            row["shape"],
            str(row["rank"]),
            f"{row['adam'] / 2**30:.2f}",
            f"{row['galore'] / 2**30:.2f}",
            f"{1 - row['galore'] / row['adam']:.1%}",
            f"{row['paper']:.1%}",
        )
        for row in record["shapes"]
    ]
    header = ["LLaMA", "rank", "Adam GiB, bf16", "projected GiB", "saved", "paper"]
    parts.append(tabulate(lines, header, tablefmt="github", disable_numparse=True))
    for depth, runs in record["first_steps"].items():
        cold = median(first - second for first, second in runs)
        parts.append(f"{depth} layers: the first step compiles for {cold:.1f} s")
    return "\n\n".join(parts)


def ratio(ours: list[float], theirs: list[float]) -> float:
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    args = arguments()
    if args.child:
        first_step(args)
        return
    model = with_real_gradient(args)
    record: dict[str, Any] = {
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
        "steps": step_times(model, args),
        "refreshes": refreshes(model, args) if args.repeats else [],
        "shapes": shapes(),
        "first_steps": first_steps(args) if args.depths else {},
    }
    print("\n" + report(record))
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    defaults = {
        "layers": 8, "rank": 128, "vocab": 4096, "batch": 8, "sequence": 256, "rounds": 30,
        "repeats": 3, "warm-up": 20,
    }  # fmt: skip
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--depths", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--data", type=Path, default=Path("out/demo"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
