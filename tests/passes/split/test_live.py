"""Liveness of one half of a split: which values have a buffer, and for how long."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from graphs import Builder
from hypothesis import given, settings
from torch.fx import Graph, Node

from memrewrite.compiler.sizes import hint
from passes.base import aten
from passes.split.live import Timeline, timeline

N, D = 64, 32  # rows, features: a buffer of N D floats is 8192 bytes
ROWS = 4 * N * D


def inputs(graph: Graph, kind: str = "saved") -> dict[Node, tuple[str, str]]:
    return {n: (n.name, kind) for n in graph.find_nodes(op="placeholder")}


def live(graph: Graph, kind: str = "saved") -> Timeline:
    return timeline(graph, inputs(graph, kind))  # type: ignore[arg-type]


def bytes_at(line: Timeline) -> dict[str, int]:
    nodes = line.nodes
    return {"start" if p < 0 else nodes[p].name: size for p, size in line.points(hint)}


def test_pointwise_work_between_two_matmuls_has_one_buffer() -> None:
    b = Builder()
    x, w = b.place("x", N, D), b.place("w", D, D)
    y = b.op(aten.mm.default, x, w)
    t = b.op(aten.tanh.default, b.op(aten.exp.default, b.op(aten.sin.default, y)))
    graph = b.returns(b.op(aten.mm.default, t, w))
    made = {buffer.node.name for buffer in live(graph).buffers}
    assert made == {"x", "w", "mm_default", "tanh_default", "mm_default_1"}


def test_a_dying_buffer_of_the_same_size_is_written_over_but_never_by_a_matmul() -> None:
    b = Builder()
    x, w = b.place("x", N, D), b.place("w", D, D)
    y = b.op(aten.mm.default, x, w)
    t = b.op(aten.tanh.default, y)
    graph = b.returns(b.op(aten.mm.default, t, w))
    sizes = bytes_at(live(graph))
    weight = 4 * D * D
    assert sizes["start"] == ROWS + weight
    assert sizes["mm_default"] == 2 * ROWS + weight  # x and y
    assert sizes["tanh_default"] == ROWS + weight  # over y; x is dead
    assert sizes["mm_default_1"] == 2 * ROWS + weight
    held = bytes_at(live(graph, "input"))  # the caller keeps x
    assert held["tanh_default"] == 2 * ROWS + weight


def zeros(b: Builder) -> Node:
    node = b.graph.call_function(aten.full.default, ([N, D], 0.0))
    with b.mode:
        node.meta["val"] = torch.zeros(N, D)
    return node


def test_a_scatter_into_a_constant_is_one_buffer() -> None:
    """The gradient of an embedding: zeros, into which rows are added."""
    b = Builder()
    rows, index = b.place("rows", D, D), b.place("index", D)
    index.meta["val"] = index.meta["val"].long()
    put = b.op(aten.index_put.default, zeros(b), [index], rows, True)
    made = {buffer.node.name for buffer in live(b.returns(put)).buffers}
    assert made == {"rows", "index", "index_put_default"}


def test_a_constant_that_a_matmul_reads_has_a_buffer() -> None:
    b = Builder()
    graph = b.returns(b.op(aten.mm.default, b.place("x", D, N), zeros(b)))
    assert "full_default" in {buffer.node.name for buffer in live(graph).buffers}


def test_what_the_caller_may_hold_is_not_written_over() -> None:
    b = Builder()
    dy = b.place("dy", N, D)
    graph = b.returns(b.op(aten.tanh.default, dy))
    for kind, size in {"saved": ROWS, "incoming": 2 * ROWS, "returned": 2 * ROWS}.items():
        assert bytes_at(live(graph, kind))["tanh_default"] == size, kind


def test_a_part_of_a_memory_is_no_memory() -> None:
    b = Builder()
    x, w = b.place("x", N, D), b.place("w", D, 3 * D)
    y = b.op(aten.mm.default, x, w)
    q = b.op(aten.slice.Tensor, y, 1, 0, D)
    graph = b.returns(b.op(aten.mm.default, b.op(aten.permute.default, q, [1, 0]), x))
    line = live(graph)
    (buffer,) = (one for one in line.buffers if one.node is y)
    assert hint(buffer.bytes) == 3 * ROWS
    assert buffer.stop == line.nodes.index(graph.output_node()) - 1
    assert q not in {one.node for one in line.buffers}


def test_a_sum_read_on_the_far_side_of_a_matmul_is_kept_when_it_reads_many() -> None:
    def graph(terms: int) -> tuple[Graph, Node]:
        b = Builder()
        places = [b.place(f"x{i}", N, D) for i in range(terms)]
        w = b.place("w", D, D)
        total = places[0]
        for place in places[1:]:
            total = b.op(aten.add.Tensor, total, place)
        y = b.op(aten.mm.default, b.op(aten.tanh.default, total), w)
        return b.returns(b.op(aten.add.Tensor, total, y)), total

    for terms, kept in {4: False, 5: True}.items():
        made, total = graph(terms)
        assert (total in {one.node for one in live(made).buffers}) == kept, terms


def test_two_views_of_one_saved_memory_are_counted_once() -> None:
    b = Builder()
    one, two = b.place("one", N, D), b.place("two", N, D)
    graph = b.returns(b.op(aten.mm.default, b.op(aten.t.default, one), two))
    line = timeline(graph, {one: ("same", "saved"), two: ("same", "saved")})
    assert bytes_at(line)["start"] == ROWS


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["mm", "tanh", "add", "sum"]), min_size=1, max_size=12))
def test_the_points_are_the_sums_of_what_lives(kinds: list[str]) -> None:
    b = Builder()
    x, w = b.place("x", N, D), b.place("w", D, D)
    values = [x]
    for kind in kinds:
        last = values[-1]
        if kind == "mm":
            values.append(b.op(aten.mm.default, last, w))
        elif kind == "tanh":
            values.append(b.op(aten.tanh.default, last))
        elif kind == "add":
            values.append(b.op(aten.add.Tensor, last, values[len(values) // 2]))
        else:
            total = b.op(aten.sum.dim_IntList, last, [1], True)
            values.append(b.op(aten.mul.Tensor, last, total))
    graph = b.returns(values[-1], values[len(values) // 2])
    line = live(graph)
    for position, size in line.points(hint):
        assert size == sum(hint(buffer.bytes) for buffer in line.at(position))
    last = len(line.nodes) - 1
    outputs = {values[-1], values[len(values) // 2]} - {x}
    kept = {one.node for one in line.buffers if one.stop == last and one.kind == "output"}
    assert kept == outputs


def test_dynamic_sizes_stay_formulas() -> None:
    from graphs import joint_graph

    gm = joint_graph(
        lambda w, x: torch.tanh(x) @ w, [torch.randn(D, D)], [torch.randn(N, D)], dynamic=True
    )
    places = gm.graph.find_nodes(op="placeholder")
    line = timeline(gm.graph, {place: (place.name, "saved") for place in places})
    assert any("s" in str(buffer.bytes) for buffer in line.buffers)
    assert max(size for _, size in line.points(hint)) > 0
