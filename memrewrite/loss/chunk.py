"""Let the loss of a captured graph run in chunks; see `passes.chunked_loss`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

import passes.chunked_loss
from memrewrite.loss.find import Head, operands_of, options_of, step_of, value_of


@dataclass
class Lazy:
    """How to rebuild a returned tensor of logits from the outputs and inputs of a graph."""

    output: int  # position among the outputs, where h takes the place of the logits
    inputs: list[int]  # positions of the weight and the bias among the inputs
    make: Callable[..., Tensor]
    dtype: torch.dtype


@dataclass
class Chunked:
    """A graph after the attempt to let its loss run in chunks."""

    gm: GraphModule
    lazy: Lazy | None = None  # of the logits that it returns
    told: str = ""  # what was done, or why not
    head: list[int] = field(default_factory=list)  # inputs whose gradients come with the loss


def chunk_loss(gm: GraphModule, head: Head, chunks: int, trained: bool) -> Chunked:
    """A copy of a captured graph whose loss runs in chunks; see `passes.chunked_loss`.

    chunks: how many, or 0 to choose them by their bytes; trained: whether the head is. Where
    the logits are returned, the copy returns the head's input in their place.
    """
    graph = Graph()
    new: dict[Node, Node] = {}
    graph.output(graph.graph_copy(gm.graph, new))
    graph.output_node().meta = dict(gm.graph.output_node().meta)
    h, w, bias = (n if n is None else new[n] for n in operands_of(head.linear))
    loss, options = new[head.loss], options_of(head.loss)
    assert h is not None and w is not None
    with graph.inserting_before(loss):
        rows = h
        for node in head.chain[1:]:
            if step_of(node) == "rows":
                rows = _on_rows(graph, node, rows)
        labels = new[options["target"]]
        width = graph.call_method("size", (w, 1))
        flat = graph.call_method("reshape", (rows, -1, width))
        marks = graph.call_method("reshape", (labels, -1))
        smoothing, ignored = options["label_smoothing"], options["ignore_index"]
        mean = options["reduction"] == "mean"
        args = (flat, w, bias, marks, head.steps, head.upcast, ignored, smoothing, mean)
        found = graph.call_function(
            passes.chunked_loss.op, (*args, chunks, trained, None, head.compute)
        )
        total = graph.call_function(operator.getitem, (found, 0))
        total.meta["example_value"] = head.loss.meta.get("example_value")
    loss.replace_all_uses_with(total)
    graph.erase_node(loss)
    lazy = _lazily(gm, head)
    if head.made:
        graph.output_node().replace_input_with(new[head.made[-1]], h)
    for node in reversed(dict.fromkeys((*head.chain, *head.made))):
        graph.erase_node(new[node])
    graph.lint()
    return Chunked(GraphModule(gm, graph), lazy, head=head.weights)


def _on_rows(graph: Graph, node: Node, rows: Node) -> Node:
    """The operation of `node` on the rows of h in place of the rows of the logits."""
    if node.target is operator.getitem:
        return graph.call_function(operator.getitem, (rows, node.args[1]))
    return rows  # flattened below; a view and a copy do not change the order of rows


def _lazily(gm: GraphModule, head: Head) -> Lazy | None:
    if not head.made:
        return None
    operands = [n for n in operands_of(head.linear) if n is not None]
    graph = Graph()
    known = {node: graph.placeholder(f"part{i}") for i, node in enumerate(operands)}
    for node in operands:  # as autocast did
        if value_of(node).dtype != head.compute:
            known[node] = graph.call_method("to", (known[node], head.compute))
    for node in head.made:
        known[node] = graph.node_copy(node, lambda n: known[n])
    returned = head.made[-1]
    graph.output(known[returned])
    outputs: Sequence[Any] = gm.graph.output_node().args[0]  # type: ignore[assignment]
    make = partial(_without_autocast, GraphModule(gm, graph))
    return Lazy(list(outputs).index(returned), head.weights, make, value_of(returned).dtype)


def _without_autocast(make: GraphModule, *parts: Tensor) -> Tensor:
    """The state of autocast where the logits are read is not that where they were made."""
    with torch.autocast(parts[0].device.type, enabled=False):
        return make(*parts)  # type: ignore[no-any-return]
