"""bench train: what each configuration makes of the same text, from the same start.

Every row is swept over the same learning rates with the first seed, and its best one is
repeated with the others. A seed fixes initial weights and the order of the data for all rows
alike, so rows are compared seed by seed. One process a row: it compiles once, and each run
starts from fresh weights, moments, projectors and vectors.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import memrewrite
from memrewrite import shapes
from memrewrite.bench import optimizers
from memrewrite.bench.configurations import BASELINE, Configuration
from memrewrite.bench.cost import CACHES, failing
from memrewrite.bench.document import Document
from memrewrite.bench.meters import FREE_AT_ONCE
from memrewrite.bench.process import Child
from memrewrite.bench.subject import Request
from memrewrite.bench.text import VOCABULARIES, batches, stdlib_ids

if TYPE_CHECKING:
    from memrewrite.bench.worker import Worker

# Of the steps: a linear rise of the learning rate, before its cosine. Short runs need a long one:
# with 0.05 the plain model ended 0.3 nats higher.
WARM_UP = 0.2
CLIP = 1.0
HELD_OUT = 16  # validation batches


@dataclass
class Settings:
    """What is trained: `seeds` runs at the best of `lrs`."""

    steps: int = 400
    seeds: int = 3
    lrs: Sequence[float] = (1e-3, 2e-3, 4e-3, 8e-3)
    data: Path = Path("out/text")
    timeout: float = 3600.0


# --- in the worker -------------------------------------------------------------------------


def train(worker: Worker, lr: float, seed: int, steps: int, data: str) -> dict[str, Any]:
    """One run. `loss` is the validation loss in nats per token, None where it is not finite."""
    asked, model = worker.asked, worker.subject.model
    _start_over(model, asked, seed)
    configuration = worker.configuration
    worker.optimizer = optimizers.make(configuration, model, lr, asked.rank, asked.refresh)
    worker.steps = 0
    scheduler = LambdaLR(worker.optimizer, lambda step: _schedule(step, steps))
    ids, held_out = stdlib_ids(Path(data), _vocabulary(model))
    losses: list[float] = []
    seconds: list[float] = []
    watch = worker.stopwatch()
    for batch in islice(batches(ids, asked.batch, asked.seq or 0, seed), steps):
        batch = batch.to(asked.device)  # (B, S)
        loss = worker.subject.loss(input_ids=batch, labels=batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        worker.update()
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
    """The weights of that seed, in the tensors that are compiled; no vectors."""
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
    """The plain model's, without dropout: every configuration is judged by the same arithmetic."""
    total = 0.0
    model.eval()
    with torch.no_grad():
        for batch in islice(batches(held_out, asked.batch, asked.seq or 0, 0), HELD_OUT):
            ids: Tensor = batch.to(asked.device)
            total += float(model.forward(input_ids=ids, labels=ids).loss)
    model.train()
    return total / HELD_OUT


# --- in the parent -------------------------------------------------------------------------


def check(asked: Request) -> None:
    """Raises ValueError for what is not trained on text, before any process is started."""
    if ":" in asked.model:
        raise ValueError(
            f"{asked.model} brings its own inputs, and bench train reads text: give it a "
            f"config.json or one of {', '.join(shapes.LLAMA)}, gpt2-small"
        )
    model: Any = shapes.from_config(asked.model, layers=asked.layers)
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
    """A training bench in progress; `tell` and `tick` as for `cost.Cost`."""

    document: Document
    asked: Request
    configurations: Sequence[Configuration]
    settings: Settings
    tell: Callable[[str], None]
    tick: Callable[[], None]

    def expected(self) -> int:
        """Runs that are still to be made."""
        each = len(self.settings.lrs) + self.settings.seeds - 1
        return sum(each - len(self.document.row(c)["runs"]) for c in self.configurations)

    def run(self) -> None:
        """All that remains. What is done is on disk whatever happens."""
        self.document.order(self.configurations)
        stdlib_ids(self.settings.data, self.asked.vocab or 0)  # tokenised once, before any worker
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
            self.tell(f"{name}: compiling")
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
        self.tell(f"{configuration.name}: memory")
        row["failure"] = {"error": None}
        with Child(configuration, self.asked, log, environment, self.settings.timeout) as child:
            with failing(row["failure"]):
                child.ask("start")
                row["memory"] = child.ask("memory")
        self.document.save()

    def _one(self, child: Child, row: dict[str, Any], lr: float, seed: int) -> None:
        if any((run["lr"], run["seed"]) == (lr, seed) for run in row["runs"]):
            return
        self.tell(f"{row['name']}: lr {lr:g}, seed {seed}")
        run: dict[str, Any] = {"lr": lr, "seed": seed, "loss": None, "error": None}
        with failing(run):
            data = str(self.settings.data.resolve())
            run |= child.ask("train", lr=lr, seed=seed, steps=self.settings.steps, data=data)
        self._keep(row, run)

    def _keep(self, row: dict[str, Any], run: dict[str, Any]) -> None:
        row["runs"].append(run)
        summarise(self.document.data)
        self.document.save()
        self.tick()


