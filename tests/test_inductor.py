"""The whole route with code generation: gradients, bytes, recompiles, and a warm cache."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
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
)
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass

import memrewrite
from memrewrite import VeLoRA
from memrewrite.state import session_of

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

    free = tuple(session_of(model).vectors.values())
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
    tests = Path(__file__).parent
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = str(tests.parent)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(tests=str(tests))],
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
