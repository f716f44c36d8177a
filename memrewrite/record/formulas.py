"""Bytes as ints, or as sympy formulas in the sizes of the inputs."""

from __future__ import annotations

from typing import Any

import sympy

from memrewrite.record.decision import GraphRecord

Bytes = Any  # an int; a sympy expression where sizes are dynamic


def read(formula: str, symbols: dict[str, Any]) -> Bytes:
    if formula.lstrip("-").isdigit():
        return int(formula)
    names = {old: symbol for old, (symbol, _) in symbols.items()}
    return sympy.expand(sympy.sympify(formula, locals=names))


def largest(values: list[Bytes]) -> Bytes:
    """The maximum over those formulas that no other formula dominates."""
    if all(isinstance(v, int) for v in values):
        return max(values)
    kept: list[Bytes] = []
    flat = [a for v in values for a in (v.args if isinstance(v, sympy.Max) else [v])]
    for value in dict.fromkeys(flat):
        if not any(_exceeds(other, value) for other in kept):
            kept = [other for other in kept if not _exceeds(value, other)] + [value]
    # unevaluated: sympy would try to prove each formula the largest
    return kept[0] if len(kept) == 1 else sympy.Max(*kept, evaluate=False)


def _exceeds(one: Bytes, other: Bytes) -> bool:
    difference = sympy.expand(one - other)
    return all(c >= 0 for c in difference.as_coefficients_dict().values())


def symbols_of(records: list[GraphRecord]) -> dict[str, tuple[sympy.Symbol, str]]:
    """Symbol -> its sympy symbol for users (B and S first, then n2, n3 ...) and its meaning."""
    found: dict[str, tuple[int, int]] = {}
    for record in records:
        for name, place in record.symbols.items():
            argument, dim = map(int, place.split("."))
            found[name] = min(found.get(name, (argument, dim)), (argument, dim))
    named: dict[str, tuple[sympy.Symbol, str]] = {}
    for index, (name, (_, dim)) in enumerate(sorted(found.items(), key=lambda item: item[1])):
        label = ("B", "S")[index] if index < 2 else f"n{index}"
        meaning = f"dimension {dim} of an input"
        named[name] = (sympy.Symbol(label, integer=True, positive=True), meaning)
    return named
