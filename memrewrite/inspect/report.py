"""report(model): one row per weight that a matmul reads, and the total of saved bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

from tabulate import tabulate
from torch import nn

from memrewrite.compiler.liveness import dominates
from memrewrite.inspect.folding import Fold, folded, unfolded
from memrewrite.inspect.optimizer_report import (
    OptimizerRow,
    folded_optimizer,
    optimizer_rows,
    table,
)
from memrewrite.inspect.reasons import Reading, asked_of, readings_of, reason_of
from memrewrite.parallel.wrapped import inner
from memrewrite.record.decision import GraphRecord, RoundedRecord
from memrewrite.session.graph import Binding
from memrewrite.session.session import Session, known_session, parts_of
from memrewrite.sites.weights import Weight, candidates
from passes.joint.find import BATCHED

AnyRow = TypeVar("AnyRow", "Row", OptimizerRow)
NOTHING_YET = "nothing has been compiled yet: run one training step, then ask again"
INFERENCE_ONLY = "only inference graphs have been compiled yet: run one training step"


@dataclass(frozen=True)
class Row:
    """One weight. Bytes are of its saved input; see `report`."""

    name: str
    shape: tuple[int, ...]
    decision: Literal["compressed", "exact"]
    reason: str
    bytes_before: int  # saved by torch.compile's default partition
    bytes_after: int  # saved by ours


@dataclass(frozen=True)
class Report:
    """Printable as a table; `to_dict()` returns every weight as plain data.

    `str(report)` has one row for equal layers (`layers.*.mlp.down_proj x 8`, bytes
    summed), `full()` one for every weight.
    """

    sites: tuple[Row, ...]
    totals: dict[str, Any]
    status: str
    optimizer: tuple[OptimizerRow, ...] = ()
    optimizer_status: str = ""
    dominates: str = ""
    calls: tuple[int, int] = (0, 0)  # latest training calls: (eager ones, all)
    missed: str = ""

    def to_dict(self) -> dict[str, Any]:
        """{"sites": [...], "optimizer": [...], "totals": {...}}"""
        sites = [{**asdict(row), "shape": list(row.shape)} for row in self.sites]
        optimizer = [{**asdict(row), "shape": list(row.shape)} for row in self.optimizer]
        missed, calls = self.calls
        totals = {**self.totals, "dominates": self.dominates}
        totals |= {"recent_calls": calls, "missed_calls": missed}
        return {"sites": sites, "optimizer": optimizer, "totals": totals}

    def __str__(self) -> str:
        """Equal layers in one row; see `full`."""
        return self._text(folded(self.sites, _shown), folded_optimizer(self.optimizer))

    def full(self) -> str:
        """The same text with a row for every weight."""
        return self._text(unfolded(self.sites), unfolded(self.optimizer))

    def _text(self, sites: list[Fold[Row]], optimizer: list[Fold[OptimizerRow]]) -> str:
        header = ("weight", "shape", "decision", "bytes before", "bytes after", "reason")
        rows = [_line(fold) for fold in sites]
        # "0.10" is a name, not a number
        numbers: Any = [0] if rows else False
        text = tabulate(rows, header, tablefmt="simple", intfmt=",", disable_numparse=numbers)
        text += f"\n\n{self.status}"
        text += "".join(f"\n{line}" for line in (self.dominates, self.missed) if line)
        if optimizer:
            text += f"\n\n{table(optimizer)}\n\n{self.optimizer_status}"
        return text


def _shown(row: Row) -> tuple[Any, ...]:
    """The columns of a row other than name and reason."""
    return row.shape, row.decision, row.bytes_before, row.bytes_after


def _line(fold: Fold[Row]) -> tuple[Any, ...]:
    row = fold.first
    sizes = (fold.total(lambda r: r.bytes_before), fold.total(lambda r: r.bytes_after))
    return (fold.label, "x".join(map(str, row.shape)), row.decision, *sizes, fold.reason)


def report(model: nn.Module) -> Report:
    """What was rewritten in a model compiled by memrewrite, and why the rest was not.

    "after" is the exact number of bytes that the compiled forward saves for backward, at the
    shapes of the last compile, excluding parameters, buffers and vectors v. "before" is that of
    torch.compile's default partition of the same joint graph, before Inductor's simplifications,
    which may save a few constants less. An input that several weights share is counted at the
    first of them.
    `optimizer` has one row per trained parameter if a method changes gradients or moments; the
    bytes of state are predicted until an optimizer has stepped.
    `peak_bytes_before` and `peak_bytes_after` in the totals are predicted by the liveness of the
    largest graph: activations and gradients, excluding what is always live.
    If submodules, or a model inside a wrapper, were compiled separately, the rows are those of
    all, with their paths.
    Raises ValueError for a model of which memrewrite compiled nothing.
    """
    own = known_session(model)
    if own is not None:
        return report_of(own, inner(model))
    return _gathered([(path, report_of(s, s.model() or model)) for path, s in parts_of(model)])


def _gathered(reports: list[tuple[str, Report]]) -> Report:
    """One report of several submodules: the sums of bytes, and the largest peak."""
    totals = [part.totals for _, part in reports]
    peaks = {key: max(t[key] for t in totals) for key in totals[0] if key.startswith("peak_")}
    formulas = {
        key: " + ".join(filter(None, (t[key] for t in totals)))
        for key in totals[0]
        if key.startswith("formula_")
    }
    others = totals[0].keys() - peaks.keys() - formulas.keys()
    sums = {key: sum(t[key] for t in totals) for key in totals[0] if key in others}

    def lines(of: str) -> str:
        texts = ((path, getattr(part, of)) for path, part in reports)
        return "\n".join(f"{path}: {text}" for path, text in texts if text)

    return Report(
        tuple(_moved(row, path) for path, part in reports for row in part.sites),
        sums | peaks | formulas,
        lines("status"),
        tuple(_moved(row, path) for path, part in reports for row in part.optimizer),
        lines("optimizer_status"),
        lines("dominates"),
        max(part.calls for _, part in reports),
        lines("missed"),
    )


def _moved(row: AnyRow, path: str) -> AnyRow:
    return replace(row, name=f"{path}.{row.name}")


def report_of(session: Session, model: nn.Module) -> Report:
    """The report of one session; see `report`."""
    calls: dict[str, Any] = {"calls": session.calls.recent(), "missed": session.calls.line()}
    projected, projected_status = optimizer_rows(session, model)
    found = candidates(model)
    graphs = [b for b in session.bindings() if not b.variant.record.inference]
    if not graphs:
        status = INFERENCE_ONLY if session.graphs else NOTHING_YET
        rows = [_row(c, "exact", status, 0, 0) for c in found if c.kind != "raw"]
        totals = _totals([]) | _state_totals(projected)
        return Report(tuple(rows), totals, status, projected, projected_status, **calls)
    rows = list(_rows(session, found, readings_of(graphs)))
    totals = _totals(_latest(graphs)) | _state_totals(projected)
    owners = dominates(b.variant.record for b in graphs)
    status = _summary(totals, graphs)
    return Report(tuple(rows), totals, status, projected, projected_status, owners, **calls)


def _rows(
    session: Session, found: list[Weight], readings: dict[str, list[Reading]]
) -> Iterator[Row]:
    counted: set[tuple[int, int]] = set()
    asked = asked_of(session, found)
    known = {weight.parameter: weight.name for weight in reversed(found) if weight.name in readings}
    for weight in found:
        name = known.get(weight.parameter, weight.name)
        mine = readings.get(name, [])
        if weight.kind == "raw" and not any(f.entry or f.reason == BATCHED for f in mine):
            continue
        before = after = 0
        for reading in mine:
            key = (id(reading.graph), id(reading.entry))
            if reading.entry is not None and key not in counted:
                counted.add(key)
                before += reading.entry.before
                after += reading.entry.after
        compressed = any(f.entry is not None and f.weight in f.entry.weights for f in mine)
        reason = reason_of(session, weight, asked.get(weight.name), mine)
        if name != weight.name:
            reason = f"shares its weight with {name}, where it is counted"
        yield _row(weight, "compressed" if compressed else "exact", reason, before, after)


def _row(weight: Weight, decision: Any, reason: str, before: int, after: int) -> Row:
    return Row(weight.name, weight.shape, decision, reason, before, after)


def _latest(graphs: list[Binding]) -> list[GraphRecord]:
    """The last record of each captured graph: a recompile replaces the earlier one."""
    pieces: dict[frozenset[str], GraphRecord] = {}
    for graph in graphs:
        pieces[frozenset(graph.names.values())] = graph.variant.record
    return list(pieces.values())


def _totals(records: list[GraphRecord]) -> dict[str, Any]:
    return {
        "graphs": len(records),
        "saved_bytes_before": sum(r.kept_before for r in records),
        "saved_bytes_after": sum(r.kept_after for r in records),
        "absent_bytes": sum(sum(r.absent.values()) for r in records),
        "formula_before": " + ".join(r.formula_before for r in records),
        "formula_after": " + ".join(r.formula_after for r in records),
        "peak_bytes_before": _peak(records, "before"),
        "peak_bytes_after": _peak(records, "after"),
    }


def _peak(records: list[GraphRecord], when: str) -> int:
    return max((r.memory[when].peak_bytes for r in records if when in r.memory), default=0)


def _state_totals(rows: tuple[OptimizerRow, ...]) -> dict[str, int]:
    return {
        "state_bytes_before": sum(row.bytes_before for row in rows),
        "state_bytes_after": sum(row.bytes_after for row in rows),
    }


def _rounded(records: Sequence[RoundedRecord]) -> str:
    """A line on saved tensors in few bits, and one for each reason why others are exact."""
    if not records:
        return ""
    done = [one for one in records if one.bits is not None]
    before, after = (sum(getattr(one, when) for one in done) for when in ("before", "after"))
    counts = Counter(one.bits for one in done)
    bits = ", ".join(f"{n} in {b} bits" for b, n in sorted(counts.items(), key=str))
    line = f"\nrounded: {len(done)} saved tensors, {before:,} bytes -> {after:,} ({bits or 'none'})"
    reasons = Counter(one.reason for one in records if one.bits is None)
    exact = Counter[str]()
    for one in records:
        exact[one.reason] += one.before if one.bits is None else 0
    return line + "".join(f"\nexact: {n} of {exact[r]:,} bytes, as {r}" for r, n in reasons.items())


def _summary(totals: dict[str, Any], graphs: list[Binding]) -> str:
    before, after = totals["saved_bytes_before"], totals["saved_bytes_after"]
    line = (
        f"saved for backward, excluding parameters: {before:,} bytes by torch.compile's default, "
        f"{after:,} by memrewrite"
    )
    if before:
        line += f" ({after / before:.2f} x)"
    if totals["absent_bytes"]:
        line += (
            f"\nundefined gradients of outputs other than the loss are not materialized: "
            f"{totals['absent_bytes']:,} bytes of zeros"
        )
    variants = dict.fromkeys(graph.variant for graph in graphs)
    line += _rounded([one for v in variants for one in v.record.rounded])
    chunked = [v.chunked for v in variants if v.chunked and v.chunked.told]
    told = (f"\n{c.told}{' (in neither total)' if c.head else ''}" for c in chunked)
    line += "".join(dict.fromkeys(told))
    for variant in variants:
        line += "".join(f"\nlogits computed whole, as read by {where}" for where in variant.read)
    failures = [g.variant.record.failure for g in graphs if g.variant.record.failure]
    return line + "".join(f"\nREWRITE FAILED, exact graph kept: {f}" for f in failures)
