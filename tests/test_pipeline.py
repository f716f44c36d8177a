"""The loop that runs passes: it checks what they leave, and undoes what fails."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import joint_graph, show
from torch.fx import GraphModule

from memrewrite.pipeline import run
from passes.base import Pass


def graph() -> GraphModule:
    return joint_graph(lambda w, x: F.linear(x, w), [torch.randn(6, 8)], [torch.randn(5, 8)])


def test_steps_say_what_changed() -> None:
    def relu_twice(gm: GraphModule) -> None:
        output = gm.graph.output_node()
        (y, *rest) = output.args[0]
        with gm.graph.inserting_before(output):
            new = gm.graph.call_function(torch.ops.aten.relu.default, (y,))
        new.meta["val"] = y.meta["val"]
        output.args = ((new, *rest),)

    (step,) = run(graph(), [Pass("relu_twice", relu_twice, exact=False)])
    assert (step.name, step.exact, step.inserted, step.removed) == ("relu_twice", False, 1, 0)
    assert step.to_json()["seconds"] >= 0


def broken(kind: str) -> Pass:
    def rewrite(gm: GraphModule) -> None:
        output = gm.graph.output_node()
        (y, *rest) = output.args[0]
        with gm.graph.inserting_before(output):
            new = gm.graph.call_function(torch.ops.aten.t.default, (y,))
        if kind != "no value":
            new.meta["val"] = y.meta["val"].t()
        output.args = ((new, *rest),)
        if kind == "raises":
            raise RuntimeError("half-way")

    return Pass("broken", rewrite, exact=True)


@pytest.mark.parametrize("kind", ["raises", "shape", "no value"])
def test_a_failing_pass_leaves_the_graph_as_it_was(kind: str) -> None:
    gm = graph()
    before = show(gm)
    with pytest.raises((RuntimeError, AssertionError)):
        run(gm, [broken(kind)])
    assert show(gm) == before
    gm.graph.lint()
