"""bench train: the validation loss of each configuration, from the same weights and text.

Every row is swept over the same learning rates with the first seed, and its best one is
repeated with the other seeds. A seed fixes initial weights and the order of the data for all
rows, so rows are compared seed by seed. Each row has one process: it compiles once, and each run
starts with new weights, moments, projectors and vectors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memrewrite.bench.configurations import Configuration
from memrewrite.bench.document import Document
from memrewrite.bench.run.cost import CACHES, failing
from memrewrite.bench.run.meters import FREE_AT_ONCE
from memrewrite.bench.run.process import Child
from memrewrite.bench.run.subject import Request
from memrewrite.bench.run.text import VOCABULARIES, stdlib_ids
from memrewrite.bench.show.summary import best_rate, summarise_training
from memrewrite.predict import models


@dataclass
class Settings:
    """How much to train: a run per learning rate, and `seeds` runs at the best."""

    steps: int = 400
    seeds: int = 3
    lrs: Sequence[float] = (1e-3, 2e-3, 4e-3, 8e-3)
    data: Path = Path("out/text")
    timeout: float = 3600.0


def check(asked: Request) -> None:
    """Raise ValueError for a model that is not trained on text, before any process starts."""
    if ":" in asked.model:
        raise ValueError(
            f"{asked.model} brings its own inputs, and bench train reads text: give it a "
            f"config.json or one of {', '.join(models.LLAMA)}, gpt2-small"
        )
    model: Any = models.from_config(asked.model, layers=asked.layers)
    known = getattr(model.config, "vocab_size", None)
    if known is None:
        raise ValueError(f"{asked.model} is no language model, and bench train reads text")
    size = asked.vocab or known
    if size not in VOCABULARIES:
        raise ValueError(
            f"{asked.model} with a vocabulary of {size:,}: bench train needs one from "
            f"{VOCABULARIES[0]:,} to {VOCABULARIES[-1]:,}; pass --vocab"
        )


@dataclass
class Quality:
    """A training bench in progress; `show` and `tick` as in `cost.Cost`."""

    document: Document
    asked: Request
    configurations: Sequence[Configuration]
    settings: Settings
    show: Callable[[str], None]
    tick: Callable[[], None]

    def expected(self) -> int:
        """The number of runs that are missing."""
        each = len(self.settings.lrs) + self.settings.seeds - 1
        return sum(each - len(self.document.row(c)["runs"]) for c in self.configurations)

    def run(self) -> None:
        """Run all that remains; each result is saved at once."""
        self.document.order(self.configurations)
        stdlib_ids(self.settings.data, self.asked.vocab or 0)  # tokenise once, before any worker
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
                child.ask("start")
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

    def _memory(
        self, configuration: Configuration, row: dict[str, Any], log: Path, environment: Any
    ) -> None:
        self.show(f"{configuration.name}: memory")
        row["failure"] = {"error": None}
        with Child(configuration, self.asked, log, environment, self.settings.timeout) as child:
            with failing(row["failure"]):
                child.ask("start")
                row["memory"] = child.ask("memory")
        self.document.save()

    def _one(self, child: Child, row: dict[str, Any], lr: float, seed: int) -> None:
        if any((run["lr"], run["seed"]) == (lr, seed) for run in row["runs"]):
            return
        self.show(f"{row['name']}: lr {lr:g}, seed {seed}")
        run: dict[str, Any] = {"lr": lr, "seed": seed, "loss": None, "error": None}
        with failing(run):
            data = str(self.settings.data.resolve())
            run |= child.ask("train", lr=lr, seed=seed, steps=self.settings.steps, data=data)
        self._keep(row, run)

    def _keep(self, row: dict[str, Any], run: dict[str, Any]) -> None:
        row["runs"].append(run)
        summarise_training(self.document.data)
        self.document.save()
        self.tick()


def _skipped(configuration: Configuration) -> str | None:
    package = configuration.missing()
    if package is not None:
        return f"{package} is not installed; pip install 'memrewrite[bench]'"
    return "adapters are not trained by this bench" if configuration.lora else None