def best_rate(runs: Sequence[dict[str, Any]]) -> float | None:
    """Of the first seed's sweep; None where every run of it failed or diverged."""
    swept = [(run["loss"], run["lr"]) for run in runs if run["seed"] == 0 and run["loss"]]
    return min(swept)[1] if swept else None


def summarise(data: dict[str, Any]) -> None:
    """Write `row["summary"]` for all rows of a training document."""
    rows = {row["name"]: row for row in data["rows"]}
    tokens = data["request"]["batch"] * data["request"]["seq"]
    for row in rows.values():
        row["summary"] = _summary(row, tokens)
    base = _losses(rows[BASELINE]["runs"]) if BASELINE in rows else {}
    for row in rows.values():
        mine = _losses(row["runs"])
        pairs = [mine[seed] - base[seed] for seed in mine if seed in base]
        if pairs:
            row["summary"] |= {"delta": mean(pairs), "delta_spread": [min(pairs), max(pairs)]}


def _summary(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    found: dict[str, Any] = dict(row.get("memory", {}))
    losses = _losses(row["runs"])
    if not losses:
        return found
    rates = sorted({run["lr"] for run in row["runs"] if run["seed"] == 0 and run["lr"]})
    best = best_rate(row["runs"])
    steps = [run["step_s"] for run in row["runs"] if run["loss"]]
    values = list(losses.values())
    return found | {
        "lr": best,
        "at_edge": best in (rates[0], rates[-1]),
        "loss": mean(values),
        "loss_spread": [min(values), max(values)],
        "seeds": len(values),
        "tokens_per_s": tokens / median(steps),
    }


def _losses(runs: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Validation loss at the best learning rate, by seed."""
    best = best_rate(runs)
    return {run["seed"]: run["loss"] for run in runs if run["lr"] == best and run["loss"]}


def _skipped(configuration: Configuration) -> str | None:
    package = configuration.missing()
    if package is not None:
        return f"{package} is not installed; pip install 'memrewrite[bench]'"
    return "adapters are not trained by this bench" if configuration.lora else None


def main(words: list[str]) -> int:
    """`memrewrite bench train`."""
    from memrewrite.bench import cli

    parser = argparse.ArgumentParser(
        prog="memrewrite bench train",
        description="Validation loss of each way of training, from the same start on the same text "
        "(the standard library's source): the same learning rates and seeds for every row.",
    )
    cli.model_flags(parser, "llama-tiny", batch=8, seq=128, rank=32)
    cli.common_flags(parser, "train", Path("out/bench_train"))
    how = Settings()
    parser.add_argument("--steps", type=int, default=how.steps, help="%(default)s")
    parser.add_argument("--seeds", type=int, default=how.seeds, help="%(default)s")
    parser.add_argument("--lrs", default=",".join(f"{lr:g}" for lr in how.lrs), help="%(default)s")
    parser.add_argument("--refresh", type=int, default=100, help="steps between GaLore's")
    parser.add_argument("--data", type=Path, default=how.data, help="cache of tokenised text")
    parser.set_defaults(vocab=2048)
    return cli.training(parser.parse_args(words))
