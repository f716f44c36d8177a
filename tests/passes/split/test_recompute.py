"""Which matmuls are worth recomputing."""

from __future__ import annotations

from typing import Any

import torch
from graphs import Builder, forward
from torch import Tensor
from torch.fx import Graph

from memrewrite.compiler.sizes import hint
from passes import chunked_loss
from passes.base import aten
from passes.split.recompute import (
    all_operations,
    choose_recomputes,
    freed_operations,
    operations,
    pushed_operations,
)
from passes.split.saved import kept_for_backward


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


def test_all_operations_are_those_of_matmuls_and_of_a_loss_in_chunks() -> None:
    b = Builder()
    w, x = b.place("w", 9, 8), b.place("x", 5, 8)
    h = b.op(aten.mm.default, x, b.place("u", 8, 8))
    graph = b.returns(h, h)
    assert all_operations(graph) == 2 * 5 * 8 * 8
    with graph.inserting_before(graph.output_node()):
        rest = [], True, -100, 0.0, True, 2, True, None, torch.float32
        graph.call_function(chunked_loss.op, (h, w, None, x, *rest))
    assert all_operations(graph) == 2 * 5 * 8 * 8 + 3 * 2 * 5 * 9 * 8
