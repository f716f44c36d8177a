"""Equal layers as one row of a table: `model.layers.*.mlp.down_proj x 8`."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

NAME = re.compile(r"\w+(?:\.\w+)+")  # dotted, in a sentence


class Named(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def reason(self) -> str: ...


R = TypeVar("R", bound=Named)


@dataclass(frozen=True)
class Fold(Generic[R]):
    """Rows shown as one line. In name and reason, `*` replaces the index that differs."""

    name: str
    reason: str
    rows: tuple[R, ...]

    @property
    def label(self) -> str:
        return f"{self.name} x {len(self.rows)}" if len(self.rows) > 1 else self.name

    @property
    def first(self) -> R:
        return self.rows[0]

    def total(self, size: Callable[[R], int]) -> int:
        return sum(map(size, self.rows))


def unfolded(rows: Sequence[R]) -> list[Fold[R]]:
    """One fold per row."""
    return [Fold(row.name, row.reason, (row,)) for row in rows]


def folded(rows: Sequence[R], shown: Callable[[R], Hashable]) -> list[Fold[R]]:
    """Fold rows whose names differ only in one index into one line, in place of the first row.

    shown: the other columns of a row, which must be equal too. Names of the same layer in a
    reason are also folded. Of several indices in a name (`layers.0.experts.3.up`), the outermost
    that folds any rows is taken.
    """
    names = frozenset(row.name for row in rows)
    lines: dict[int, Fold[R]] = {}  # by the place of their first row
    left = list(range(len(rows)))
    for depth in range(max((len(_indices(name)) for name in names), default=0)):
        groups: dict[Hashable, list[int]] = {}
        for i in left:
            if depth < len(_indices(rows[i].name)):
                starred = _starred(rows[i], depth, names)
                groups.setdefault((starred, shown(rows[i])), []).append(i)
        several = [members for members in groups.values() if len(members) > 1]
        for first, *others in several:
            found = tuple(rows[i] for i in (first, *others))
            lines[first] = Fold(*_starred(rows[first], depth, names), found)
        taken = {i for members in several for i in members}
        left = [i for i in left if i not in taken]
    lines |= {i: Fold(rows[i].name, rows[i].reason, (rows[i],)) for i in left}
    return [lines[i] for i in sorted(lines)]


def _indices(name: str) -> list[int]:
    """Positions of the numbers in a dotted name."""
    return [i for i, part in enumerate(name.split(".")) if part.isdecimal()]


def _starred(row: Named, depth: int, names: Container[str]) -> tuple[str, str]:
    """(name, reason) with `*` for the index at that depth, in the reason's names likewise."""
    at = _indices(row.name)[depth]
    layer = row.name.split(".")[: at + 1]

    def star(name: str) -> str:
        parts = name.split(".")
        return ".".join([*layer[:-1], "*", *parts[at + 1 :]])

    def found(match: re.Match[str]) -> str:
        name = match.group()
        same = name in names and name.split(".")[: at + 1] == layer
        return star(name) if same else name

    return star(row.name), NAME.sub(found, row.reason)
