"""The whole route with code generation: gradients, bytes, recompiles, and a warm cache."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface import gpt2, llama
from models import (
    Stack,
    check_against_oracle,
    count_saved,
    gradients,
    loss_of,
    relative_errors,
    vectors,
    vectors_of,
)
from places import ROOT, TESTS
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.profiler import ProfilerActivity, profile

import memrewrite
from memrewrite import GaLore, MemrewriteWarning, VeLoRA
from memrewrite.compiler.backend import Engine
from memrewrite.gradients.packing import VECTOR
from memrewrite.moments.optimizers import ADAMW
from memrewrite.moments.projected import ProjectedKind
from memrewrite.moments.update import build
from memrewrite.session.session import session_of

pytestmark = pytest.mark.inductor
VELORA = VeLoRA(subtoken_size=8, sites="all")


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_llama_follows_the_oracle_and_keeps_the_predicted_bytes() -> None:
    model, run = llama(layers=1)
    report = check_against_oracle(model, run, VELORA, 1e-4)
    assert {r.decision for r in report.sites} == {"compressed"}
    assert len(session_of(model).graphs) == 1
    logits: list[Tensor] = []

    def forward(m: nn.Module) -> Tensor:
        logits.append(run(m))
        return logits[-1]

    free = tuple(vectors_of(model).values())
    squared = 2 * 12 * 96 * 4  # the loss outside the model keeps the logits
    assert count_saved(model, forward, free) - squared == report.totals["saved_bytes_after"]


def test_gpt2_under_autocast_with_dynamic_batches() -> None:
    """Conv1D, bfloat16 casts and dynamic shapes at once; no recompile that plain has not."""
    model, _ = gpt2(layers=1)
    plain, eager = copy.deepcopy(model), copy.deepcopy(model)

    def run(m: nn.Module, batch: int, half: bool = True) -> Tensor:
        torch.manual_seed(batch)
        tokens = torch.randint(3, 96, (batch, 12))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return m(input_ids=tokens).logits.float().square().mean()

    counts = []
    plain.compile(dynamic=True, backend="eager")  # Dynamo alone decides on recompiles
    memrewrite.compile(model, velora=VELORA, dynamic=True)
    for m in (plain, model):
        before = graphs()
        for batch in (2, 3, 5):
            m.zero_grad()
            run(m, batch).backward()
        counts.append(graphs() - before)
    assert counts[0] == counts[1]
    import oracle

    with oracle.velora(vectors(model, eager)):
        run(eager, 5, half=False).backward()
    errors = relative_errors(gradients(model), gradients(eager))
    assert max(errors.values()) < 0.06, errors  # bfloat16 has 8 bits


def test_torchs_fp8_pass_takes_what_is_left() -> None:
    """The user's own setting of Inductor: what the split keeps is rounded, and counted so."""
    how: dict[str, Any] = {"size_in_mb": 0.002, "allowed_dtypes": "torch.float32"}
    how |= {"quant_type": "torch.float8_e5m2", "use_scaling": True}
    fp8 = {"post_grad_fusion_options": {"activation_quantization_aten_pass": how}}
    model, run = llama(layers=1)
    exact = copy.deepcopy(model)
    memrewrite.compile(model, options=fp8)
    memrewrite.compile(exact)
    for each in (model, exact):
        run(each).backward()
    errors = relative_errors(gradients(model), gradients(exact))
    assert 1e-3 < max(errors.values()) < 0.3, errors  # two bits of a mantissa
    squared = 2 * 12 * 96 * 4  # the loss outside the model keeps the logits
    kept, before = (count_saved(each, run) - squared for each in (model, exact))
    assert kept == memrewrite.report(model).totals["saved_bytes_after"] < 0.8 * before


class Counting(CustomGraphPass):
    """A user's own Inductor pass."""

    calls = 0

    def __call__(self, graph: Any) -> None:
        Counting.calls += 1

    def uuid(self) -> Any:
        return "counting"


def test_the_users_own_inductor_options_stay() -> None:
    model = Stack(1)
    memrewrite.compile(model, velora=VELORA, options={"joint_custom_pre_pass": Counting()})
    loss_of(torch.randn(4, 32))(model).backward()
    assert Counting.calls
    assert {r.decision for r in memrewrite.report(model).sites} == {"compressed"}


