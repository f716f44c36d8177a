"""Which parameters of a test `make quick` runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def only(values: Iterable[Any], *quick: Any) -> list[Any]:
    """All of the values, as parameters of a test; those that are not named are slow."""
    values = list(values)
    assert all(any(value == other for other in values) for value in quick), quick
    return [value if _in(value, quick) else _slow(value) for value in values]


def _in(value: Any, quick: Collection[Any]) -> bool:
    return any(value is other or value == other for other in quick)


def _slow(value: Any) -> Any:
    parts = value if isinstance(value, tuple) else (value,)
    return pytest.param(*parts, marks=pytest.mark.slow)
