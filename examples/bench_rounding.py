"""How far training runs part that differ by rounding alone; raw JSON out.

    python examples/bench_rounding.py --output docs/results/NAME.json

VeLoRA's small gradients give the trajectory of the full ones, but not their rounding. A small LLaMA
trains on real text, in float32, several times over the same batches:

full      gradients="dense", beside gradients="coordinates"
moved     the latter, from weights that are each one unit in the last place larger

If the second pair parts as far as the first, the first says nothing about the method. Beside the
losses, "weights_apart" is the largest difference of a parameter after the last step.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import memrewrite
from memrewrite import VeLoRA
from memrewrite.bench.run.subject import Request
from memrewrite.bench.tasks.text import batches, stdlib_ids

WARM_UP = 0.2  # of the steps


def run(args: Any, gradients: Any, moved: bool) -> tuple[list[float], list[torch.Tensor]]:
    """The loss of each step, and the parameters after the last."""
    model, _, _ = Request("llama-tiny", 8, 128, args.vocab, args.layers).build()
    if moved:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.nextafter(p, torch.full_like(p, float("inf"))))
    velora = VeLoRA(16, sites=args.sites, lr_scale=args.lr_scale, gradients=gradients)
    memrewrite.compile(model, velora=velora, backend=args.backend)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    ids, _ = stdlib_ids(args.data, args.vocab)
    found = []
    for step, batch in enumerate(islice(batches(ids, 8, 128, 0), args.steps)):
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / (WARM_UP * args.steps))
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found, [p.detach() for p in model.parameters()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--sites", default="all", choices=("auto", "all"))
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--lr-scale", type=float, default=1.0)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--data", type=Path, default=Path("out/text"))
    parser.add_argument("--output", type=Path, default=Path("out/rounding.json"))
    args = parser.parse_args()

    small, weights = run(args, "coordinates", moved=False)
    others, apart = {}, {}
    for name, gradients in (("full", "dense"), ("moved", "coordinates")):
        others[name], ends = run(args, gradients, moved=name == "moved")
        apart[name] = max(float((a - b).abs().max()) for a, b in zip(weights, ends, strict=True))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    found = {"settings": settings, "losses": {"small": small, **others}, "weights_apart": apart}
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    marks = sorted({args.steps * n // 8 for n in range(1, 9)} - {0})
    rows = [
        [mark, *(f"{max(abs(a - b) for a, b in zip(small[:mark], other[:mark], strict=True)):.2g}"
                 for other in others.values())]
        for mark in marks
    ]  # fmt: skip
    print("largest difference of the training losses so far, in nats")
    print(tabulate(rows, ("steps", *others), "github", disable_numparse=True))


if __name__ == "__main__":
    main()
