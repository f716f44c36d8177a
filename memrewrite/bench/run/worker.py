"""The worker: one configuration in one process, which answers requests of its parent.

stdin    a line of JSON per request: {"do": "start", ...}
stdout   a line of JSON per answer: facts, or {"error": {"stage", "type", "message"}}

start    build the model, run the first step, compare its gradients with the reference's;
         before training, on the task's first batch
step     run one step: seconds
memory   peaks of forward, backward, step and refresh; bytes saved and held
predict  the predictions of memrewrite.estimate for them
train    a run with a seed and a learning rate: losses, seconds
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import memrewrite
from memrewrite.bench.configurations import Configuration, parse
from memrewrite.bench.run import meters, optimizers
from memrewrite.bench.run.subject import Request, Subject, prepare
from memrewrite.compiler.backend import graphs_compiled
from memrewrite.gradients.sketch import is_due

LR = 1e-4
DROPOUTS = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


@dataclass
class Worker:
    """One configuration and its state."""

    configuration: Configuration
    asked: Request
    stage: str = "before anything ran"
    steps: int = 0
    graphs: int = 0
    subject: Subject = field(init=False)
    optimizer: Optimizer = field(init=False)

    @contextmanager
    def at(self, stage: str) -> Iterator[None]:
        """Name the stage, for the report of a failure."""
        self.stage = stage
        yield
        self.stage = f"after {stage}"

    def start(
        self, reference: str | None = None, keep: str | None = None, data: str | None = None
    ) -> dict[str, Any]:
        """Run the first step, including compile and refresh.

        reference: a file of gradients to compare with; keep: one to write these to; data: the
        cache of tokenised text, for a step on the task's first batch.
        """
        with self.at("building the model"):
            self.meter = meters.meter(self.asked.device)
            self.subject = prepare(self.configuration, self.asked)
            if data:
                from memrewrite.bench.run.training import first_batch

                self.subject.kwargs = first_batch(self.asked, self.subject, data)
        watch = meters.Stopwatch(self.meter)
        with self.at("first forward (compiling)"):
            loss = self.subject.loss()
        with self.at("first backward (compiling)"):
            loss.backward()  # type: ignore[no-untyped-call]
        seconds = watch.read()
        found: dict[str, Any] = {"loss": float(loss.detach())}
        with self.at("reading gradients"):
            if keep:
                found["random"] = draws(self.subject.model)
                torch.save(self._gradients(), keep)
            if reference:
                found["gradient"] = compare(self._gradients(), reference)
        watch.read()
        with self.at("first optimizer step (compiling)"):
            asked, model = self.asked, self.subject.model
            self.optimizer = optimizers.make(
                self.configuration, model, LR, asked.rank, asked.refresh
            )
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.steps, self.graphs = 1, graphs_compiled()
        if self.configuration.pushed:  # the second step compiles the graph without refresh
            self.step()
        found |= {"first_step_s": seconds + watch.read(), "graphs": self.graphs}
        return found | {"taken": self.meter.taken(), "available": self.meter.available()}

    def step(self) -> dict[str, Any]:
        """Run one more step; `refresh` says whether a projector was due."""
        due, watch = self._due(), meters.Stopwatch(self.meter)
        with self.at(f"step {self.steps}"):
            self.subject.loss().backward()  # type: ignore[no-untyped-call]
            self.update()
        recompiles = graphs_compiled() - self.graphs
        return {"seconds": watch.read(), "refresh": due, "recompiles": recompiles}

    def memory(self) -> dict[str, Any]:
        """Peaks in bytes: above the idle process, plus the exact bytes that it holds."""
        with self.at("memory: settling"):
            self.meter.settle()
            self.step()
            while self._due():
                self.step()
            idle = self.meter.settle()
        marks: dict[str, int] = {}
        reserved = 0

        def mark(phase: str) -> None:
            nonlocal reserved
            marks[phase] = self.meter.peak()
            reserved = max(reserved, self.meter.reserved())

        with self.at("memory: forward"):
            loss = self.subject.loss()
            mark("forward")
        with self.at("memory: backward"):
            self.meter.reset()
            loss.backward()  # type: ignore[no-untyped-call]
            mark("backward")
            gradients = meters.unique_bytes(self._gradients())
            del loss
        with self.at("memory: optimizer step"):
            self.meter.reset()
            self.update(drop=False)
            mark("step")
            self.optimizer.zero_grad()
        if self.configuration.projected:
            self._until_refresh()
            mark("refresh")
        with self.at("memory: saved tensors"):
            saved = saved_bytes(self.subject)
        model = self.subject.model
        weights = meters.unique_bytes(chain(model.parameters(), model.buffers()))
        state = meters.unique_bytes(optimizers.state_tensors(self.optimizer))
        found = {f"{phase}_peak": mark - idle + weights + state for phase, mark in marks.items()}
        found |= {"peak": max(found.values()), "above_idle": max(marks.values()) - idle}
        found |= {"idle": idle, "process_peak": max(marks.values())}
        found |= {"weights": weights, "state": state, "gradients": gradients, "saved": saved}
        return found | ({"reserved": reserved} if reserved else {})

    def _until_refresh(self) -> None:
        while not self._due():
            self.step()
        with self.at("memory: refresh"):
            if self.configuration.pushed:  # the whole step differs
                self.meter.reset()
            self.subject.loss().backward()  # type: ignore[no-untyped-call]
            if not self.configuration.pushed:
                self.meter.settle()
            self.update()

    def predict(self) -> dict[str, Any]:
        """The estimate of the same, for torch.compile and memrewrite without torch's settings."""
        plain = self.configuration
        if plain.engine == "eager" or plain.functorch or plain.inductor or plain.lora:
            return {}
        if plain.optimizer != "adamw":
            return {}
        with self.at("predicting"):
            subject = self.subject
            model, optimizer = subject.model, self.optimizer
            found = memrewrite.estimate(model, *subject.args, optimizer=optimizer, **subject.kwargs)
        program = found.rewritten if plain.ours else found.plain
        return {"predicted": {**vars(program), "peak": program.peak}}

    def train(self, lr: float, **facts: Any) -> dict[str, Any]:
        """See `training`, imported here because it needs more packages."""
        from memrewrite.bench.run.training import train

        def optimizer() -> Optimizer:
            asked, model = self.asked, self.subject.model
            made = optimizers.make(self.configuration, model, lr, asked.rank, asked.refresh)
            self.optimizer, self.steps = made, 0
            return made

        with self.at(f"training at lr {lr}, seed {facts['seed']}"):
            how = (optimizer, self.update, self.stopwatch)
            return train(self.asked, self.configuration, self.subject, *how, **facts)

    def stopwatch(self) -> meters.Stopwatch:
        """A running stopwatch."""
        return meters.Stopwatch(self.meter)

    def _due(self) -> bool:
        if self.configuration.pushed:
            return is_due(self.steps, self.asked.refresh)
        return self.configuration.projected and self.steps % self.asked.refresh == 0

    def update(self, drop: bool = True) -> None:
        """Run the optimizer's step; drop: free the gradients."""
        self.optimizer.step()
        if drop:
            self.optimizer.zero_grad()
        self.steps += 1

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.subject.model.parameters() if p.grad is not None]


