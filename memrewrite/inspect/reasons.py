"""The reason column of a report: what is saved for each weight, and why."""

from __future__ import annotations

from dataclasses import dataclass

from memrewrite.methods.method import Method
from memrewrite.record.decision import IN_CHUNKS, InputRecord
from memrewrite.session.graph import Binding
from memrewrite.session.session import Session
from memrewrite.sites.select import why_exact
from memrewrite.sites.weights import Weight


@dataclass(frozen=True)
class Reading:
    graph: Binding
    entry: InputRecord | None  # None: no gradient matmul was recognised
    reason: str
    weight: int


def readings_of(graphs: list[Binding]) -> dict[str, list[Reading]]:
    """Name -> its readings in the last graph that has it."""
    readings: dict[str, list[Reading]] = {}
    for graph in graphs:
        seen: dict[str, list[Reading]] = {}
        for entry in graph.variant.record.inputs:
            for weight in (*entry.weights, *entry.exact_weights):
                if weight in graph.names:
                    seen.setdefault(graph.names[weight], []).append(
                        Reading(graph, entry, "", weight)
                    )
        for weight, reason in graph.variant.record.refused.items():
            if weight in graph.names:
                seen.setdefault(graph.names[weight], []).append(
                    Reading(graph, None, reason, weight)
                )
        readings |= seen
    return readings


def asked_of(session: Session, found: list[Weight]) -> dict[str, Method]:
    """Name -> the first method that selects the weight."""
    asked: dict[str, Method] = {}
    for method in session.methods:
        if method.compresses:
            asked = dict.fromkeys(method.select(found), method) | asked
    return asked


def reason_of(session: Session, weight: Weight, method: Method | None, mine: list[Reading]) -> str:
    static = why_exact(weight) if method is None else method.why_not(weight)
    if static is not None:
        return static
    if not mine:
        return "not part of any compiled training graph"
    parts = dict.fromkeys(_one_reason(session, reading) for reading in mine)
    return "; ".join(parts)


def _one_reason(session: Session, reading: Reading) -> str:
    entry, names = reading.entry, reading.graph.names
    if entry is None:
        known = reading.reason == IN_CHUNKS
        return reading.reason if known else f"pattern not recognised: {reading.reason}"
    if reading.graph.variant.record.failure:
        return f"the rewrite failed and was undone ({reading.graph.variant.record.failure})"
    method = next(
        (m for m in session.methods if reading.weight in entry.compressed.get(m.name, ())), None
    )
    if method is None:
        left = entry.declined.get(reading.weight) or _not_selected(session)
        return f"{left}; {_of_exact(session, entry)}"
    by = " and ".join(_reader(reader, names) for reader in entry.kept_by) or "the caller"
    reason = _of_compressed(session, entry, method, by)
    others = [
        names.get(w, "?") for w in (*entry.weights, *entry.exact_weights) if w != reading.weight
    ]
    if others:
        reason += f" (x shared with {', '.join(others)})"
    leader = names.get(entry.compressed[method.name][0], "")
    for kept, state in session.kept:
        if kept is method and (sentence := state.sentence(leader)):
            reason += f"; {sentence}"
    if session.full is not None:
        reason += f"; its gradient and Adam state stay full-size: {session.full}"
    return reason


def _of_compressed(session: Session, entry: InputRecord, method: Method, by: str) -> str:
    """The reason for a weight that reads z in place of x."""
    gain = f"; {method.gain}" if method.gain else ""
    if entry.outcome == "kept":
        return f"x kept alive by {by}: frees no bytes{gain}"
    if entry.outcome == "recomputed":
        return f"x recomputed in backward, so nothing is saved{gain}"
    if entry.outcome == "chunked":
        return f"{IN_CHUNKS}{gain}"
    if method.name in entry.small_bytes:
        return f"{method.kept} saved in place of x"
    return f"{_small(session, entry)} of the weights that share it saved in place of x"


def _of_exact(session: Session, entry: InputRecord) -> str:
    """The reason for a weight that reads x itself."""
    if entry.outcome == "kept":
        return "x kept"
    if entry.outcome == "recomputed":
        return "x recomputed exactly in backward"
    if entry.outcome == "chunked":
        return IN_CHUNKS
    shared = " for the weights that share it" if entry.compressed else ""
    return f"x replaced by {_small(session, entry)}{shared}"


def _small(session: Session, entry: InputRecord) -> str:
    return " and ".join(m.kept for m in session.methods if m.name in entry.small_bytes)


def _not_selected(session: Session) -> str:
    methods = [method for method in session.methods if method.compresses]
    if not methods:
        return "no compression is asked for"
    sites = [getattr(getattr(m, "options", m), "sites", None) for m in methods]
    return " and ".join(
        f"not selected by sites={s!r}" if isinstance(s, str) else "not selected by sites"
        for s in sites
    )


def _reader(reader: str, names: dict[int, str]) -> str:
    if reader.startswith("weight:"):
        position = int(reader.removeprefix("weight:"))
        return f"the exact gradient of {names.get(position, 'another weight')}"
    return reader
