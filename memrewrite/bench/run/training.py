"""One training run in the worker of a configuration: from initial weights to validation loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import memrewrite
from memrewrite.bench.configurations import Configuration
from memrewrite.bench.run.meters import Stopwatch
from memrewrite.bench.run.subject import Request, Subject, start_over
from memrewrite.bench.tasks import task
from memrewrite.bench.tasks.docstrings import IGNORED
from memrewrite.bench.tasks.task import Batch, Task

# Share of the steps with linear warm-up, before the cosine schedule. Short runs need a long one:
# with 0.05 the plain model ended 0.3 nats higher.
WARM_UP = 0.2
CLIP = 1.0


def train(
    asked: Request,
    configuration: Configuration,
    subject: Subject,
    optimizer: Callable[[], Optimizer],
    update: Callable[[], None],
    stopwatch: Callable[[], Stopwatch],
    seed: int,
    steps: int,
    data: str,
) -> dict[str, Any]:
    """The results of one run; `loss` is in nats per label, None if it is not finite.

    optimizer: makes the optimizer that `update` steps. stopwatch: makes a running stopwatch.
    """
    model = subject.model
    _start_over(model, configuration, asked, seed)
    scheduler = LambdaLR(optimizer(), lambda step: _schedule(step, steps))
    chosen = _task(asked, model, data)
    losses: list[float] = []
    seconds: list[float] = []
    watch = stopwatch()
    for batch in islice(chosen.train(asked.batch, seed), steps):
        loss = subject.loss(**_on(batch, asked.device))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        update()
        scheduler.step()
        losses.append(round(float(loss.detach()), 4))
        seconds.append(watch.read())
    validation, accuracy = _validation(model, chosen, asked)
    measured = {} if accuracy is None else {"accuracy": accuracy}
    return measured | {
        "loss": validation if math.isfinite(validation) else None,
        "losses": losses,
        "step_s": median(seconds[len(seconds) // 10 :]),
    }


def first_batch(asked: Request, subject: Subject, data: str) -> Batch:
    """The task's first batch."""
    return _on(next(_task(asked, subject.model, data).train(asked.batch, 0)), asked.device)


def _task(asked: Request, model: Any, data: str) -> Task:
    vocabulary = getattr(model.config, "vocab_size", 0)
    return task.load(_name(asked), asked.model, vocabulary, asked.seq or 0, Path(data))


def _name(asked: Request) -> str:
    return asked.task or task.TASKS[0]


def _on(batch: Batch, device: str) -> Batch:
    return {name: value.to(device) for name, value in batch.items()}


def _start_over(model: nn.Module, configuration: Configuration, asked: Request, seed: int) -> None:
    """Write the initial weights of a seed into the compiled model, and reset its vectors."""
    start_over(model, configuration, asked, seed)
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


def _validation(model: nn.Module, chosen: Task, asked: Request) -> tuple[float, float | None]:
    """(loss, accuracy of a classifier or None) of the plain model without dropout.

    The same arithmetic for every configuration: nothing is compiled.
    """
    total, labels, right = 0.0, 0, 0
    classifies = _name(asked) in task.CLASSIFY
    model.eval()
    with torch.no_grad():
        for batch in chosen.held_out(asked.batch):
            batch = _on(batch, asked.device)
            out = model.forward(**batch)
            count = int((batch["labels"] != IGNORED).sum())
            total, labels = total + float(out.loss) * count, labels + count
            if classifies:
                right += int((out.logits.argmax(-1) == batch["labels"]).sum())
    model.train()
    return total / labels, right / labels if classifies else None
