"""dump(model, directory): every graph, before and after each pass, as text, data and a page.

    DIR/index.html                   all of it in one page, readable offline
    DIR/dump.json                    everything except the listings, and the report, as data
    DIR/report.txt                   memrewrite.report(model).full()
    DIR/graph0/0-joint.txt           the joint graph as AOTAutograd traced it
    DIR/graph0/1-<pass>.txt, .diff   after each pass, and the difference to before
    DIR/graph0/forward.txt, backward.txt
    DIR/update0/0-captured.txt       torch's optimizer update of one kind of weight
    DIR/update0/1-<pass>.txt, .diff  ... after each pass
    DIR/update0/scalars.txt, body.txt, writes.txt

Graphs are numbered in the order in which they were compiled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memrewrite.inspect.page import page
from memrewrite.inspect.report import INFERENCE_ONLY, NOTHING_YET, report_of
from memrewrite.optim.hook import updates_of
from memrewrite.parallel.wrapped import inner
from memrewrite.record.listing import changed, described, difference
from memrewrite.session.graph import Variant
from memrewrite.session.session import Session, known_session, parts_of
from memrewrite.version import __version__

MARK = "dump.json"
RESULTS = ("forward", "backward", "scalars", "body", "writes")  # stages that follow the passes
Stages = list[tuple[str, str]]  # name, listing


def dump(model: nn.Module, directory: str | Path) -> Path:
    """Write every graph of a compiled model under `directory`; returns it.

    Also works where graphs come from the compile cache. Overwrites an earlier dump. If submodules
    were compiled separately, each has a subdirectory, named by its path. Raises ValueError for a
    model that memrewrite did not compile or that has not run yet, FileExistsError for a directory
    that has other files, and OSError where it cannot be written.
    """
    own = known_session(model)
    if own is not None:
        return dump_session(own, inner(model), Path(directory))
    parts = [(path, part) for path, part in parts_of(model) if part.graphs]
    if not parts:
        raise ValueError(NOTHING_YET)
    for path, part in parts:
        dump_session(part, part.model() or model, Path(directory) / path)
    return Path(directory)


def dump_session(session: Session, model: nn.Module, directory: Path) -> Path:
    """The dump of one session; see `dump`."""
    if not session.graphs:
        raise ValueError(NOTHING_YET)
    target = _prepared(directory)
    report = report_of(session, model)
    texts: dict[str, str] = {"report.txt": f"{report.full()}\n"}
    record: dict[str, Any] = {
        "memrewrite": __version__,
        "torch": torch.__version__,
        "model": type(model).__name__,
        "report": {**report.to_dict(), "status": report.status},
        "graphs": [],
        "updates": [],
    }
    for index, (names, variant) in enumerate(_variants(session)):
        stages = _stages(f"graph{index}", variant.record.listings(), texts)
        record["graphs"].append({**_graph(variant), "modules": names, "stages": stages})
    for index, update in enumerate(updates_of(session)):
        kind = {k: str(v) for k, v in vars(update.kind).items()}
        passes = [step.to_json() for step in update.steps]
        stages = _stages(f"update{index}", update.stages(), texts)
        record["updates"].append({"kind": kind, "passes": passes, "stages": stages})
    for name, text in texts.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(text)
    (target / MARK).write_text(json.dumps(record, indent=1) + "\n")
    (target / "index.html").write_text(page(record, texts))
    return target


def _prepared(target: Path) -> Path:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; name a directory for the dump")
    if target.is_dir() and any(target.iterdir()) and not (target / MARK).exists():
        raise FileExistsError(
            f"{target} is a directory that holds something other than a dump; name an empty one"
        )
    for old in sorted(target.glob("*/*.txt")) + sorted(target.glob("*/*.diff")):
        if old.parent.name.startswith(("graph", "update")):
            old.unlink()
    target.mkdir(parents=True, exist_ok=True)
    return target


def _variants(session: Session) -> Iterator[tuple[list[str], Variant]]:
    """Every compiled graph, with the names of the weights that it is called with."""
    for graph in session.graphs:
        for variant in graph.variants.values():
            mine = (b for b in graph.bindings.values() if b.variant is variant)
            yield sorted({name for b in mine for name in b.names.values()}), variant


def _graph(variant: Variant) -> dict[str, Any]:
    record = variant.record
    return {
        "training": not record.inference,
        "note": INFERENCE_ONLY if record.inference else record.failure,
        "passes": record.passes,
        "inputs": [asdict(entry) for entry in record.inputs],
        "kept": [asdict(entry) for entry in record.kept],
        "memory": {when: asdict(memory) for when, memory in record.memory.items()} or None,
    }


def _stages(folder: str, stages: Stages, texts: dict[str, str]) -> list[dict[str, Any]]:
    """Add a file per stage and a diff per pass to `texts`; returns data on each stage."""
    rows: list[dict[str, Any]] = []
    for index, (name, text) in enumerate(stages):
        stem = f"{folder}/{name}" if name in RESULTS else f"{folder}/{index}-{name}"
        texts[f"{stem}.txt"] = text
        row: dict[str, Any] = {"name": name, "file": f"{stem}.txt"}
        if index and name not in RESULTS:
            before, old = stages[index - 1]
            new, gone = changed(old, text)
            row["inserted"] = [described(*node) for node in new.items()]
            row["removed"] = [described(*node) for node in gone.items()]
            texts[f"{stem}.diff"] = difference(old, text, (before, name))
            row["diff"] = f"{stem}.diff"
        rows.append(row)
    return rows
