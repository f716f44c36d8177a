"""The seam to torch: a user's own passes beside ours, and what differs between versions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from graphs import joint_graph
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule
from torch.profiler import ProfilerActivity, profile

import memrewrite
from memrewrite import VeLoRA
from memrewrite.compiler import backend
from memrewrite.compiler.backend import GUARDS_TRAINED, JointPasses
from memrewrite.methods.method import Ask
from memrewrite.methods.request import Request, make_request
from memrewrite.methods.velora import SubTokens

ran: list[str] = []


class Named(CustomGraphPass):
    """A user's own pass that says, or does not say, what it is."""

    def __init__(self, name: str | None) -> None:
        self.name = name

    def __call__(self, graph: Graph) -> None:
        ran.append(str(self.name))

    def uuid(self) -> Any:
        return self.name


def plan(scale: float = 1.0) -> Request:
    ask = Ask(0, torch.float32, torch.device("cpu"), torch.float32, (2,))
    return make_request(2, [(SubTokens(VeLoRA(2, scale=scale)), [ask])], [0], [], True)


def test_ours_run_first_and_then_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(gm: GraphModule, *_: Any) -> None:
        ran.append("ours")

    monkeypatch.setattr(backend, "_rewrite_joint", ours)
    ran.clear()
    gm = joint_graph(lambda w, x: x @ w.t(), [torch.randn(3, 2)], [torch.randn(4, 2)])
    JointPasses(plan(), (Named("a"), lambda graph: ran.append("b")))(gm.graph)
    assert ran == ["ours", "a", "b"]


def test_what_torchs_caches_know_them_by() -> None:
    def of(*theirs: Any, scale: float = 1.0) -> JointPasses:
        return JointPasses(plan(scale), theirs)

    a, b = Named("a"), Named("b")
    known = [of(), of(a), of(b), of(a, b), of(b, a), of(scale=0.5)]
    assert all(one.uuid() for one in known)
    assert len({str(one.uuid()) for one in known}) == len(known)
    assert of(a) == of(a) and hash(of(a)) == hash(of(a)) and of(a) != of(b) != of()
    assert of(a, Named(None)).uuid() is None  # they may not be cached
    assert of(a, print).uuid() is None


def test_whether_dynamo_sees_that_a_parameter_was_frozen() -> None:
    """What GUARDS_TRAINED says of this version of torch."""
    seen: list[bool] = []

    def compiler(gm: GraphModule, inputs: list[Tensor]) -> Any:
        seen.append(next(i for i in inputs if isinstance(i, nn.Parameter)).requires_grad)
        return gm

    linear = nn.Linear(4, 4)
    compiled = torch.compile(lambda x: linear(x), backend=compiler)
    for trained in (True, False, True):
        linear.weight.requires_grad_(trained)
        compiled(torch.randn(2, 4))
    assert seen == ([True, False] if GUARDS_TRAINED else [True])


def test_op_by_op_a_saved_tensor_is_freed_after_its_last_reader() -> None:
    """The peak of backward is at its start, where all are saved."""
    model = nn.Sequential(
        *(m for _ in range(6) for m in (nn.Linear(16, 16, bias=False), nn.Tanh()))
    )
    memrewrite.compile(model, backend="aot_eager")
    x = torch.randn(4096, 16)
    model(x).sum().backward()
    y = model(x).sum()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        y.backward()
    events = seen.profiler.kineto_results.events()
    sizes = itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]")
    assert max(sizes) < 3.5 * x.nbytes
