"""bench train: the validation loss of each configuration, from the same weights and data.

Every row is swept over the same learning rates with the first seed, and its best one is
repeated with the other seeds. A seed fixes initial weights and the order of the data for all
rows, so rows are compared seed by seed. Each row has one process: it compiles once, and each run
starts with new weights, moments, projectors and vectors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memrewrite.bench.configurations import Configuration, parse
from memrewrite.bench.document import Document
from memrewrite.bench.run.cost import CACHES, failing
from memrewrite.bench.run.forecast import forecast
from memrewrite.bench.run.meters import FREE_AT_ONCE
from memrewrite.bench.run.process import Child
from memrewrite.bench.run.subject import Request
from memrewrite.bench.show.summary import best_rate, summarise_training
from memrewrite.bench.tasks import task
from memrewrite.bench.tasks.text import VOCABULARIES
from memrewrite.predict import models


@dataclass
class Settings:
    """How much to train: a run per learning rate, and `seeds` runs at the best."""

    steps: int = 400
    seeds: int = 3
    lrs: Sequence[float] = (1e-3, 2e-3, 4e-3, 8e-3)
    data: Path = Path("out/text")
    timeout: float = 3600.0


def check(asked: Request) -> Request:
    """The request with its task. Raises ValueError for one that cannot be, before any process."""
    name = task.check(asked.task, asked.model, asked.layers)
    vocabulary = vocabulary_of(asked)
    if vocabulary and vocabulary not in VOCABULARIES:
        raise ValueError(
            f"{asked.model} with a vocabulary of {vocabulary:,}: bench train needs one from "
            f"{VOCABULARIES[0]:,} to {VOCABULARIES[-1]:,}; pass --vocab"
        )
    return replace(asked, task=None if name == task.TASKS[0] else name)


def vocabulary_of(asked: Request) -> int:
    """The number of tokens of the model; 0 for one of images."""
    model: Any = models.from_config(asked.model, asked.vocab, asked.layers)
    return int(getattr(model.config, "vocab_size", 0))


@dataclass
class Quality:
    """A training bench in progress; `show` and `tick` as in `cost.Cost`."""

    document: Document
    asked: Request
    configurations: Sequence[Configuration]
    settings: Settings
    show: Callable[[str], None]
    tick: Callable[[], None]
    forecast_said: bool = False

    def expected(self) -> int:
        """The number of runs that are missing."""
        each = len(self.settings.lrs) + self.settings.seeds - 1
        return sum(each - len(self.document.row(c)["runs"]) for c in self.configurations)

    def run(self) -> None:
        """Run all that remains; each result is saved at once."""
        self.document.order(self.configurations)
        name, asked = self.asked.task or task.TASKS[0], self.asked
        data = self.settings.data  # tokenised once, before any worker
        task.load(name, asked.model, vocabulary_of(asked), asked.seq or 0, data)
        with tempfile.TemporaryDirectory(prefix="memrewrite_bench_") as scratch:
            for configuration in self.configurations:
                row = self.document.row(configuration)
                row["skipped"] = _skipped(configuration)
                if row["skipped"] is None and not self._complete(row):
                    self._row(configuration, row, Path(scratch))

    def _complete(self, row: dict[str, Any]) -> bool:
        seeds = {run["seed"] for run in row["runs"] if run["lr"] == best_rate(row["runs"])}
        rates = {run["lr"] for run in row["runs"] if run["seed"] == 0}
        return len(seeds) >= self.settings.seeds and rates >= set(self.settings.lrs)

    def _row(self, configuration: Configuration, row: dict[str, Any], scratch: Path) -> None:
        name = configuration.name
        logs = self.document.path.parent / "logs"
        logs.mkdir(exist_ok=True)
        log, environment = logs / f"{name}.train.log", {CACHES: str(scratch / name)}
        with Child(configuration, self.asked, log, environment, self.settings.timeout) as child:
            self.show(f"{name}: compiling")
            first: dict[str, Any] = {"error": None}
            with failing(first):
                reference = self._reference(configuration, scratch)
                row["first"] = child.ask("start", data=self._data, reference=reference)
                self._forecast(row["first"]["first_step_s"], child.ask("step")["seconds"])
            if first["error"] is not None:
                self._keep(row, {"lr": None, "seed": 0, "loss": None, **first})
                return
            for lr in self.settings.lrs:
                self._one(child, row, lr, 0)
            best = best_rate(row["runs"])
            if best is not None:
                for seed in range(1, self.settings.seeds):
                    self._one(child, row, best, seed)
        if "memory" not in row:
            self._memory(configuration, row, log, environment | FREE_AT_ONCE)

    def _forecast(self, compile_s: float, step_s: float) -> None:
        """Print once what all that is missing will take."""
        if not self.forecast_said:
            self.forecast_said = True
            rows = sum(not self._complete(self.document.row(c)) for c in self.configurations)
            steps = max(0, self.expected()) * self.settings.steps
            print(forecast(2 * rows, compile_s, steps, step_s), flush=True)  # 2: memory's as well

    @property
    def _data(self) -> str:
        return str(self.settings.data.resolve())

    def _reference(self, configuration: Configuration, scratch: Path) -> str | None:
        """A file of the exact gradients of the first batch, made once per family of rows."""
        if configuration.frozen or configuration.exact or configuration.slowed:
            return None
        name = configuration.reference
        path = scratch / f"{name}.gradients"
        if not path.exists():
            self.show(f"reference gradients of {name}")
            log = self.document.path.parent / "logs" / f"{name}.reference.log"
            with Child(parse(name), self.asked, log, {}, self.settings.timeout) as child:
                child.ask("start", data=self._data, keep=str(path))
        return str(path)

    def _memory(
        self, configuration: Configuration, row: dict[str, Any], log: Path, environment: Any
    ) -> None:
        self.show(f"{configuration.name}: memory")
        row["failure"] = {"error": None}
        with Child(configuration, self.asked, log, environment, self.settings.timeout) as child:
            with failing(row["failure"]):
                child.ask("start", data=self._data)
                row["memory"] = child.ask("memory")
        self.document.save()

    def _one(self, child: Child, row: dict[str, Any], lr: float, seed: int) -> None:
        if any((run["lr"], run["seed"]) == (lr, seed) for run in row["runs"]):
            return
        self.show(f"{row['name']}: lr {lr:g}, seed {seed}")
        run: dict[str, Any] = {"lr": lr, "seed": seed, "loss": None, "error": None}
        with failing(run):
            how = {"steps": self.settings.steps, "data": self._data}
            run |= child.ask("train", lr=lr, seed=seed, **how)
        self._keep(row, run)

    def _keep(self, row: dict[str, Any], run: dict[str, Any]) -> None:
        row["runs"].append(run)
        summarise_training(self.document.data)
        self.document.save()
        self.tick()


def _skipped(configuration: Configuration) -> str | None:
    package = configuration.missing()
    return package and f"{package} is not installed; pip install 'memrewrite[bench]'"
