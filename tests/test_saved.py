"""What a forward saves, who reads it, and which matmuls are worth recomputing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from memrewrite.compiler.sizes import hint
from passes.base import aten, call
from passes.split.recompute import (
    choose_recomputes,
    freed_operations,
    operations,
    pushed_operations,
)
from passes.split.saved import exclusive_inputs, kept_for_backward, readers


class Builder:
    """A graph under construction, with values."""

    def __init__(self) -> None:
        self.graph, self.mode, self.count = Graph(), FakeTensorMode(), 0

    def place(self, name: str, *shape: int) -> Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = self.mode.from_tensor(torch.empty(*shape))
        node.meta["argument"] = self.count
        self.count += 1
        return node

    def op(self, target: Any, *args: Any) -> Node:
        return call(next(a for a in args if isinstance(a, Node)), target, *args)

    def returns(self, *nodes: Node) -> Graph:
        self.graph.output(tuple(nodes))
        self.graph.lint()
        return self.graph


def forward() -> tuple[Graph, dict[str, Node]]:
    b = Builder()
    w, x = b.place("w", 6, 8), b.place("x", 5, 8)
    h = b.op(aten.tanh.default, x)
    wt = b.op(aten.t.default, w)
    y = b.op(aten.mm.default, h, wt)
    view = b.op(aten.view.default, h, [40])
    graph = b.returns(y, h, view, wt, x, y)
    return graph, {"w": w, "x": x, "h": h, "wt": wt, "y": y, "view": view}


def test_views_are_counted_once_and_parameters_never() -> None:
    graph, node = forward()
    kept = kept_for_backward(graph, 1, free={0})
    assert kept.storages == (node["h"], node["x"], node["y"])
    assert kept.bytes == 4 * (40 + 40 + 30)
    assert kept.views[node["h"]] == (node["h"], node["view"])
    assert kept.named({"h", "tanh_default"}) is node["h"]
    assert kept.named({"nothing"}) is None
    assert kept_for_backward(graph, 1, free={0, 1}).bytes == 4 * (40 + 30)


def test_readers_look_through_views() -> None:
    b = Builder()
    h, dy = b.place("h", 5, 8), b.place("dy", 5, 8)
    flat = b.op(aten.view.default, h, [40])
    used = b.op(aten.mul.Tensor, flat, flat)
    graph = b.returns(used, b.op(aten.add.Tensor, h, dy))
    assert {n.target for n in readers(graph, [h])} == {aten.mul.Tensor, aten.add.Tensor}
    assert not list(readers(graph, []))


def test_inputs_that_only_z_needs() -> None:
    b = Builder()
    big, shared, dy = b.place("big", 5, 8), b.place("shared", 5, 8), b.place("dy", 5, 8)
    z = b.op(aten.sum.dim_IntList, b.op(aten.mul.Tensor, big, shared), [1])
    graph = b.returns(b.op(aten.mul.Tensor, dy, shared), b.op(aten.sin.default, z))
    assert exclusive_inputs(graph, z) == [big]


def recomputed(graph: Graph, budget: float, costly: tuple[Any, ...] = ()) -> list[str]:
    chosen = choose_recomputes(
        kept_for_backward(graph, 1, free={0}),
        graph.nodes,
        budget,
        is_free=lambda n: n.meta.get("argument") == 0,
        is_costly=lambda n: n.target in costly,
        hint=hint,
    )
    return [n.name for n in chosen]


def test_recomputes_stay_within_the_budget_and_need_no_other_matmul() -> None:
    b = Builder()
    w, x = b.place("w", 8, 8), b.place("x", 5, 8)
    h = b.op(aten.sin.default, x)
    cheap = b.op(aten.mm.default, h, w)  # 2 * 5 * 8 * 8 operations for 160 bytes
    deep = b.op(aten.mm.default, b.op(aten.cos.default, cheap), w)  # needs `cheap`, kept
    lost = b.op(aten.mm.default, b.op(aten.mm.default, deep, w), w)  # needs an unkept matmul
    graph = b.returns(lost, x, cheap, deep, lost)
    cost = 2 * 5 * 8 * 8
    assert operations(cheap) == cost
    assert recomputed(graph, cost - 1) == []
    assert recomputed(graph, cost) == [cheap.name]
    assert recomputed(graph, 10 * cost) == [cheap.name, deep.name]
    assert recomputed(graph, 10 * cost, costly=(aten.sin.default,)) == [deep.name]


def test_a_linear_is_recomputed_in_all_layers_or_in_none() -> None:
    b = Builder()
    w, x = b.place("w", 8, 8), b.place("x", 5, 8)
    ys = [b.op(aten.mm.default, b.op(aten.sin.default, x), w) for _ in range(3)]
    for layer, y in enumerate(ys):
        y.meta["nn_module_stack"] = {"": (f"L['self'].layers.{layer}.up_proj", None)}
    graph = b.returns(ys[0], x, *ys)
    cost = 3 * 2 * 5 * 8 * 8
    assert recomputed(graph, cost - 1) == []
    assert recomputed(graph, cost) == [y.name for y in ys]


def test_a_linear_that_is_saved_in_few_of_its_layers_is_not_recomputed_there() -> None:
    b = Builder()
    w, x = b.place("w", 8, 8), b.place("x", 5, 8)
    ys = [b.op(aten.mm.default, b.op(aten.sin.default, x), w) for _ in range(5)]
    for layer, y in enumerate(ys):
        y.meta["nn_module_stack"] = {"": (f"L['self'].layers.{layer}.o_proj", None)}
    graph = b.returns(ys[0], x, *ys[:2])
    assert recomputed(graph, 1e9) == []
    graph.output_node().args = ((ys[0], x, *ys[:3]),)
    assert recomputed(graph, 1e9) == [y.name for y in ys[:3]]


def test_an_explicit_checkpoint_policy_is_left_alone() -> None:
    graph, node = forward()
    assert recomputed(graph, 1e9) == [node["y"].name]
    node["y"].meta["recompute"] = "the user's"
    assert recomputed(graph, 1e9) == []


def test_freed_operations_count_the_narrower_matmul() -> None:
    from graphs import joint_graph

    from passes.joint.find import weight_gradients

    def fn(w: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x) @ w.t()

    gm = joint_graph(fn, [torch.randn(6, 20)], [torch.randn(2, 5, 20)])
    (gradient,) = weight_gradients(gm.graph, {0}).gradients
    assert freed_operations(gradient, 8) == 2 * 10 * 6 * (20 - 3)
    assert pushed_operations(gradient, 2) == 2 * 10 * (6 * 20 - 2 * (6 + 20))
    assert pushed_operations(gradient, 5) == 0
