"""Which batch a v is made of, on one process and on two; and what the optimizer does meanwhile."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from places import ROOT
from torch import Tensor, nn

import memrewrite
from memrewrite import GaLore, VeLoRA

SIZE = 8
ONES = torch.ones(SIZE) / SIZE**0.5
X = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) + torch.arange(32.0)
UNUSABLE = {
    "holds inf or NaN": (X / 0).nan_to_num(0.0, float("inf"), 0.0),
    "is all zeros": torch.zeros_like(X),
}


def model_of(init: Any = "batch_mean", **more: Any) -> nn.Module:
    torch.manual_seed(0)
    velora = VeLoRA(subtoken_size=SIZE, sites=["0"], init=init, **more)
    model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))
    return memrewrite.compile(model, velora=velora, backend="aot_eager")


def back(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def v_of(model: nn.Module) -> Tensor | None:
    return memrewrite.state_dict(model).get("velora.v.0")


def reason_of(model: nn.Module) -> str:
    return next(r.reason for r in memrewrite.report(model).sites if r.name == "0")


def warnings_of(run: Callable[[], Any]) -> list[str]:
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if w.category is memrewrite.MemrewriteWarning]


@pytest.mark.parametrize("why", UNUSABLE)
@pytest.mark.parametrize("init", ["batch_mean", "running_mean"])
def test_the_first_usable_batch_calibrates(why: str, init: Any) -> None:
    model, bad = model_of(init), UNUSABLE[why]
    (said,) = warnings_of(lambda: back(model, bad)) if init == "batch_mean" else [""]
    if init == "batch_mean":
        assert said.startswith(f"this batch cannot calibrate 0: the input {why}. v is ones")
    else:
        words = warnings_of(lambda: back(model, bad))
        assert [w[:12] for w in words] == ["this batch c", "a batch is l"][: 1 + ("inf" in why)]
    assert memrewrite.state_dict(model) == {}  # nothing is frozen, nor saved
    assert f"v is ones until a batch can calibrate it (1 tried: x {why})" in reason_of(model)
    back(model, bad)  # silently
    back(model, X)
    torch.testing.assert_close(v_of(model), oracle.unit_mean([X], SIZE).float())
    assert "v is ones" not in reason_of(model)
    if init == "batch_mean":
        back(model, X.flip(1))
        torch.testing.assert_close(v_of(model), oracle.unit_mean([X], SIZE).float())


def test_an_input_that_stays_zero_costs_few_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    from memrewrite.calibration import observe

    calls: list[int] = []
    batches: list[Tensor] = []
    real = observe.subtoken_sums
    monkeypatch.setattr(observe, "subtoken_sums", lambda *a: calls.append(len(batches)) or real(*a))
    model = model_of()

    def train(x: Tensor, steps: int) -> None:
        for _ in range(steps):
            batches.append(x)
            back(model, x)

    with pytest.warns(memrewrite.MemrewriteWarning, match="is all zeros"):
        train(0 * X, 40)
    assert calls == [1, 2, 3, 4, 8, 16, 32]
    assert "(7 tried" in reason_of(model)
    train(X, 24)
    assert calls[-1] == 64 and v_of(model) is not None
    train(X, 1)
    assert calls[-1] == 64  # and never again


def test_sums_that_cancel_are_no_direction() -> None:
    model = model_of()
    x = torch.cat([X, -X])
    with pytest.warns(memrewrite.MemrewriteWarning, match="no v for 0: the sub-tokens of its"):
        back(model, x)
    torch.testing.assert_close(v_of(model), ONES)
    assert "v is ones, because the sub-tokens of its input add up to zero" in reason_of(model)


def test_a_running_mean_leaves_out_what_is_not_finite() -> None:
    model = model_of("running_mean")
    back(model, X)
    v, bad = v_of(model), X.clone()
    bad[3, 4] = float("nan")
    (said,) = warnings_of(lambda: back(model, bad))
    assert said.startswith("a batch is left out of the running mean of 0: the input holds inf")
    assert torch.equal(v_of(model), v)
    back(model, bad)  # silently
    back(model, 0 * X)
    torch.testing.assert_close(v_of(model), v)
    back(model, X.flip(1))
    torch.testing.assert_close(v_of(model), oracle.unit_mean([X, X.flip(1)], SIZE).float())
    state = memrewrite.state_dict(model)
    state["velora.sum.0"] = state["velora.sum.0"] * float("inf")  # as older versions left it
    memrewrite.load_state_dict(model, state)
    back(model, X)
    torch.testing.assert_close(v_of(model), oracle.unit_mean([X], SIZE).float())


@pytest.mark.parametrize("fused", [False, True])
def test_adam_keeps_small_state_over_a_first_batch_of_zeros(fused: bool) -> None:
    model = model_of()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    weight = model[0].weight  # type: ignore[index]
    with pytest.warns(memrewrite.MemrewriteWarning, match="is all zeros") as caught:
        for x in (0 * X, 0 * X, X, X):
            back(model, x)
            adam.step()
    assert len(caught) == 1
    state = adam.state[weight]
    assert state["exp_avg"].shape == (16, 4) and float(state["step"]) == 4
    assert torch.equal(state["vector"], v_of(model)) and bool(state["exp_avg"].any())


@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_that_the_scaler_skips(fused: bool) -> None:
    model = model_of()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    bad = X.clone()
    bad[0, 0] = float("inf")

    def train() -> None:
        for x in (bad, X, X):
            model.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(adam)
            scaler.update()

    (said,) = warnings_of(train)
    assert "holds inf or NaN" in said
    state = adam.state[model[0].weight]  # type: ignore[index]
    assert state["exp_avg"].shape == (16, 4) and bool(state["exp_avg"].isfinite().all())
    assert torch.equal(state["vector"], v_of(model))


def test_moments_of_a_provisional_v_start_anew() -> None:
    """An input that is zero for long: the first step that moves asks for a calibration."""
    model = model_of()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.warns(memrewrite.MemrewriteWarning) as caught:
        for x in (*[0 * X] * 5, X):
            back(model, x)
            adam.step()
        state = adam.state[model[0].weight]  # type: ignore[index]
        torch.testing.assert_close(state["vector"], ONES)
        assert bool(state["exp_avg"].any())
        back(model, X)  # the seventh, which is no power of two
        assert v_of(model) is not None
        adam.step()
    assert [str(w.message)[:20] for w in caught] == ["this batch cannot ca", "the Adam moments of "]
    assert float(state["step"]) == 1 and state["exp_avg"].shape == (16, 4)
    back(model, X)
    adam.step()
    assert torch.equal(adam.state[model[0].weight]["vector"], v_of(model))  # type: ignore[index]
    assert float(state["step"]) == 2


def test_a_v_that_a_state_replaces_still_spreads_the_moments() -> None:
    model = model_of()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    back(model, X)
    adam.step()
    memrewrite.load_state_dict(model, {"velora.v.0": ONES})
    back(model, X)
    with pytest.warns(memrewrite.MemrewriteWarning, match="its v was replaced"):
        adam.step()
    assert adam.state[model[0].weight]["exp_avg"].shape == (16, 32)  # type: ignore[index]


@pytest.mark.parametrize("first", [1, 7])
def test_galore_finds_a_projector_once_gradients_come(first: int) -> None:
    """The sibling: the basis of a first gradient of zeros is asked for again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24, bias=False))
    galore = GaLore(4, sites="all", gradients="coordinates")
    memrewrite.compile(model, galore=galore, backend="aot_eager")
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    basis = torch.randn(4, 32)
    for i in range(first + 2):
        rows = torch.randn(64, 4) @ basis if i >= first else torch.zeros(64, 32)
        back(model, rows)
        adam.step()
    state = adam.state[model[0].weight]  # type: ignore[index]
    gradient = model[0].weight.grad  # type: ignore[index]
    p, gradient = state["projector"], gradient.to_dense()
    eager = nn.Linear(32, 24, bias=False)
    eager.weight.data.copy_(model[0].weight.data)  # type: ignore[index]
    eager(rows).square().mean().backward()
    dense = eager.weight.grad
    assert dense is not None and not bool(state["projector_stale"])
    energy = ((p.t() @ dense) if p.shape[0] == 24 else dense @ p).norm() / dense.norm()
    assert energy > 0.99  # a gradient of rank 4, in four columns
    assert gradient.shape == dense.shape


