"""What a refresh of GaLore's projectors adds to the peak, way by way; raw JSON out.

    python examples/bench_refresh.py --output docs/results/NAME.json

One training step of a LLaMA with gradients="coordinates", in a process of its own each:

between     no refresh
sketched    all weights at once, each from a sketch of its gradient: what memrewrite does
staggered   full gradients of one part of the weights, one of --parts; the others between two
full        full gradients of all, which GaLore's own algorithm reads

Bytes are the resident high-water mark of forward and backward above the idle process, in which
weights and optimizer state lie already. CPU only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import memrewrite
from memrewrite import GaLore
from memrewrite.bench.run import meters
from memrewrite.bench.run.subject import Request
from memrewrite.predict import models

WAYS = ("between", "sketched", "staggered", "full")
EVERY = 6  # steps: 0, 2, 4, 6 refresh; 5 does not


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-60m", choices=models.LLAMA)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--parts", type=int, default=8, help="of the weights, when staggered")
    parser.add_argument("--ways", default=",".join(WAYS), help="%(default)s")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--output", type=Path, default=Path("out/refresh.json"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args)))
        return
    found = {way: in_a_process(way) for way in args.ways.split(",")}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    args.output.write_text(json.dumps({"settings": settings, "bytes": found}, indent=1) + "\n")
    rows = [[way, *(f"{n / 1e6:.1f}" for n in peaks.values())] for way, peaks in found.items()]
    print(tabulate(rows, ("MB", "forward", "backward"), "github", disable_numparse=True))


def in_a_process(way: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, **meters.FREE_AT_ONCE, "TORCHINDUCTOR_CACHE_DIR": cache}
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(args: Any) -> dict[str, int]:
    asked = Request(args.model, args.batch, args.seq, args.vocab, args.layers)
    model, given, named = asked.build()
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    dense = {"staggered": linears[: len(linears) // args.parts], "full": linears}.get(args.way, [])
    small = [name for name in linears if name not in dense]
    if small:
        galore = GaLore(args.rank, sites=small, update_every=EVERY, gradients="coordinates")
        memrewrite.compile(model, galore=galore, backend=args.backend)
    else:
        memrewrite.compile(model, backend=args.backend)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    reading = meters.meter("cpu")

    def loss() -> torch.Tensor:
        value: torch.Tensor = model(*given, **named).loss
        return value

    for _ in range(EVERY if args.way == "sketched" else EVERY - 1):
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    idle = reading.settle()
    found, value = {}, loss()
    found["forward"] = reading.peak() - idle
    reading.reset()
    value.backward()  # type: ignore[no-untyped-call]
    return found | {"backward": reading.peak() - idle}


if __name__ == "__main__":
    main()
