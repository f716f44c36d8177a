"""The bits that the readers of a saved tensor allow.   (reads only)

The error of a rounded tensor passes on as its readers do:

    matmuls alone                    into weight gradients: b bits, rounded up or down at random,
                                     so that the mean of the gradients is exact
    products                         of the order of the error: b bits for a matmul's output, else 8
    pointwise operations, sums       (SiLU, GELU, norms) likewise: 8 bits
    attention, others                q and k are read beside their log-sum-exp, of which an error of
                                     e makes a factor of exp(e): 16 bits in float32, else exact;
                                     where b is 4, v and the output of attention, which is linear
                                     in them, 8
    exp(x - y)                       exact: logits, or scores, whose masks are infinities
    comparisons with 0               (ReLU) 8 bits: what is not 0 is not rounded to 0
    other comparisons                exact: a gradient may change to another branch

Booleans, such as the masks of a dropout, take one bit, exactly.

What backward recomputes from x^ passes the error on to its own readers, which count too; an
attention that it recomputes has the log-sum-exp of the rounded q and k.

Measured: docs/design.md.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch.fx import Node

from passes.base import CASTS, aten, base_of, operand
from passes.split.recompute import MATMULS
from passes.split.saved import readers

REDUCTIONS = {aten.sum.dim_IntList, aten.mean.dim, aten.sum.default, aten.mean.default}
WITH_ZERO = {"eq", "ne", "lt", "le", "gt", "ge"}
COMPARISONS = WITH_ZERO | {"sign", "floor", "ceil", "round", "trunc"}
MOVES = {  # their readers are those of their operands
    *("alias", "cat", "clone", "constant_pad_nd", "detach", "expand", "flip", "repeat", "roll"),
    *("select", "slice", "slice_scatter", "split", "split_with_sizes", "squeeze", "stack"),
    *("unbind", "unsqueeze"),
}


@dataclass(frozen=True)
class Rounding:
    """bits: 8 or 4. group: numbers that share a scale. random: of what weight gradients read."""

    bits: int = 8
    group: int = 32
    random: bool = True

    @property
    def name(self) -> str:
        return f"int{self.bits}"


def bits_of(
    base: Node, places: Sequence[Node], how: Rounding, dependent: Collection[Node]
) -> tuple[int | None, str]:
    """The bits that the readers of a saved storage allow; or None, and why it stays exact.

    dependent: the nodes of backward that depend on a tangent; the others are recomputations, which
    pass the error on to their readers.
    """
    bits, made = how.bits, base.target in MATMULS
    found = _reached(places, dependent)
    carriers = {*places, *(n for n in found if n not in dependent or _moves(n))}
    for reader in found:
        target: Any = reader.target
        name, read = _name(reader), _operands_of_attention(reader, carriers)
        if reader.op == "output":
            return None, "backward returns it"
        if name in WITH_ZERO and reader.args[1] == 0 and base_of(operand(reader, 0)) in places:
            bits = max(bits, 8)
            continue
        if name in COMPARISONS:
            return None, f"{name} compares it"
        saved = _operands_of_attention(reader, places)
        if any("logsumexp" in n or "mask" in n or "bias" in n for n in saved):
            return None, "it is a mask or a log-sum-exp"
        if _moves(reader):
            continue
        tags = getattr(target, "tags", ())
        smooth = torch.Tag.pointwise in tags or target in CASTS or target in REDUCTIONS
        softmax = name == "sub" and any(u.target is aten.exp.default for u in reader.users)
        direct = any(base_of(n) in places for n in reader.all_input_nodes)
        linear = bool(read) and read <= {"value", "out"} and (how.bits < 8 or not direct)
        if linear or _is_consistent(reader, dependent):
            bits = max(bits, 8)
        elif softmax:
            return None, "its exponential is read, and it may hold infinities"
        elif not (smooth or target in MATMULS):
            if base.meta["val"].dtype.itemsize < 4:
                return None, f"{name} reads it"
            bits = 16
        elif (name != "mul" or not made) if smooth else reader not in dependent:
            bits = max(bits, 8)
    return bits, ""


def _reached(places: Sequence[Node], dependent: Collection[Node]) -> list[Node]:
    """The readers of these placeholders, and those of what backward recomputes from them."""
    found: dict[Node, None] = {}
    stack = list(places)
    while stack:
        for reader in readers(places[0].graph, [stack.pop()]):
            if reader not in found:
                found[reader] = None
                if reader not in dependent or _moves(reader):
                    stack.append(reader)
    return list(found)


def _attention(reader: Node) -> dict[str, Any]:
    """Name -> argument of a call of an attention, or {}."""
    drawn = "run_with_rng_state" in str(reader.target)  # (rng state, operation, operands...)
    schema = getattr(reader.args[1] if drawn else reader.target, "_schema", None)
    if schema is None or "attention" not in schema.name:
        return {}
    given = reader.args[2:] if drawn else reader.args
    return dict(zip((argument.name for argument in schema.arguments), given, strict=False))


def _operands_of_attention(reader: Node, carriers: Collection[Node]) -> set[str]:
    """The names under which an attention's backward reads what has the error."""
    found = _attention(reader).items()
    return {n for n, value in found if isinstance(value, Node) and base_of(value) in carriers}


def _is_consistent(reader: Node, dependent: Collection[Node]) -> bool:
    """Whether it is an attention that backward recomputes, or its backward: then the log-sum-exp
    is that of the rounded q and k."""
    given = _attention(reader)
    lse = next((value for name, value in given.items() if "logsumexp" in name), None)
    if isinstance(lse, Node):
        return base_of(lse).op != "placeholder"
    return bool(given) and reader not in dependent


def compared(places: Sequence[Node]) -> bool:
    """Whether any reader compares these with 0."""
    return any(_name(r) in COMPARISONS for r in readers(places[0].graph, places))


def _name(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")


def _moves(node: Node) -> bool:
    return node.target is getitem or _name(node) in MOVES