SCRIPT = """
import sys, warnings, torch, torch.distributed as dist
from torch import nn
import memrewrite
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
for init in ("running_mean", "batch_mean"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))
    velora = memrewrite.VeLoRA(subtoken_size=8, sites="all", init=init)
    memrewrite.compile(model, velora=velora, backend="aot_eager")
    if rank == 0:  # a model that one rank trains alone waits for nobody
        own = nn.Sequential(nn.Linear(32, 8))
        memrewrite.compile(own, velora=velora, backend="aot_eager")
        own(torch.randn(4, 32) + 1).sum().backward()
    ddp = nn.parallel.DistributedDataParallel(model)
    calls = []
    real = dist.all_reduce
    dist.all_reduce = lambda *a, **k: calls.append(1) or real(*a, **k)
    for i in range(5):
        torch.manual_seed(10 * i + rank)
        x = torch.randn(16, 32) + torch.arange(32.) * (1 + rank)
        if i == 0 or i == 2:
            x[0, 0] = float("nan") if rank == i // 2 else x[0, 0]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = ddp(x)
            sent = len(calls)
            out.square().mean().backward()
        said = [str(w.message)[:30] for w in caught]
        v = memrewrite.state_dict(model)
        print(init, i, sent, said, sorted(v), sep="|")
        calls.clear()
        for t in v.values():
            both = [torch.empty_like(t) for _ in range(2)]
            dist.all_gather(both, t)
            assert torch.equal(*both), (init, i)
            assert t.isfinite().all()
    dist.all_reduce = real
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_decide_alike_and_share_every_mean(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in (0, 1)
    ]
    results = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    (ours, _), (theirs, _) = results
    assert ours == theirs  # the same words on both, whichever held the NaN
    lines = [line.split("|") for line in ours.splitlines()]
    both = "['velora.v.0', 'velora.v.2']"
    assert [line[2] for line in lines[5:]] == ["1", "1", "0", "0", "0"]
    assert [line[2] for line in lines[:5]] == ["2", "2", "1", "1", "1"]  # one a call, after that
    assert lines[5][4] == "[]" and all(line[4] == both for line in lines[6:])
    assert "this batch cannot" in lines[0][3] and "a batch is left out" in lines[0][3]
    assert all(line[3] == "[]" for line in lines[1:5])
