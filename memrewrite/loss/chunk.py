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
import passes.chunked_rows
from memrewrite.loss.find import Head, given_after, operands_of, options_of, value_of


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
    first = new[min((head.loss, *head.norms), key=[*gm.graph.nodes].index)]
    for node in given_after(head.loss, head.norms):  # views only
        first.prepend(new[node])
    with graph.inserting_before(first):
        values = _losses_of_rows if head.by_rows else _loss
        for old, value in values(graph, head, new, chunks, trained).items():
            value.meta["example_value"] = old.meta.get("example_value")
            new[old].replace_all_uses_with(value)
            graph.erase_node(new[old])
    lazy = _lazily(gm, head)
    if head.made:
        h = operands_of(head.linear)[0]
        graph.output_node().replace_input_with(new[head.made[-1]], new[h])
    for node in reversed(dict.fromkeys((*head.chain, *head.made))):
        graph.erase_node(new[node])
    graph.lint()
    return Chunked(GraphModule(gm, graph), lazy, head=head.weights)


def _rows(graph: Graph, head: Head, new: dict[Node, Node]) -> Node:
    """Those of h that the loss reads, (..., D)."""
    rows = new[operands_of(head.linear)[0]]
    for node in head.chain[1:]:
        if node.target is operator.getitem:  # a view and a copy do not change the order of rows
            rows = graph.call_function(operator.getitem, (rows, node.args[1]))
    return rows


def _operands(graph: Graph, head: Head, new: dict[Node, Node], rows: Node) -> list[Any]:
    """h, weight, bias and labels: (N, D), (V, D), (V,), (N,)."""
    _, w, bias = (n if n is None else new[n] for n in operands_of(head.linear))
    width = graph.call_method("size", (w, 1))
    flat = graph.call_method("reshape", (rows, -1, width))
    return [flat, w, bias, graph.call_method("reshape", (new[options_of(head.loss)["target"]], -1))]


def _loss(
    graph: Graph, head: Head, new: dict[Node, Node], chunks: int, trained: bool
) -> dict[Node, Node]:
    options = options_of(head.loss)
    how = options["ignore_index"], options["label_smoothing"], options["reduction"] == "mean"
    operands = _operands(graph, head, new, _rows(graph, head, new))
    given = (*operands, head.steps, head.upcast, *how)
    found = graph.call_function(
        passes.chunked_loss.op, (*given, chunks, trained, None, head.compute)
    )
    return {head.loss: graph.call_function(operator.getitem, (found, 0))}


def _losses_of_rows(
    graph: Graph, head: Head, new: dict[Node, Node], chunks: int, trained: bool
) -> dict[Node, Node]:
    options = options_of(head.loss)
    classes = None if options["weight"] is None else new[options["weight"]]
    rows, ignored = _rows(graph, head, new), options["ignore_index"]
    operands = _operands(graph, head, new, rows)
    given = (*operands, classes, head.steps, head.upcast, ignored, options["label_smoothing"])
    found = graph.call_function(passes.chunked_rows.op, (*given, chunks, trained, head.compute))
    loss, lse = (graph.call_function(operator.getitem, (found, i)) for i in range(2))
    if options["reduction"] != "none":
        loss = graph.call_method("sum", (loss,))
    if options["reduction"] == "mean":
        loss = graph.call_function(torch.div, (loss, _mass(graph, operands[3], ignored, classes)))
    norms = {n: _shaped(graph, lse, rows, value_of(n).ndim) for n in head.norms}
    return {head.loss: loss, **norms}


def _mass(graph: Graph, labels: Node, ignored: int, classes: Node | None) -> Node:
    """What a mean divides by: the number of labels that count, or the sum of their weights."""
    kept = graph.call_function(torch.ne, (labels, ignored))
    if classes is None:
        return graph.call_method("sum", (kept,))
    place = graph.call_function(torch.where, (kept, labels, 0))
    weights = graph.call_function(
        torch.mul, (graph.call_function(torch.take, (classes, place)), kept)
    )
    return graph.call_method("sum", (weights,))


def _shaped(graph: Graph, lse: Node, rows: Node, ndim: int) -> Node:
    sizes = [graph.call_method("size", (rows, i)) for i in range(ndim)] if ndim > 1 else [-1]
    return graph.call_method("reshape", (lse, *sizes))


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