def draws(model: nn.Module) -> bool:
    """Whether a model has active dropout."""
    return any(
        (isinstance(m, DROPOUTS) and m.p > 0) or getattr(m, "attention_dropout", 0)
        for m in model.modules()
    )


def compare(mine: list[Tensor], reference: str) -> dict[str, float | None]:
    """Cosine and relative error of all gradients, as one float64 vector; None if not finite."""
    theirs: list[Tensor] = torch.load(reference, weights_only=True, mmap=True)
    if [g.shape for g in mine] != [g.shape for g in theirs]:
        raise ValueError("its gradients have other shapes than the reference's")
    dot = norm = other = difference = 0.0
    for a, b in zip(mine, theirs, strict=True):
        x, y = a.detach().cpu().double(), b.cpu().double()
        dot, norm = dot + float((x * y).sum()), norm + float(x.square().sum())
        other += float(y.square().sum())
        difference += float((x - y).square().sum())
    if not math.isfinite(norm):
        return {"cosine": None, "relative_error": None}
    cosine = dot / (norm * other) ** 0.5 if norm and other else 0.0
    return {"cosine": cosine, "relative_error": (difference / other) ** 0.5 if other else 0.0}


def saved_bytes(subject: Subject) -> int:
    """Bytes that autograd saves in one forward, excluding parameters and buffers."""
    kept: dict[int, Any] = {}  # keeps storages alive, as a freed address could be reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = subject.loss()
    for tensor in chain(subject.model.parameters(), subject.model.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def failure(error: BaseException, stage: str) -> dict[str, Any]:
    """An exception as data."""
    text = str(error) or type(error).__name__
    out = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    out |= isinstance(error, RuntimeError) and any(words in text for words in OUT_OF_MEMORY)
    facts = {"stage": stage, "type": type(error).__name__, "message": text[:2000]}
    return {"error": {**facts, "out_of_memory": out}}


def main() -> None:
    """Answer requests until stdin ends; the model's output goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if Path.cwd().as_posix() not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    name, facts = json.loads(sys.stdin.readline())
    worker = Worker(parse(name), Request(**facts))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = failure(error, worker.stage)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
