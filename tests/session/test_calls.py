"""Calls that Dynamo runs without us: counted, told once with their cause, and healed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from quick import only
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import memrewrite
from memrewrite import GaLore, MemrewriteWarning, VeLoRA
from memrewrite.compiler.backend import graphs_compiled
from memrewrite.gradients.gradient import ProjectedGrad
from memrewrite.session.calls import LOOKS, WINDOW
from memrewrite.session.session import session_of

ALL8 = VeLoRA(subtoken_size=8, sites="all")


class Net(nn.Module):
    """Raises, or breaks its graph, when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 8)
        self.error = ""
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).tanh()
        if self.broken:
            torch._dynamo.graph_break()
        if self.error == "value":
            raise ValueError("bad batch")
        if self.error == "memory":
            raise torch.OutOfMemoryError("full")
        return self.b(y)


def compiled(model: nn.Module | None = None, **kwargs: Any) -> Any:
    options: dict[str, Any] = {"velora": ALL8, "backend": "aot_eager", **kwargs}
    return memrewrite.compile(model or Net(), **options)


def is_compressed(model: nn.Module, rows: int = 4) -> bool:
    """Of one training call: whether all of its matrices got small gradients."""
    model.zero_grad()
    model(torch.randn(rows, 16)).square().mean().backward()
    return all(isinstance(p.grad, ProjectedGrad) for p in model.parameters() if p.ndim == 2)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemrewriteWarning)
        yield


def counted(model: nn.Module) -> tuple[int, int]:
    totals = memrewrite.report(model).to_dict()["totals"]
    return totals["missed_calls"], totals["recent_calls"]


# --- an exception ------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("error", only(["value", "memory"], "memory"))
def test_the_call_after_an_exception_is_compiled(error: str, before: int, broken: bool) -> None:
    model = compiled()
    model.broken = broken
    with silent():
        for _ in range(before):
            assert is_compressed(model)
        model.error = error
        with pytest.raises(ValueError if error == "value" else torch.OutOfMemoryError):
            model(torch.randn(4, 16))
        model.error = ""
        assert is_compressed(model)
    assert counted(model) == (0, before + 1)


def test_what_was_compiled_before_an_exception_is_not_compiled_again() -> None:
    model = compiled()
    assert is_compressed(model)
    graphs = graphs_compiled()
    model.error = "value"
    with pytest.raises(ValueError, match="bad batch"):
        model(torch.randn(4, 16))
    model.error = ""
    assert is_compressed(model) and graphs_compiled() == graphs


def test_a_smaller_batch_after_running_out_of_memory() -> None:
    model = compiled()

    def full(module: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) > 4:
            raise torch.OutOfMemoryError("full")

    model.a.register_forward_pre_hook(full)
    rows = 16
    while True:  # accelerate's find_executable_batch_size
        try:
            assert is_compressed(model, rows)
            break
        except torch.OutOfMemoryError:
            rows //= 2
    assert rows == 4


def test_a_forward_that_raises_all_the_time_is_not_traced_for_ever() -> None:
    model = compiled()
    for _ in range(LOOKS + 1):
        model.error = "value"
        with pytest.raises(ValueError, match="bad"):
            model(torch.randn(4, 16))
    model.error = ""
    with pytest.warns(MemrewriteWarning, match=rf"{LOOKS + 1} exceptions .*_dynamo.reset"):
        assert not is_compressed(model)
    torch._dynamo.reset()
    assert is_compressed(model)


# --- what need not last ---------------------------------------------------------------------------


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


MODES: dict[str, tuple[Callable[[], Any], str]] = {
    "flops": (lambda: FlopCounterMode(display=False), "under a _FlopCounterMode"),
    "dispatch": (Passing, "under a Passing"),
    "stance": (lambda: torch.compiler.set_stance("force_eager"), "set_stance.'force_eager'"),
    "disabled": (lambda: torch._dynamo.config.patch(disable=True), "TORCH_COMPILE_DISABLE"),
}


@pytest.mark.parametrize("before", only([0, 1], 1))
@pytest.mark.parametrize("mode", MODES)
def test_one_call_under_a_mode(mode: str, before: int) -> None:
    model = compiled()
    for _ in range(before):
        assert is_compressed(model)
    enter, told = MODES[mode]
    known = mode == "disabled" and before  # Dynamo goes on using what it has
    expected = silent() if known else pytest.warns(MemrewriteWarning, match=told)
    with expected, enter():
        assert is_compressed(model) == bool(known)
    with silent():
        assert is_compressed(model)
    assert counted(model) == (0 if known else 1, before + 2)


