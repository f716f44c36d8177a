"""Recomputations run when their reader's turn comes: the same values, another order."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from graphs import Builder, show
from hypothesis import given, settings
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from passes.base import aten
from passes.split.late import recompute_late


class Appender(Builder):
    """Operations stand in the order in which they are asked for."""

    def op(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
        with self.mode:
            node.meta["val"] = target(*values)
        return node


def started(*names: str) -> tuple[Appender, dict[str, Node]]:
    """A backward graph with one incoming gradient, dy."""
    b = Appender()
    places = {name: b.place(name, 5, 8) for name in (*names, "dy")}
    places["dy"].meta["tangent"] = True
    return b, places


def halves(layers: int) -> Graph:
    """d_i = d_{i+1} * sin(cos(x_i)) from the last layer to the first; all recomputed up front."""
    b, at = started(*(f"x{i}" for i in range(layers)))
    again = [b.op(aten.sin.default, b.op(aten.cos.default, at[f"x{i}"])) for i in range(layers)]
    grad, grads = at["dy"], []
    for value in reversed(again):
        grad = b.op(aten.mul.Tensor, grad, value)
        grads.append(grad)
    return b.returns(*grads)


def run(graph: Graph, *args: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(Interpreter(GraphModule(torch.nn.Module(), graph)).run(*args))


def test_the_order_as_printed() -> None:
    graph = halves(2)
    assert recompute_late(graph) == ["cos_default", "sin_default"]  # x1 is read first
    assert show(GraphModule(torch.nn.Module(), graph)) == (
        "cos_default_1: [5, 8] = cos.default(x1)\n"
        "sin_default_1: [5, 8] = sin.default(cos_default_1)\n"
        "mul_tensor: [5, 8] = mul.Tensor(dy, sin_default_1)\n"
        "cos_default: [5, 8] = cos.default(x0)\n"
        "sin_default: [5, 8] = sin.default(cos_default)\n"
        "mul_tensor_1: [5, 8] = mul.Tensor(mul_tensor, sin_default)\n"
        "return (mul_tensor, mul_tensor_1)"
    )


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_graph_computes_what_it_computed(data: st.DataObject) -> None:
    b, at = started("x", "y")
    values = list(at.values())
    for _ in range(data.draw(st.integers(1, 12))):
        one, two = (data.draw(st.sampled_from(values)) for _ in range(2))
        target = data.draw(st.sampled_from((aten.mul.Tensor, aten.sub.Tensor, aten.cos.default)))
        values.append(b.op(target, *((one,) if target is aten.cos.default else (one, two))))
    graph = b.returns(*data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=3)))
    inputs = [torch.randn(5, 8, dtype=torch.float64) for _ in at]
    expected = run(graph, *inputs)
    recompute_late(graph)
    graph.lint()
    for found, value in zip(run(graph, *inputs), expected, strict=True):
        assert torch.equal(found, value)
    assert recompute_late(graph) == []
    order = {node: index for index, node in enumerate(graph.nodes)}
    behind = {node for node in graph.nodes if node is at["dy"]}
    for node in graph.nodes:
        behind |= {node} & {user for other in behind for user in other.users}
    for node in graph.nodes:  # nothing of backward runs between a recomputation and its reader
        if node.op == "call_function" and node not in behind and node.users:
            reader = min(node.users, key=lambda user: order[user])
            between = list(graph.nodes)[order[node] + 1 : order[reader]]
            assert not behind.intersection(between)


def near_misses() -> dict[str, Graph]:
    graphs = {}
    b, at = started("x")
    drawn = b.op(aten.bernoulli.default, at["x"])  # another place in the order draws others
    d = b.op(aten.cos.default, at["dy"])
    graphs["random"] = b.returns(d, b.op(aten.mul.Tensor, d, drawn))
    b, at = started("x")
    read = b.op(aten.cos.default, at["x"])
    written = b.op(aten.copy_.default, at["x"], at["dy"])  # x is another value after this
    graphs["written"] = b.returns(b.op(aten.mul.Tensor, written, read))
    b, at = started("x")
    returned = b.op(aten.cos.default, at["x"])  # read by the output alone
    graphs["late already"] = b.returns(returned)
    return graphs


def test_silent_on_near_misses() -> None:
    for name, graph in near_misses().items():
        printed = str(graph)
        assert recompute_late(graph) == [], name
        assert str(graph) == printed