SCRIPT = """
import json, sys, torch, memrewrite
sys.path.insert(0, {tests!r})
from models import Stack, loss_of
torch.manual_seed(0)
model = memrewrite.compile(Stack(), velora=memrewrite.VeLoRA(subtoken_size=8, sites="all"))
loss_of(torch.randn(4, 32))(model).backward()
hits = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
gradient = float(model.blocks[0].down_proj.weight.grad.norm())
print(json.dumps([hits, memrewrite.report(model).to_dict(), gradient]))
"""


def run_script(cache: Path) -> list[Any]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(tests=str(TESTS))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_the_report_is_right_on_a_warm_cache(tmp_path: Path) -> None:
    cold, warm = run_script(tmp_path), run_script(tmp_path)
    assert (cold[0], warm[0]) == (0, 1)  # the second process ran no pass
    assert warm[1] == cold[1] and warm[2] == pytest.approx(cold[2], rel=1e-6)
    assert {site["decision"] for site in warm[1]["sites"]} == {"compressed"}
    for record in (tmp_path / "memrewrite").glob("*.json"):
        record.unlink()
    lost = run_script(tmp_path)  # the record is gone: compiled once more, report as before
    assert lost[1] == cold[1]


def test_ten_steps_under_a_schedule_compile_once_and_follow_the_eager_update() -> None:
    model, run = llama(layers=1)
    other = copy.deepcopy(model)
    optimizers, schedules = [], []
    for one, backend in ((model, "inductor"), (other, "aot_eager")):
        galore = GaLore(rank=4, update_every=4, refresh="svd")
        velora = VeLoRA(gradients="dense")
        memrewrite.compile(one, velora=velora, galore=galore, backend=backend)
        optimizers.append(torch.optim.AdamW(one.parameters(), lr=1e-3, fused=True))
        schedules.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[-1], 10))
    session_of(other).calls.called = True  # it takes the other's gradients: Adam magnifies rounding
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(10):
        run(model).backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step == 0:
            first = graphs()
    assert graphs() == first
    for name, p in model.named_parameters():
        q = other.get_parameter(name)
        moved = (q - start[name]).detach().norm()
        assert float((p - q).detach().norm()) <= 1e-4 * float(moved), name
        assert set(optimizers[0].state[p]) == set(optimizers[1].state[q])
    assert "projector" in optimizers[0].state[model.model.layers[0].self_attn.v_proj.weight]


def test_small_gradients_train_as_full_ones_and_a_step_allocates_no_matrix() -> None:
    model, run = llama(layers=1)
    other = copy.deepcopy(model)
    small = VeLoRA(subtoken_size=8, sites="all", lr_scale=1.0)
    memrewrite.compile(model, velora=small)
    memrewrite.compile(other, velora=replace(small, gradients="dense"), backend="aot_eager")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True) for m in (model, other)]
    for step in range(4):
        for one, optimizer in zip((model, other), optimizers, strict=True):
            run(one).backward()
            if one is model and step == 3:
                largest = _largest_allocation(optimizer.step)
            else:
                optimizer.step()
            optimizer.zero_grad()
    held = optimizers[0].state
    assert all(VECTOR in held[p] for n, p in model.named_parameters() if "proj" in n)
    assert 0 < largest < min(p.nbytes for p in model.parameters() if p.ndim == 2) // 8
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


