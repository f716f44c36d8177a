"""Undefined tangents: materialize no zeros for outputs that are not differentiated.   [exact]

A graph that returns a loss and the logits has a tangent for both. loss.backward() leaves the
tangent of the logits undefined, and autograd materializes zeros of their size. Backward adds
these to the gradient that comes from the loss:

    before   g = x + t                          t: a tangent, zeros if it is undefined
    after    g = x; add_present(g, t)           does nothing where the storage of t is empty

Identity: x + 0 = x. The choice is made when backward runs, so that a loss on the logits
themselves is right too. x is overwritten only where nothing reads it afterwards (Inductor's
rule for operations in place; else it copies). The caller of backward passes `absent_like` in
place of zeros. Source: design.
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

LEAST = 1 << 20  # bytes: adding fewer zeros is cheaper than the call that may skip it
Size = Callable[[Any], int]


def skip_absent_gradients(hint: Size, least: int = LEAST) -> Pass:
    """Skip the addition of a tangent of at least `least` bytes where it is undefined."""

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
    """The tangents that may be passed with empty storage."""
    return [
        node
        for node in graph.find_nodes(op="placeholder")
        if node.users and all(adds_present(u) and u.kwargs["t"] is node for u in node.users)
    ]


def write_in_place(graph: Graph) -> None:
    """Run each addition on a copy of x, for backends that have no `auto_functionalized`."""
    for node in [node for node in graph.nodes if adds_present(node)]:
        copied = insert(node, aten.clone.default, node.kwargs["g"])
        insert(node, add_present, copied, node.kwargs["t"])
        for written in list(node.users):
            written.replace_all_uses_with(copied)
            graph.erase_node(written)
        graph.erase_node(node)


@functools.lru_cache(maxsize=64)
def absent_like(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor with empty storage that represents an undefined tangent (zeros).

    Cached, as it is never written, and creating it allocates its full size for a moment.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    tensor.untyped_storage().resize_(0)
    return tensor


def _sum(tangent: Node) -> Node | None:
    """x + t, where it is the only use of t, and x, t and the sum agree in shape and dtype."""
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
    if not _is_contiguous(tangent.meta["val"]):  # AOTAutograd would copy, so read, the empty one
        return None
    values = [n.meta["val"] for n in (user, *terms)]
    alike = {(str(v.shape), v.dtype, v.device) for v in values}
    return user if len(alike) == 1 else None


def _is_contiguous(value: Tensor) -> bool:
    """True for row-major strides; compares text, because comparing dynamic sizes would guard."""
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
