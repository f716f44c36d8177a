"""Rows of a training bench that should have equal losses: one method, small or full gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Row = Mapping[str, Any]
FORM = ("name", "dense", "pushed")  # what may differ within a pair


def lines_of(rows: Iterable[Row]) -> Iterator[str]:
    """One line per pair: the largest difference of runs with equal learning rate and seed."""
    known = list(rows)
    for i, one in enumerate(known):
        for other in known[i + 1 :]:
            if _form(one) == _form(other):
                line = _line(one, other)
                if line:
                    yield line


def _form(row: Row) -> dict[str, Any]:
    """The parts of a row that must be equal in a pair; None and False count as equal."""
    return {key: value or None for key, value in row["configuration"].items() if key not in FORM}


def _line(one: Row, other: Row) -> str | None:
    both = [
        (mine, theirs)
        for mine in one["runs"]
        for theirs in other["runs"]
        if (mine["lr"], mine["seed"]) == (theirs["lr"], theirs["seed"])
        and mine["loss"]
        and theirs["loss"]
    ]
    if not both:
        return None
    apart = max(
        abs(a - b)
        for mine, theirs in both
        for a, b in zip(mine["losses"], theirs["losses"], strict=True)
    )
    ends = [theirs["loss"] / mine["loss"] - 1 for mine, theirs in both]
    return (
        f"`{other['name']}` beside `{one['name']}`, {len(both)} runs with the same learning rate "
        f"and seed: training losses differ by {apart:.2g} nats at most, validation losses at the "
        f"end by {min(ends):+.2%} to {max(ends):+.2%}."
    )
