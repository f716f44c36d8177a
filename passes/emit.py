"""Trace a function of tensors, and insert the operations of the trace into a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from passes.base import PROVENANCE

Decompositions = Mapping[Any, Callable[..., Any]]
NONE: Decompositions = MappingProxyType({})


def emit(
    operands: Sequence[Node],
    who: str,
    function: Callable[..., Any],
    sizes: Sequence[int | Node] = (),
    decompositions: Decompositions = NONE,
    meta: Mapping[str, Any] = MappingProxyType({}),
) -> list[Node]:
    """The nodes of function(*operands[, sizes]), inserted right after the last operand.

    sizes: ints, or nodes under dynamic shapes. meta: copied to every new node.
    Raises TypeError, naming `who`, where tracing fails, and where the function writes to its
    operands, reads constant tensors, or returns anything but tensors.
    """
    read = [*operands, *(n for n in sizes if isinstance(n, Node))]
    try:
        traced = _traced(function, operands, sizes, decompositions)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        raise TypeError(f"{who} could not be traced on fake tensors: {failure}") from error
    place = dict(zip(traced.find_nodes(op="placeholder"), read, strict=True))
    after = max(read)
    while after.op == "placeholder" and after.next.op == "placeholder":
        after = after.next
    graph = after.graph
    for node in traced.nodes:
        if node.op in ("placeholder", "output"):
            continue
        _check(who, node)
        with graph.inserting_after(after):
            after = place[node] = graph.node_copy(node, lambda n: place[n])
        after.meta = {**meta, "val": node.meta["val"]}
    returned: Any = traced.output_node().args[0]
    found = returned if isinstance(returned, list | tuple) else [returned]
    if not found or not all(isinstance(n, Node) and _is_tensor(n) for n in found):
        raise TypeError(f"{who} returned {returned!r}, not a tensor or a list of tensors")
    return [place[n] for n in found]


def provenance_of(node: Node) -> dict[str, Any]:
    """The part of `node.meta` that a node computed in its place inherits."""
    return {key: node.meta[key] for key in PROVENANCE if key in node.meta}


def _traced(
    function: Callable[..., Any],
    operands: Sequence[Node],
    sizes: Sequence[int | Node],
    decompositions: Decompositions,
) -> Graph:
    """The graph of `function`, traced on the fake tensors of its operands."""
    count = len(operands)

    def flat(*values: Any) -> Any:
        given = iter(values[count:])
        lengths = [next(given) if isinstance(n, Node) else n for n in sizes]
        return function(*values[:count], *([lengths] if sizes else []))

    values = [n.meta["val"] for n in (*operands, *sizes) if isinstance(n, Node)]
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), nullcontext())
    with mode, torch.no_grad():
        traced: Graph = make_fx(flat, dict(decompositions))(*values).graph
    traced.eliminate_dead_code()
    return traced


def _check(who: str, node: Node) -> None:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function":
        raise TypeError(f"{who} reads a constant tensor: create it by torch.full or torch.arange")
    if schema is not None and schema.is_mutable:
        raise TypeError(f"{who} writes to its operands ({node.target})")


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