def test_a_transform_of_torch_func() -> None:
    model = compiled()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(model, values, (torch.randn(4, 16),))
        return result.sum()

    with pytest.warns(MemrewriteWarning, match="transform of torch.func"):
        torch.func.grad(loss)(parameters)
    assert is_compressed(model)


# --- what lasts ---------------------------------------------------------------------------------


OPTIONS = {
    "velora": {"velora": ALL8},
    "galore": {"velora": False, "galore": GaLore(4, gradients="coordinates", sites="all")},
}


@torch._dynamo.config.patch(recompile_limit=2)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dynamos_limit(options: dict[str, Any]) -> None:
    model = compiled(dynamic=False, **options)
    optimizer = AdamW(model.parameters())
    found = []
    with pytest.warns(MemrewriteWarning) as told:
        for rows in range(8, 14):
            found.append(is_compressed(model, rows))
            optimizer.step()
    assert found == [True] * 2 + [False] * 4
    ours = [str(w.message) for w in told if "did not run" in str(w.message)]
    assert len(ours) == 1
    assert "recompile_limit = 2" in ours[0] and "dynamic=None" in ours[0]
    report = memrewrite.report(model)
    assert "4 of the last 6 calls did not run the rewritten graph: Dynamo's limit" in str(report)
    assert counted(model) == (4, 6)
    with silent():
        assert is_compressed(model, 8)  # what it has goes on running


def test_the_remedy_for_the_limit_works() -> None:
    model = compiled(dynamic=None)
    with silent():
        assert all(is_compressed(model, rows) for rows in range(8, 20))


def test_a_suppressed_failure_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("memrewrite.session.graph.capture", fail)
    model = compiled()
    with torch._dynamo.config.patch(suppress_errors=True):
        with pytest.warns(MemrewriteWarning, match="suppressed: RuntimeError: no compiler here"):
            assert not is_compressed(model)


@pytest.mark.parametrize("kind", only([nn.LSTM, nn.GRU, nn.RNN], nn.LSTM))
def test_a_recurrent_layer_is_named(kind: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Linear(16, 16), kind(16, 16)

        def forward(self, x: Tensor) -> Any:
            return self.layer(self.first(x))[0]

    model = compiled(Recurrent())
    optimizer = AdamW(model.parameters())
    told = rf"skips what calls nn.{kind.__name__} \(layer here\)"
    with pytest.warns(MemrewriteWarning, match=told) as found:
        for _ in range(3):
            assert not is_compressed(model)
            optimizer.step()
    assert len(found) == 1  # and none that blames an outer compile
    assert counted(model) == (3, 3)


def test_the_parts_around_a_recurrent_layer_can_be_compiled() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LSTM(16, 16))
    compiled(model[0])
    with silent():
        model(torch.randn(4, 16))[0].sum().backward()
    assert isinstance(model[0].weight.grad, ProjectedGrad)


def test_plain_tensors_in_place_of_the_parameters() -> None:
    model = compiled()
    x = torch.randn(4, 16)
    values = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    with pytest.warns(MemrewriteWarning, match="functional_call"):
        torch.func.functional_call(model, values, (x,)).sum().backward()
    assert counted(model) == (1, 1)
    parameters = {name: nn.Parameter(p.detach()) for name, p in values.items()}
    with silent():
        torch.func.functional_call(model, parameters, (x,)).sum().backward()
    assert isinstance(parameters["a.weight"].grad, ProjectedGrad)
    assert counted(model) == (1, 2)


# --- what is no miss ----------------------------------------------------------------------------


def test_a_graph_break_is_no_miss() -> None:
    model = compiled()
    model.broken = True
    with silent():
        assert is_compressed(model)
    assert counted(model) == (0, 1)


def test_evaluation_is_not_counted() -> None:
    model = compiled()
    with silent(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model(torch.randn(4, 16))
    model.requires_grad_(False)
    with silent(), torch.compiler.set_stance("force_eager"):
        model(torch.randn(4, 16))
    assert session_of(model).calls.total == 0


def test_an_outer_compile_traces_through_and_does_not_recompile() -> None:
    model = compiled()
    outer = torch.compile(lambda x: model(x).square().mean(), backend="aot_eager", fullgraph=True)
    before = graphs_compiled()
    for _ in range(4):
        outer(torch.randn(4, 16)).backward()
    assert graphs_compiled() == before + 1
    assert session_of(model).calls.total == 0 and not session_of(model).calls.called


def test_the_report_looks_back_on_a_window() -> None:
    model = compiled()
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        for _ in range(3):
            is_compressed(model)
    for _ in range(WINDOW - 1):
        model(torch.randn(4, 16))
    assert counted(model) == (1, WINDOW)
    model(torch.randn(4, 16))
    assert counted(model) == (0, WINDOW)
    assert "did not run" not in str(memrewrite.report(model))
