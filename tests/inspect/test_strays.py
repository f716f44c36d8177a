"""Models that train without us: copies, loaded pickles, calls that go around the compiled one."""

from __future__ import annotations

import contextlib
import copy
import io
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import Stack
from quick import only
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import memrewrite
from memrewrite import MemrewriteWarning
from memrewrite.inspect.strays import MARK, QUIET
from memrewrite.session.session import session_of

COPY = r"copy of a model \(Stack\) that memrewrite compiled"
LOADED = "parameters .* of a model that was compiled"


def compiled(model: nn.Module | None = None) -> Any:
    return memrewrite.compile(model or Stack(1), velora=True, backend="aot_eager")


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 32)).square().mean().backward()
    optimizer.step()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemrewriteWarning)
        yield


def reloaded(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": (copy.deepcopy, COPY),
    "copy of a copy": (lambda m: copy.deepcopy(copy.deepcopy(m)), COPY),
    "inside another": (lambda m: copy.deepcopy(nn.Sequential(nn.Identity(), m)), COPY),
    "average": (AveragedModel, COPY),
    "pickle": (reloaded, LOADED),
    "copy of a pickle": (lambda m: reloaded(copy.deepcopy(m)), None),  # says nothing: no mark
}


@pytest.mark.parametrize("kind", only(COPIES, "deepcopy", "inside another", "average", "pickle"))
@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_that_trains(kind: str, trained: bool) -> None:
    model = compiled()
    if trained:
        step(model, adam(model))
    make, told = COPIES[kind]
    twin: Any = make(model)
    optimizer = adam(twin)
    with pytest.warns(MemrewriteWarning, match=told) if told else silent():
        step(twin, optimizer)
    with silent():
        step(twin, optimizer)
        step(model, adam(model))


@pytest.mark.parametrize(
    "kind", only((k for k in COPIES if k != "average"), "copy of a copy", "copy of a pickle")
)
def test_a_copy_that_is_compiled_as_well(kind: str) -> None:
    twin: Any = COPIES[kind][0](compiled())
    inner = twin[1] if isinstance(twin, nn.Sequential) else twin
    with silent():
        compiled(inner)
        step(twin, adam(twin))
    assert session_of(inner).calls.recent() == (0, 1)


def test_an_average_that_evaluates_is_silent() -> None:
    model = compiled()
    average, optimizer = AveragedModel(model), adam(model)
    with silent():
        for _ in range(3):
            step(model, optimizer)
            average.update_parameters(model)
            average(torch.randn(4, 32))


def test_a_shallow_copy_shares_the_parameters_and_goes_around() -> None:
    model = memrewrite.compile(Stack(1), backend="aot_eager")
    step(model, adam(model))
    twin = copy.copy(model)
    optimizer = adam(model)
    with silent():
        step(model, optimizer)
        for _ in range(QUIET - 1):
            step(twin, optimizer)
    with pytest.warns(MemrewriteWarning, match=f"{QUIET} optimizer steps moved Stack without"):
        step(twin, optimizer)


def test_two_optimizers_after_one_call_are_silent() -> None:
    model = compiled()
    halves = [list(model.parameters())[::2], list(model.parameters())[1::2]]
    optimizers = [torch.optim.AdamW(half) for half in halves] * 2
    with silent():
        for _ in range(QUIET + 1):
            step(model, optimizers[0])
            for optimizer in optimizers:
                optimizer.step()


def test_a_step_on_zeros_says_nothing() -> None:
    """What torch.distributed.checkpoint does to an optimizer that has no state yet."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = compiled()
    optimizer = torch.optim.AdamW(model.parameters())
    with silent():
        get_optimizer_state_dict(model, optimizer)
        step(model, optimizer)
    model = memrewrite.compile(Stack(1), backend="aot_eager")
    optimizer = adam(model)
    step(model, optimizer)
    outer = torch.compile(lambda x: model(x), backend="eager")
    with pytest.warns(MemrewriteWarning, match=f"{QUIET} optimizer steps"):
        for _ in range(QUIET):
            step(outer, optimizer)


def test_a_step_on_zeros_does_not_end_the_watch() -> None:
    model = memrewrite.compile(Stack(1), backend="aot_eager")
    optimizer = adam(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with silent():
        optimizer.step()
    outer = torch.compile(lambda x: model(x), backend="eager")
    with pytest.warns(MemrewriteWarning, match="passes never ran"):
        step(outer, optimizer)


def test_nothing_is_left_behind() -> None:
    model = compiled()
    keys = set(model.state_dict())
    assert keys == set(Stack(1).state_dict())
    assert not [t for t in model.state_dict().values() if MARK in t.__dict__]
    twin = memrewrite.restore(model)
    assert MARK not in vars(twin)
    assert not [p for p in twin.parameters() if MARK in p.__dict__]
    other = reloaded(twin)
    with silent():
        step(twin, adam(twin))
        step(other, adam(other))


@pytest.mark.slow
def test_a_pickle_loads_without_memrewrite(tmp_path: Any) -> None:
    model = compiled(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)))
    x: Tensor = torch.randn(4, 32)
    torch.save(model, tmp_path / "model.pt")
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    code = (
        "import sys, torch; sys.modules['memrewrite'] = None;"
        f"m = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False);"
        f"x, y = torch.load({str(tmp_path / 'expected.pt')!r});"
        "torch.testing.assert_close(m(x), y)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
