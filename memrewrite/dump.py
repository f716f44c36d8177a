"""dump(model, directory): every graph, before and after each pass, as text and as data.

    DIR/dump.json                    everything below, for machines; and the report
    DIR/report.txt                   str(memrewrite.report(model))
    DIR/graph0/0-joint.txt           the joint graph as AOTAutograd traced it
    DIR/graph0/1-<pass>.txt, .diff   behind each pass, and what it changed
    DIR/graph0/forward.txt, backward.txt
    DIR/update0/0-captured.txt       torch's optimizer update of one kind of weight
    DIR/update0/1-<pass>.txt, .diff  ... and what was made of it
    DIR/update0/scalars.txt, body.txt, writes.txt

Graphs are numbered in the order in which they were compiled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from memrewrite.listing import changed, difference
from memrewrite.optimizer import updates_of
from memrewrite.report import INFERENCE_ONLY, NOTHING_YET, report
from memrewrite.state import Session, session_of

MARK = "dump.json"
Stages = list[tuple[str, str]]  # name, listing


def dump(model: nn.Module, directory: str | Path) -> Path:
    """Write every graph of a compiled model under `directory`; returns it.

    Works on a warm compile cache. A former dump there is overwritten. Raises ValueError
    for a model that memrewrite did not compile or that has not run yet, FileExistsError
    for a directory that holds anything else, and OSError where it cannot be written.
    """
    session = session_of(model)
    if not session.graphs:
        raise ValueError(NOTHING_YET)
    target = _prepared(Path(directory))
    record: dict[str, Any] = {"model": type(model).__name__, "graphs": [], "updates": []}
    for index, (names, graph) in enumerate(_graphs(session)):
        stages = graph.pop("stages")
        folder = target / f"graph{index}"
        record["graphs"].append({**graph, "modules": names, "stages": _write(folder, stages)})
    for index, update in enumerate(updates_of(session)):
        folder = target / f"update{index}"
        stages, kind = update.stages(), {k: str(v) for k, v in asdict(update.kind).items()}
        record["updates"].append({"kind": kind, "stages": _write(folder, stages)})
    told = report(model)
    (target / "report.txt").write_text(f"{told}\n")
    record["report"] = told.to_dict()
    (target / MARK).write_text(json.dumps(record, indent=1) + "\n")
    return target


def _prepared(target: Path) -> Path:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; name a directory for the dump")
    if target.is_dir() and any(target.iterdir()) and not (target / MARK).exists():
        raise FileExistsError(
            f"{target} is a directory that holds something else than a dump; name an empty one"
        )
    for old in sorted(target.glob("*/*.txt")) + sorted(target.glob("*/*.diff")):
        if old.parent.name.startswith(("graph", "update")):
            old.unlink()
    target.mkdir(parents=True, exist_ok=True)
    return target


def _graphs(session: Session) -> Iterator[tuple[list[str], dict[str, Any]]]:
    for graph in session.graphs:
        for variant in graph.variants.values():
            record = variant.record
            names = sorted(
                {
                    n
                    for b in graph.bindings.values()
                    if b.variant is variant
                    for n in b.names.values()
                }
            )
            yield (
                names,
                {
                    "training": not record.inference,
                    "note": INFERENCE_ONLY if record.inference else record.failure,
                    "passes": record.passes,
                    "inputs": [asdict(entry) for entry in record.inputs],
                    "kept": [asdict(entry) for entry in record.kept],
                    "stages": record.listings(),
                },
            )


def _write(folder: Path, stages: Stages) -> list[dict[str, Any]]:
    """A file per stage, a diff per pass; returns what each one inserted and removed."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index, (name, text) in enumerate(stages):
        halves = name in ("forward", "backward", "scalars", "body", "writes")
        stem = name if halves else f"{index}-{name}"
        (folder / f"{stem}.txt").write_text(text)
        row: dict[str, Any] = {"name": name, "file": f"{folder.name}/{stem}.txt"}
        if index and not halves:
            before, old = stages[index - 1]
            row["inserted"], row["removed"] = changed(old, text)
            (folder / f"{stem}.diff").write_text(difference(old, text, (before, name)))
            row["diff"] = f"{folder.name}/{stem}.diff"
        rows.append(row)
    return rows
