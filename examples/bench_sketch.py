"""Measure what the projectors of sketched gradients hold, beside the best; raw JSON out.

    python examples/bench_sketch.py --output docs/results/NAME.json

A small LLaMA trains on real text under GaLore(gradients="coordinates"). At each refresh the plain
model computes the full gradient G on the same weights and batch, and for every projected weight

best        the energy |P^T G|^2 / |G|^2 of the r leading singular vectors of G
randomized  what GaLore's refresh from G itself holds of that best
sketched    what the P that was made from the sketch holds of it
seen        the share of |G|^2 that the sketch's basis sees: the update of that step goes by it
one, half   what P from the full gradient of one sequence of the batch, of half of them, holds of it
told        the energy in `memrewrite.report`, an estimate, by the true one of that P
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import memrewrite
from memrewrite import GaLore
from memrewrite.bench.run.subject import Request
from memrewrite.bench.tasks.text import batches, stdlib_ids
from memrewrite.gradients import range_finder
from memrewrite.gradients.basis import Sketch

WARM_UP = 80  # steps
KEYS = ("best", "randomized", "sketched", "one", "half", "seen", "told")


def energy(g: Tensor, p: Tensor) -> float:
    small = p.t() @ g if p.shape[0] == g.shape[0] and g.shape[0] < g.shape[1] else g @ p
    return float(small.square().sum() / g.square().sum())


def sketched(model: Any) -> dict[str, Any]:
    named = model.named_parameters()
    return {n: p for n, p in named if isinstance(getattr(p.grad, "basis", None), Sketch)}


def full(plain: Any, names: Iterable[str], batch: Tensor) -> dict[str, Tensor]:
    """The gradients of some weights on some sequences."""
    plain.zero_grad()
    plain(input_ids=batch, labels=batch).loss.backward()
    return {name: plain.get_parameter(name).grad for name in names}


def rows(model: Any, optimizer: Any, computed: Sequence[Any], seen: dict[str, float]) -> Any:
    """One per weight that was refreshed in this step; computed: gradients of all, one, half."""
    told = {r["name"]: r["energy"] for r in memrewrite.report(model).to_dict()["optimizer"]}
    for name, part in seen.items():
        g, *parts = (gradients[name] for gradients in computed)
        weight = model.get_parameter(name)
        p = optimizer.state[weight]["projector"]
        rank, left = p.shape[1], g.shape[0] < g.shape[1]
        squares = torch.linalg.svdvals(g).square()
        best = float(squares[:rank].sum() / squares.sum())
        made: Any = [
            range_finder.refresh(x, None, rank, left, "randomized", 0) for x in (g, *parts)
        ]
        found, others = energy(g, p), [energy(g, one.projector) / best for one in made]
        shares = (best, others[0], found / best, *others[1:], part)
        yield dict(zip(KEYS, (*shares, told[name.removesuffix(".weight")] / found), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--every", type=int, default=100, help="steps between refreshes")
    parser.add_argument("--steps", type=int, default=201)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--data", type=Path, default=Path("out/text"))
    parser.add_argument("--output", type=Path, default=Path("out/sketch.json"))
    args = parser.parse_args()

    asked = Request("llama-tiny", 8, 128, args.vocab, args.layers, rank=args.rank)
    (model, _, _), (plain, _, _) = asked.build(), asked.build()
    galore = GaLore(args.rank, update_every=args.every, gradients="coordinates")
    memrewrite.compile(model, galore=galore, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    ids, _ = stdlib_ids(args.data, args.vocab)
    found: dict[int, Any] = {}
    for step, batch in enumerate(islice(batches(ids, 8, 128, 0), args.steps)):
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / WARM_UP)
        model(input_ids=batch, labels=batch).loss.backward()
        due, computed = sketched(model), []
        if due:
            plain.load_state_dict(model.state_dict())
            computed = [full(plain, due, batch[:count]) for count in (8, 1, 4)]
        norms = {n: p.grad.norm() / computed[0][n].norm() for n, p in due.items()}
        seen = {name: float(norm) ** 2 for name, norm in norms.items()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if due:
            found[step] = list(rows(model, optimizer, computed, seen))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    args.output.write_text(json.dumps({"settings": settings, "weights": found}, indent=1) + "\n")
    lines = []
    for step, weights in found.items():
        columns = [[w[key] for w in weights] for key in KEYS]
        lines.append([step, *(f"{median(c):.3f} [{min(c):.3f}, {max(c):.3f}]" for c in columns)])
    print(tabulate(lines, ("step", *KEYS), "github", disable_numparse=True))


if __name__ == "__main__":
    main()
