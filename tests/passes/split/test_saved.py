"""What a forward saves, and who reads it."""

from __future__ import annotations

from graphs import Builder, forward

from passes.base import aten
from passes.split.saved import exclusive_inputs, kept_for_backward, readers


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
