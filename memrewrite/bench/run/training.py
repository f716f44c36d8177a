"""One training run in the worker of a configuration: from initial weights to validation loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import memrewrite
from memrewrite.bench.run.meters import Stopwatch
from memrewrite.bench.run.subject import Request, Subject
from memrewrite.bench.run.text import batches, stdlib_ids

# Share of the steps with linear warm-up, before the cosine schedule. Short runs need a long one:
# with 0.05 the plain model ended 0.3 nats higher.
WARM_UP = 0.2
CLIP = 1.0
HELD_OUT = 16  # validation batches


def train(
    asked: Request,
    subject: Subject,
    optimizer: Callable[[], Optimizer],
    update: Callable[[], None],
    stopwatch: Callable[[], Stopwatch],
    seed: int,
    steps: int,
    data: str,
) -> dict[str, Any]:
    """The results of one run; `loss` is in nats per token, None if it is not finite.

    optimizer: makes the optimizer that `update` steps. stopwatch: makes a running stopwatch.
    """
    model = subject.model
    _start_over(model, asked, seed)
    scheduler = LambdaLR(optimizer(), lambda step: _schedule(step, steps))
    ids, held_out = stdlib_ids(Path(data), _vocabulary(model))
    losses: list[float] = []
    seconds: list[float] = []
    watch = stopwatch()
    for batch in islice(batches(ids, asked.batch, asked.seq or 0, seed), steps):
        batch = batch.to(asked.device)  # (B, S)
        loss = subject.loss(input_ids=batch, labels=batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        update()
        scheduler.step()
        losses.append(round(float(loss.detach()), 4))
        seconds.append(watch.read())
    validation = _validation(model, held_out, asked)
    return {
        "loss": validation if math.isfinite(validation) else None,
        "losses": losses,
        "step_s": median(seconds[len(seconds) // 10 :]),
    }


def _start_over(model: nn.Module, asked: Request, seed: int) -> None:
    """Write the initial weights of a seed into the compiled model, and reset its vectors."""
    fresh, _, _ = asked.build(seed)
    model.load_state_dict(fresh.state_dict())
    try:
        if memrewrite.state_dict(model):
            memrewrite.load_state_dict(model, {})
    except ValueError:  # not compiled by memrewrite
        pass


def _schedule(step: int, steps: int) -> float:
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _vocabulary(model: Any) -> int:
    return int(model.config.vocab_size)


def _validation(model: nn.Module, held_out: Any, asked: Request) -> float:
    """Loss of the plain model without dropout: the same arithmetic for every configuration."""
    total = 0.0
    model.eval()
    with torch.no_grad():
        for batch in islice(batches(held_out, asked.batch, asked.seq or 0, 0), HELD_OUT):
            ids: Tensor = batch.to(asked.device)
            total += float(model.forward(input_ids=ids, labels=ids).loss)
    model.train()
    return total / HELD_OUT
