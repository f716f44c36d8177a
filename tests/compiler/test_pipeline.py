"""The loop that runs passes: it checks what they leave, and undoes what fails."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from graphs import joint_graph, show
from torch.fx import GraphModule

from memrewrite.compiler.pipeline import run
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


def test_a_step_takes_as_long_as_its_own_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def waits(seconds: float) -> Pass:
        def rewrite(gm: GraphModule) -> None:
            now[0] += seconds

        return Pass(f"waits_{seconds}", rewrite, exact=True)

    steps = run(graph(), [waits(2.5), waits(0.5)])
    assert [step.to_json()["seconds"] for step in steps] == [2.5, 0.5]


def broken(kind: str) -> Pass:
    def rewrite(gm: GraphModule) -> None:
        output = gm.graph.output_node()
        (y, *rest) = output.args[0]
        with gm.graph.inserting_before(output):
            new = gm.graph.call_function(torch.ops.aten.t.default, (y,))
            again = gm.graph.call_function(torch.ops.aten.t.default, (new,))
        if kind != "no value":
            new.meta["val"] = y.meta["val"].t()
        again.meta["val"] = y.meta["val"]
        output.args = ((new if kind == "shape" else again, *rest),)
        if kind == "raises":
            raise RuntimeError("half-way")

    return Pass("broken", rewrite, exact=True)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("raises", RuntimeError, "half-way"),
        ("shape", AssertionError, "pass broken changed the shape or dtype of an output"),
        ("no value", AssertionError, "pass broken left t_.* without a value"),
    ],
)
def test_a_failing_pass_leaves_the_graph_as_it_was(
    kind: str, error: type[Exception], words: str
) -> None:
    gm = graph()
    before = show(gm)
    with pytest.raises(error, match=words):
        run(gm, [broken(kind)])
    assert show(gm) == before
    gm.graph.lint()
