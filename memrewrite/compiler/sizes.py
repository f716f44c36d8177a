"""Sizes of a graph's values, which are symbolic under dynamic shapes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import sympy
import torch
from torch.fx import Graph

from passes.base import arguments


def hint(size: Any) -> int:
    """A size at the shapes of the compile; installs no guard."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 0
    return int(size)


def settled(size: Any, known: Collection[str]) -> Any:
    """A size as an int, or as a formula in `known` symbols; other symbols take their value."""
    if isinstance(size, int):
        return size
    node = size.node
    env = node.shape_env
    table = getattr(env, "backed_var_to_val", None) or env.var_to_val  # its name before 2.13
    fixed = [s for s in node.expr.free_symbols if str(s) not in known and s in table]
    values = {s: table[s] for s in fixed}
    found = sympy.expand(node.expr.xreplace(values))
    return int(found) if found.is_Integer else found


def symbols(graph: Graph) -> dict[str, str]:
    """Symbol of each dynamic size -> the first "argument.dimension" that has it."""
    found: dict[str, str] = {}
    for position, node in sorted(arguments(graph).items()):
        for dim, length in enumerate(getattr(node.meta.get("val"), "shape", ())):
            if isinstance(length, torch.SymInt):
                found.setdefault(str(length), f"{position}.{dim}")
    return found
