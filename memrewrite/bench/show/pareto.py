"""The Pareto front of the rows of one bench: less memory and less time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """An exact rival, and the memrewrite rows that need no more memory and no more time.

    best: the fastest such row, or None. exact: the fastest such row with exact gradients, or None.
    """

    rival: Row
    best: Row | None
    exact: Row | None


def point(row: Row) -> tuple[float, float] | None:
    """(time, memory), as ratios to the baseline, or None."""
    found = row.get("summary", {})
    if "step_ratio" in found and "peak_ratio" in found:
        return found["step_ratio"], found["peak_ratio"]
    return None


def front(rows: Iterable[Row]) -> list[Row]:
    """The rows that no other one dominates, the fastest first."""
    placed = [(place, row) for row in rows if (place := point(row)) is not None]
    return [
        row
        for (time, memory), row in sorted(placed, key=lambda pair: pair[0])
        if not any(_beats(other, (time, memory)) for other, _ in placed)
    ]


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """One for each exact row that is not memrewrite's, excluding the baseline."""
    known = list(rows)
    found = []
    for rival in known:
        place = point(rival)
        if rival["ours"] or not rival["exact"] or place is None:
            continue
        if rival["name"] == rival["baseline"]:
            continue
        better = sorted(
            (other, row["name"], row)
            for row in known
            if row["ours"] and (other := point(row)) is not None and _as_good(other, place)
        )
        exact = [row for _, _, row in better if row["exact"]]
        ranked = [row for _, _, row in better]
        found.append(Verdict(rival, next(iter(ranked), None), next(iter(exact), None)))
    return found


def line_of(verdict: Verdict) -> str:
    """A verdict as one line of Markdown."""
    line = f"- **{verdict.rival['name']}** {_place(verdict.rival)}: "
    if verdict.best is None:
        return line + "no memrewrite configuration has as little memory in as little time."
    line += f"**{verdict.best['name']}** {_place(verdict.best)}"
    if verdict.best["exact"]:
        return line + ", exact as well."
    if verdict.exact is not None:
        return (
            line + f"; with exact gradients, **{verdict.exact['name']}** {_place(verdict.exact)}."
        )
    return line + ", with approximate gradients; none with exact ones."


def _place(row: Row) -> str:
    place = point(row)
    assert place is not None
    return f"(memory {place[1]:.2f}, time {place[0]:.2f})"


def _as_good(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1]


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return _as_good(one, other) and one != other
