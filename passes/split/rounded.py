"""Save activations in few bits, as what reads them allows.   [approximate]

    before                                    after
    forward:  x, saved (..., D)               forward:  x --> round --> codes (..., D), scales
    backward: x --> readers                   backward: codes, scales --> restore --> x^ --> readers

Identity: none; x^ is x with each group of g channels rounded to 2^b - 1 levels of its largest
value; how many, `tolerance` tells by what reads it. The forward is exact. Booleans take one bit.
x^ is restored beside each reader, so that none is held. Source: group-wise rounding as in ActNN
(Chen et al. 2021, arXiv:2104.14129); the rule by readers: measured, docs/design.md.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes import chunked_loss
from passes.base import (
    OTHER_VALUES,
    StandsFor,
    arguments,
    backward_nodes,
    base_of,
    call,
    operand,
    reached_from,
    stands_for,
    storage_root,
    tensor_bytes,
)
from passes.emit import NONE, Decompositions, emit, provenance_of
from passes.split.groups import Groups, Packed
from passes.split.recompute import MATMULS
from passes.split.saved import kept_for_backward, readers
from passes.split.tolerance import Rounding, bits_of, compared

LEAST = 2**14  # numbers below which a tensor is not worth two kernels
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
UNCHECKED = "saved_tensor_with_no_vc_check"  # AOTAutograd's mark: such tensors are saved last
NOTES = ("desc", "output_stack_traces")  # in the meta of an output node, one for each output


@dataclass(frozen=True)
class Decision:
    """What was done with one saved tensor."""

    name: str
    bits: int | None
    reason: str  # why it is exact, or ""
    before: Any  # bytes, symbolic under dynamic shapes
    after: Any


def round_saved(
    forward: Graph,
    backward: Graph,
    outputs: int,
    how: Rounding,
    free: Collection[int],
    weights: Collection[int],
    table: Decompositions = NONE,
) -> list[Decision]:
    """Round what the forward saves, in place; returns what was done with each large tensor.

    weights: arguments. What depends on none of them is a mask, or positions, and stays exact.
    """
    kept = kept_for_backward(forward, outputs, free)
    returned: Any = forward.output_node().args[0]
    held = {storage_root(n) for n in returned[:outputs] if isinstance(n, Node)}
    places = {node.name: node for node in backward.find_nodes(op="placeholder")}
    dependent, found = backward_nodes(backward), []
    trained = reached_from(forward, (n for i, n in arguments(forward).items() if i in weights))
    for base, views in kept.views.items():
        value = base.meta["val"]
        small = isinstance(value.numel(), int) and value.numel() < LEAST
        mask = value.dtype == torch.bool
        taken = stands_for(base_of(views[0])) is not None
        if small or taken or not (mask or value.dtype in FLOATS):
            continue
        before = after = tensor_bytes(base)
        given = [places[view.name] for view in views]
        bits, reason = None, _why_exact(base, views, held)
        if not reason and base not in trained and not mask:
            reason = "no weight enters it"
        if not reason:
            bits, reason = (1, "") if mask else bits_of(base, given, how, dependent)
        if bits is not None:
            direct = [*readers(backward, given)]
            alone = all(r.target in MATMULS and r in dependent for r in direct) and how.random
            groups, width = _format(value, bits, how.group, alone, compared(given))
            if groups.bytes_of(width) < width * value.dtype.itemsize:
                after = _round(forward, base, views, given, how.name, groups, table)
            else:
                bits, reason = None, f"{bits} bits would take no fewer bytes"
        found.append(Decision(views[0].name, bits, reason, before, after))
    return found


def _why_exact(base: Node, views: tuple[Node, ...], held: Collection[Node]) -> str:
    """Why a saved storage stays exact, as far as the forward tells, or ""."""
    value = base.meta["val"]
    if base.op == "placeholder" or base in held:
        return "the caller holds it"
    if base.target is getitem and operand(base, 0).target is chunked_loss.op:
        return "it is a gradient"
    if any(_chain(view, base) is None for view in views):
        return "it is saved under views that another value decides"
    if (order := _order(value)) is None:
        return "it is not dense in memory"
    if not isinstance(value.shape[order[-1]], int):
        return "its last dimension is dynamic"
    return ""


def _format(
    value: Tensor, bits: int, size: int, random: bool, signs: bool
) -> tuple[Groups | Packed, int]:
    """The format of a tensor, and the width of its rows in memory."""
    order = _order(value) or ()
    width = value.shape[order[-1]]
    order = () if order == tuple(range(len(order))) else order
    if bits == 1:
        return Packed(order), width
    return Groups(bits, min(size, width + width % 2), random, order, signs), width


def _order(value: Tensor) -> tuple[int, ...] | None:
    """The dimensions in the order of memory; None if it has gaps or shares elements."""
    if value.is_contiguous():
        return tuple(range(value.ndim))
    if not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
        return None
    strides = value.stride()
    order = tuple(sorted(range(value.ndim), key=lambda i: -strides[i]))
    return order if value.permute(order).is_contiguous() else None


def _chain(view: Node, base: Node) -> list[Node] | None:
    """The views and slices from a storage to a view of it; None where they cannot be repeated."""
    found: list[Node] = []
    while view is not base:
        value = view.meta["val"]
        cast = isinstance(value, Tensor) and value.dtype != base.meta["val"].dtype
        if cast or view.target in OTHER_VALUES or len(view.all_input_nodes) != 1:
            return None
        found.append(view)
        view = operand(view, 0)
    return found[::-1]


def _round(
    forward: Graph,
    base: Node,
    views: Sequence[Node],
    places: Sequence[Node],
    name: str,
    groups: Groups | Packed,
    table: Decompositions,
) -> Any:
    """Save codes and scales of a storage in place of its views; returns their bytes."""
    mark, value = StandsFor(name, base.name), base.meta["val"]
    meta = {**provenance_of(base), "stands_for": mark}
    codes = emit([base], name, groups.write, (), table, meta)
    for node in codes:
        node.meta["stands_for"] = StandsFor(name, mark.storage, kept=True)
        if views[0].meta.get(UNCHECKED):
            node.meta[UNCHECKED] = True
    _return_instead(forward, views, codes)
    handed = [_handed(places[0], node) for node in codes]
    width = value.shape[(groups.order or (-1,))[-1]]
    read = partial(groups.read, width=width, dtype=value.dtype)
    for view, place in zip(views, places, strict=True):
        how = {**provenance_of(place), "stands_for": mark}
        for user in list(place.users):
            (x,) = emit(handed, name, read, (), table, how)
            for one in _chain(view, base) or ():
                x = call(user, one.target, x, *one.args[1:])
            user.replace_input_with(place, x)
        place.graph.erase_node(place)
    for node, source in zip(handed, codes, strict=True):
        node.name = source.name
    return sum(tensor_bytes(node) for node in codes)


def _return_instead(forward: Graph, views: Sequence[Node], codes: list[Node]) -> None:
    """Return codes where the first of the views is saved, and none of the others."""
    output = forward.output_node()
    returned: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    places = [len(returned) - 1 - returned[::-1].index(view) for view in views]
    lists = {"args": returned} | {k: list(output.meta[k]) for k in NOTES if k in output.meta}
    for key, entries in lists.items():
        new: list[Any] = codes if key == "args" else [None] * len(codes)
        kept = [[entry] for entry in entries]
        for place in places:
            kept[place] = new if place == places[0] else []
        entries[:] = [entry for part in kept for entry in part]
    output.args = (tuple(returned),)
    output.meta.update({k: v for k, v in lists.items() if k != "args"})


def _handed(place: Node, source: Node) -> Node:
    """A placeholder of backward for a node that the forward saves."""
    with place.graph.inserting_before(place):
        handed = place.graph.placeholder(f"{source.name}_handed")
    handed.meta = {**place.meta, **source.meta}
    return handed