class Matrices(nn.Module):
    """No activation of 17 rows is as large as a weight, or as another weight's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 80, bias=False), nn.Linear(80, 72, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("how", ["velora", "galore", "dense"])
def test_no_block_of_a_weights_size_is_allocated(how: str) -> None:
    """In backward and step; and with full gradients there is one, so that this can fail."""
    torch.manual_seed(0)
    model, x = Matrices(), torch.randn(17, 64)
    gradients: Any = "dense" if how == "dense" else "coordinates"
    galore = GaLore(4, sites="all", gradients=gradients)
    if how == "velora":
        memrewrite.compile(model, velora=VELORA)
    else:
        memrewrite.compile(model, galore=galore)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    blocks: list[int] = []
    for step in range(6):  # the last one is not one of a refresh
        loss = model(x).square().mean()

        def rest(loss: Tensor = loss) -> None:
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        if step == 5:
            blocks = _allocations(rest)
        else:
            rest()
        optimizer.zero_grad()
    full = {p.nbytes for p in model.parameters()} & set(blocks)
    assert bool(full) is (how == "dense") and blocks


class Classifier(nn.Module):
    """(loss, logits), as a Hugging Face model returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 24), nn.Linear(24, 5000, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(torch.tanh(self.body(x)))  # (N, C)
        return nn.functional.cross_entropy(logits, y), logits


@pytest.mark.parametrize("ours", [True, False])
def test_no_block_of_zeros_for_logits_that_nobody_differentiates(ours: bool) -> None:
    """One block of the logits' size in backward, their gradient, in batches of two sizes."""
    torch.manual_seed(0)
    model, other = Classifier(), Classifier()
    other.load_state_dict(model.state_dict())
    if ours:
        memrewrite.compile(model, dynamic=True)
    else:
        model.compile(dynamic=True)
    for rows in (64, 96):
        x, y = torch.randn(rows, 16), torch.randint(0, 5000, (rows,))
        for with_logits in (True, False, False):
            loss, logits = model(x, y)
            again, theirs = other(x, y)
            if with_logits:
                loss, again = loss + logits.square().mean(), again + theirs.square().mean()
            blocks = _allocations(loss.backward)
            again.backward()
        assert blocks.count(logits.nbytes) == (1 if ours else 2)  # the third: one is made once
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


def test_projected_gradients_train_as_they_do_without_code_generation() -> None:
    model, run = llama(layers=1)
    other = copy.deepcopy(model)
    galore = GaLore(rank=4, update_every=4, gradients="coordinates")
    memrewrite.compile(model, galore=galore)
    memrewrite.compile(other, galore=galore, backend="aot_eager")
    for one in (model, other):
        made = torch.optim.AdamW(one.parameters(), lr=1e-3, eps=1e-3, fused=True)
        for _ in range(7):
            run(one).backward()
            made.step()
            made.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)
    rows = {row["name"]: row for row in memrewrite.report(model).to_dict()["optimizer"]}
    small = rows["model.layers.0.mlp.up_proj"]
    assert small["decision"] == "projected" and small["gradient_after"] < small["gradient_before"]


def _largest_allocation(work: Callable[[], object]) -> int:
    return max(_allocations(work))


def _allocations(work: Callable[[], object]) -> list[int]:
    """Bytes of every block that torch's allocator hands out meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as traced:
        work()
    events = traced.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float32, (6, 4)), (torch.bfloat16, (4, 6)), (torch.float32, (6, 4, 3))],
)
def test_a_compiled_update_is_the_update(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    flags = [True] * 4
    kind = ProjectedKind(shape, dtype, torch.device("cpu"), 2, len(shape) == 2, 0.5, *flags)
    results = []
    for backend in ("inductor", "aot_eager"):
        update = build(kind, Engine(backend, None, None, None))
        torch.manual_seed(0)
        w, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        state = [torch.zeros(kind.state_shape, dtype=dtype) for _ in range(3)]
        p, step = torch.linalg.qr(torch.randn(kind.side, 2)).Q.to(dtype), torch.zeros(())
        group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        for _ in range(3):
            numbers = update.numbers(step, ADAMW.numbers(group, kind.flags))
            update.apply([w, g, *state, p], numbers)
        results.append((w, *state))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_update_that_does_not_compile_runs_op_by_op_with_a_warning() -> None:
    kind = ProjectedKind((5, 3), torch.float32, torch.device("cpu"), 1, False, 1.0, *[False] * 4)
    update = build(kind, Engine("inductor", None, None, None))
    w, g, p = torch.zeros(5, 3), torch.ones(5, 3), torch.eye(3, 1)
    state = [torch.zeros(5, 1) for _ in range(2)]
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    numbers = update.numbers(torch.zeros(()), kind.row.numbers(group, kind.flags))
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.warns(MemrewriteWarning, match="op by op"),
    ):
        update.apply([w, g, *state, p], numbers)
    torch.testing.assert_close(w[:, 0], torch.full((5,), -0.1))
