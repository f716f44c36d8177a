"""The results of a bench, saved after every measurement, so that none is lost."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import memrewrite
from memrewrite.bench.configurations import Configuration

FILE = "bench.json"
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "torchao",
    "bitsandbytes",
    "galore-torch",
    "apollo-torch",
)


class Document:
    """One JSON file: the request, the environment, and one row per configuration.

    Raises FileExistsError if there are results already and `resume` is False, ValueError if the
    results to resume are of another request, OSError where it cannot be written.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any], resume: bool) -> None:
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        asked = json.loads(json.dumps(dict(request)))
        self.data: dict[str, Any] = {"request": asked, "environment": {}, "rows": []}
        if self.path.exists():
            if not resume:
                raise FileExistsError(
                    f"{self.path} has results already; pass --resume to continue them, or "
                    "another --output"
                )
            self.data = load(self.path)
            _same(self.data["request"], asked, self.path)
            for row in self.data["rows"]:  # failed runs are repeated
                row["runs"] = [run for run in row["runs"] if run["error"] is None]
        here = environment(request.get("device", "cpu"))
        if self.data["environment"]:
            self.data.setdefault("resumed", []).append(here)
        else:
            self.data["environment"] = here
        self.save()

    def row(self, configuration: Configuration) -> dict[str, Any]:
        """The row of a configuration, created on first use."""
        for row in self.data["rows"]:
            if row["name"] == configuration.name:
                return row  # type: ignore[no-any-return]
        row = {
            "name": configuration.name,
            "configuration": asdict(configuration),
            "exact": configuration.exact,
            "ours": configuration.ours,
            "baseline": configuration.baseline,
            "skipped": None,
            "runs": [],
        }
        self.data["rows"].append(row)
        return row

    def order(self, configurations: Iterable[Configuration]) -> None:
        """Sort rows into the order of the request; others follow."""
        place = {c.name: i for i, c in enumerate(configurations)}
        self.data["rows"].sort(key=lambda row: place.get(row["name"], len(place)))

    def warn(self, message: str) -> None:
        """Add a warning, which is printed with the table."""
        known = self.data.setdefault("warnings", [])
        if message not in known:
            known.append(message)
        self.save()

    def save(self) -> None:
        """Write the file atomically."""
        partial = self.path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        partial.replace(self.path)


def load(path: Path) -> dict[str, Any]:
    """Read a file that a Document wrote. Raises ValueError for any other file."""
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not (isinstance(data, dict) and {"request", "rows"} <= data.keys()):
        raise ValueError(f"{path} was not written by a bench")
    return data


def title(data: Mapping[str, Any]) -> str:
    """One line: the measured step, the model, the size and the device."""
    asked = data["request"]
    what = "Training" if asked["kind"] == "train" else "A training step of"
    vocab = f", vocabulary {asked['vocab']}" if asked["vocab"] else ""
    layers = f", {asked['layers']} layers" if asked["layers"] else ""
    size = f"{asked['batch']} x {asked['seq']}" if asked["seq"] else f"{asked['batch']} images"
    where = data["environment"]["card"] or "CPU"
    rows = data.get("rows", [])
    lora = " under LoRA" if rows and all(r["configuration"]["lora"] for r in rows) else ""
    return f"{what} {asked['model']}{lora}{layers}{vocab}, {size}, {asked['dtype']}, {where}"


def _same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    def unlike(key: str) -> bool:  # a flag that an older file lacks was off
        return (before.get(key) or None) != (now.get(key) or None)

    differ = list(filter(unlike, {**before, **now}))
    if differ:
        both = ", ".join(f"{key} {before.get(key)!r} then, {now.get(key)!r} now" for key in differ)
        raise ValueError(f"{path} is of another request ({both}); choose another --output")


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions of packages."""
    cuda = device.startswith("cuda") and torch.cuda.is_available()
    return {
        "memrewrite": memrewrite.__version__,
        **{p: importlib.metadata.version(p) for p in PACKAGES if find_spec(p.replace("-", "_"))},
        "python": platform.python_version(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "card": torch.cuda.get_device_name(device) if cuda else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
