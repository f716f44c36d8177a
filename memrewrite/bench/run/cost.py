"""The cost of each configuration: bytes, seconds, compile time, and the error of gradients.

Processes run in groups with one baseline each: they are started one after the other, then
run their steps in turn, so that a slow minute of the machine affects all of a group equally. The
ratio of a step is to the baseline's step of the same round. Memory is measured in separate
processes, whose allocator returns freed blocks at once. A repeat runs everything again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memrewrite.bench.configurations import Configuration, parse
from memrewrite.bench.document import Document
from memrewrite.bench.run import meters
from memrewrite.bench.run.forecast import forecast
from memrewrite.bench.run.process import Child, Failed
from memrewrite.bench.run.subject import Request
from memrewrite.bench.show.summary import summarise

WARM_UP = 2  # rounds that are not timed
MEMORY_STEPS = 4  # of the process that measures it
HEADROOM = 2  # a process is started if this many times the largest so far is available
DRAWS = "the model has dropout, and draws it anew under each compiler"
CACHES = "TORCHINDUCTOR_CACHE_DIR"
Show = Callable[[str], None]


@dataclass
class Settings:
    """How much to measure. together: processes at once, excluding the baseline."""

    repeats: int = 3
    rounds: int = 9
    together: int = 6
    timeout: float = 1800.0


@dataclass
class Cost:
    """A bench in progress. show: called with what is being done; tick: after each run."""

    document: Document
    asked: Request
    configurations: Sequence[Configuration]
    settings: Settings
    show: Show
    tick: Callable[[], None]
    largest: int = 0
    available: int | None = None
    forecast_said: bool = False
    scratch: Path = field(init=False)

    def remaining(self) -> list[tuple[int, Configuration]]:
        """(repeat, configuration) of all missing runs, the first repeat first."""
        pairs = []
        for repeat in range(self.settings.repeats):
            for configuration in self.configurations:
                row = self.document.row(configuration)
                row["skipped"] = row["skipped"] if row["runs"] else skipped(configuration)
                known = {run["repeat"] for run in row["runs"]}
                if row["skipped"] is None and repeat not in known:
                    pairs.append((repeat, configuration))
        return pairs

    def run(self) -> None:
        """Run all that remains; each result is saved at once."""
        self.document.order(self.configurations)
        with tempfile.TemporaryDirectory(prefix="memrewrite_bench_") as scratch:
            self.scratch = Path(scratch)
            todo = self.remaining()
            self._references({c for _, c in todo})
            for repeat in range(self.settings.repeats):
                for base in sorted({c.baseline for _, c in todo}, reverse=True):  # LoRA's, last
                    mine = [c for r, c in todo if r == repeat and c.baseline == base]
                    while mine:
                        taken = self._group(mine, repeat)
                        mine = [c for c in mine if c not in taken]

    def _references(self, configurations: set[Configuration]) -> None:
        """Compute gradients of the plain model, once per family, in separate processes."""
        for name in sorted({c.reference for c in configurations}):
            self.show(f"reference gradients of {name}")
            with self._child(parse(name), "reference") as child:
                try:
                    found = child.ask("start", keep=str(self._reference(name)))
                    reason = DRAWS if found["random"] else None
                except Failed as error:
                    reason = str(error)
            if reason is not None:
                self._reference(name).unlink(missing_ok=True)
                self.document.warn(f"no gradients of {name} to compare with: {reason}")

    def _reference(self, name: str) -> Path:
        return self.scratch / f"{name}.gradients"

    def _child(self, configuration: Configuration, purpose: str) -> Child:
        logs = self.document.path.parent / "logs"
        logs.mkdir(exist_ok=True)
        environment = {CACHES: str(self._cache(configuration))}
        if purpose == "memory":
            environment |= meters.FREE_AT_ONCE
        log = logs / f"{_plain(configuration)}.{purpose}.log"
        return Child(configuration, self.asked, log, environment, self.settings.timeout)

    def _cache(self, configuration: Configuration) -> Path:
        path = self.scratch / "caches" / _plain(configuration)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _group(self, waiting: Sequence[Configuration], repeat: int) -> set[Configuration]:
        """Run as many of those waiting as fit in memory; returns which were run."""
        base = parse(waiting[0].baseline)
        members = [base, *(c for c in waiting if c != base)]
        runs: dict[Configuration, dict[str, Any]] = {}
        with ExitStack() as stack:
            children: dict[Configuration, Child] = {}
            for configuration in members[: 1 + self.settings.together]:
                if children and not self._room():
                    break
                child = stack.enter_context(self._child(configuration, "time"))
                runs[configuration] = {"repeat": repeat, "error": None}
                if self._start(child, runs[configuration]):
                    children[configuration] = child
                    self._forecast(child, runs[configuration])
            self._rounds(children, runs, base)
        for configuration in waiting:
            if configuration in runs:
                if runs[configuration]["error"] is None:
                    self._memory(configuration, runs[configuration])
                self._learn(configuration, runs[configuration])
        return set(runs)

    def _forecast(self, child: Child, run: dict[str, Any]) -> None:
        """Print once what all that is missing will take."""
        if self.forecast_said:
            return
        self.forecast_said = True
        missing = len(self.remaining())
        with failing({}):
            step_s = child.ask("step")["seconds"]
            each = WARM_UP + self.settings.rounds + MEMORY_STEPS
            line = forecast(2 * missing, run["first_step_s"], missing * each, step_s)
            print(line, flush=True)

    def _room(self) -> bool:
        return self.available is None or self.available > HEADROOM * self.largest

    def _start(self, child: Child, run: dict[str, Any]) -> bool:
        name = child.configuration.name
        self.show(f"{name}: compiling")
        run["cold"] = not any(self._cache(child.configuration).iterdir())
        reference = self._reference(child.configuration.reference)
        with failing(run):
            run |= child.ask("start", reference=str(reference) if reference.exists() else None)
            self.largest = max(self.largest, run.pop("taken"))
            self.available = run.pop("available")
        if run["error"]:
            child.close()  # frees its memory for the others
        return run["error"] is None

    def _rounds(
        self,
        children: dict[Configuration, Child],
        runs: dict[Configuration, Any],
        base: Configuration,
    ) -> None:
        for run in runs.values():
            run |= {"step_s": [], "refresh_s": [], "ratios": [], "recompiles": 0}
        for number in range(WARM_UP + self.settings.rounds):
            self.show(f"steps of {len(children)} processes, round {number + 1}")
            timed: dict[Configuration, float] = {}
            for configuration, child in list(children.items()):
                run = runs[configuration]
                with failing(run):
                    found = child.ask("step")
                    run["recompiles"] = found["recompiles"]
                    if number >= WARM_UP:
                        run["refresh_s" if found["refresh"] else "step_s"].append(found["seconds"])
                        if not found["refresh"]:
                            timed[configuration] = found["seconds"]
                if run["error"]:
                    children.pop(configuration).close()
            for configuration, seconds in timed.items():
                if base in timed:
                    runs[configuration]["ratios"].append(seconds / timed[base])

    def _memory(self, configuration: Configuration, run: dict[str, Any]) -> None:
        self.show(f"{configuration.name}: memory")
        with self._child(configuration, "memory") as child, failing(run):
            child.ask("start")
            run["memory"] = child.ask("memory")
            if run["repeat"] == 0:
                self.show(f"{configuration.name}: predicting")
                run |= child.ask("predict")

    def _learn(self, configuration: Configuration, run: dict[str, Any]) -> None:
        self.document.row(configuration)["runs"].append(run)
        summarise(self.document.data["rows"])
        self.document.save()
        self.tick()


@contextmanager
def failing(run: dict[str, Any]) -> Iterator[None]:
    """Record a worker's failure in its run; the others continue."""
    try:
        yield
    except Failed as error:
        run["error"] = error.facts


def skipped(configuration: Configuration) -> str | None:
    """Why a configuration is skipped, or None."""
    package = configuration.missing()
    if package is not None:
        return f"{package} is not installed; pip install 'memrewrite[bench]'"
    if configuration.only_training:
        return "differs only in the loss: see `bench train`"
    return None


def _plain(configuration: Configuration) -> str:
    """Its name as a file name."""
    return configuration.name.replace("/", "_")
