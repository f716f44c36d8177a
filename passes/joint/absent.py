"""Outputs that nobody differentiates: their gradients take no memory.

A graph that returns a loss and the logits behind it has an incoming gradient for both. Who
calls loss.backward() has none for the logits, and autograd then fills in zeros of their size.
Backward adds those to what comes from the loss:

    before   g = x + t                          t: an incoming gradient, zeros if there is none
    after    g = x; add_present(g, t)           does nothing where t comes without memory

Exact: x + 0 = x. Which of the two holds is decided when backward runs, so that a loss on the
logits themselves is served as well. x is written over only where nothing reads it afterwards
(Inductor's own rule for operations in place; else it copies). Backward's caller has to hand a
tensor without memory in place of zeros: `absent_like` makes one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from passes.base import IN_PLACE, Pass, adds_present, aten, insert, tensor_bytes
from passes.ops import add_present

LEAST = 1 << 20  # bytes: below it, zeros are cheaper than the call that may skip them
Size = Callable[[Any], int]


def skip_absent_gradients(hint: Size, least: int = LEAST) -> Pass:
    """Add an incoming gradient of at least that many bytes only if there is one."""

    def rewrite(gm: GraphModule) -> None:
        for tangent in gm.graph.find_nodes(op="placeholder"):
            total = _sum(tangent)
            if total is not None and hint(tensor_bytes(tangent)) >= least:
                _add_in_place(total, tangent)

    return Pass(
        name="skip_absent_gradients",
        rewrite=rewrite,
        exact=True,
        key=(least,),
        identity="x + 0 = x, where an output has no gradient",
    )


def absent_gradients(graph: Graph) -> list[Node]:
    """The incoming gradients that may come without memory."""
    return [
        node
        for node in graph.find_nodes(op="placeholder")
        if node.users and all(adds_present(u) and u.kwargs["t"] is node for u in node.users)
    ]


def write_in_place(graph: Graph) -> None:
    """The additions as operations on a copy of x: what runs op by op knows no other form."""
    for node in [node for node in graph.nodes if adds_present(node)]:
        copied = insert(node, aten.clone.default, node.kwargs["g"])
        insert(node, add_present, copied, node.kwargs["t"])
        for written in list(node.users):
            written.replace_all_uses_with(copied)
            graph.erase_node(written)
        graph.erase_node(node)


@functools.lru_cache(maxsize=64)
def absent_like(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of that shape without memory, which stands for zeros.

    The same one for the same question: nobody writes it, and making it takes memory for a moment.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    tensor.untyped_storage().resize_(0)
    return tensor


def _sum(tangent: Node) -> Node | None:
    """x + t, where that is all that t is used for, and both have the sum's shape and dtype."""
    users = list(tangent.users)
    if tangent.meta.get("output") is None or len(users) != 1:
        return None
    (user,) = users
    if user.target is not aten.add.Tensor or user.kwargs.get("alpha", 1) != 1:
        return None
    terms = [term for term in user.args if isinstance(term, Node)]
    others = [term for term in terms if term is not tangent]
    if len(terms) != 2 or len(others) != 1 or others[0].op == "placeholder":
        return None
    if not _is_contiguous(tangent.meta["val"]):  # what stands for it would be copied, and read
        return None
    values = [n.meta["val"] for n in (user, *terms)]
    alike = {(str(v.shape), v.dtype, v.device) for v in values}
    return user if len(alike) == 1 else None


def _is_contiguous(value: Tensor) -> bool:
    """Row by row, compared as text: a comparison of dynamic sizes would guard."""
    expected: Any = 1
    for length, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if str(stride) != str(expected):
            return False
        expected = expected * length
    return True


def _add_in_place(total: Node, tangent: Node) -> None:
    (x,) = (term for term in total.args if term is not tangent)
    done = insert(total, IN_PLACE, add_present, g=x, t=tangent)
    found = insert(total, getitem, done, 1)
    total.replace_all_uses_with(found)
    total.graph.erase_node(total)
