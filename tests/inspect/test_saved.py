"""saved_tensors: equal, to the byte, to what autograd's own hooks count."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from huggingface import MODELS
from hypothesis import given
from hypothesis import strategies as st
from models import Stack, Wrapped, hooked
from torch import Tensor, nn

import memrewrite
from memrewrite import VeLoRA


class Residual(nn.Module):
    """Three pre-norm blocks, each with a dropout on its branch."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + torch.nn.functional.dropout(linear(norm(x)), self.p)
        return x.square().sum()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_residual_stack_keeps_its_sums_behind_a_dropout_too(p: float) -> None:
    model = memrewrite.compile(Residual(p), backend="aot_eager")
    rows = memrewrite.saved_tensors(model, torch.randn(6, 32))
    wide = [row.operation for row in rows if row.shape == (6, 32) and row.operation != "gt"]
    assert wide == ["argument", "add", "add", "add"]  # x, and no linear's output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dynamic", "velora"),
    [(False, False), (True, VeLoRA(8, sites="all"))],
    ids=["exact", "dynamic"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5"])
def test_rows_sum_to_what_the_hooks_count(name: str, dynamic: bool, velora: Any) -> None:
    model, run = MODELS[name]()
    whole = Wrapped(model.train(), run)
    memrewrite.compile(whole, velora=velora, backend="aot_eager", dynamic=dynamic)
    rows = memrewrite.saved_tensors(whole)
    assert sum(row.bytes for row in rows) == hooked(whole)
    inside = [row for row in rows if row.kind in ("exact", "compressed")]
    assert all(row.operation for row in inside), [row for row in inside if not row.operation]
    assert any(row.kind == "compressed" for row in rows) is bool(velora)
    named = sum(row.bytes for row in inside if row.module or row.operation == "argument")
    assert named >= 0.9 * sum(row.bytes for row in inside)
    assert f"{rows.bytes:,} bytes of activations" in str(rows)


@pytest.mark.slow
@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=5),
    st.sampled_from([nn.Tanh, nn.ReLU, nn.GELU, nn.Identity]),
    st.booleans(), st.booleans(), st.integers(1, 6),
)  # fmt: skip
def test_stacks_of_linears(
    sizes: list[int], activation: Any, bias: bool, velora: bool, batch: int
) -> None:
    layers = [
        layer
        for before, after in pairwise(sizes)
        for layer in (nn.Linear(before, after, bias=bias), activation())
    ]
    model = nn.Sequential(*layers)
    options = VeLoRA(2, sites="all") if velora and max(sizes[:-1]) > 1 else False
    memrewrite.compile(model, velora=options, backend="aot_eager")
    x = torch.randn(batch, sizes[0])
    rows = memrewrite.saved_tensors(model, x)
    assert sum(row.bytes for row in rows) == hooked(lambda: model(x))


def test_a_row_says_what_where_why_and_whether_it_was_compressed() -> None:
    model = Stack(depth=1)
    memrewrite.compile(model, velora=VeLoRA(8, sites=["*.up_proj"]), backend="aot_eager")
    x = torch.randn(6, 32)
    rows = memrewrite.saved_tensors(model, x)
    gate = next(row for row in rows if row.module == "blocks.0.gate_proj")
    assert (gate.operation, gate.shape, gate.dtype) == ("addmm", (6, 48), torch.float32)
    assert gate.bytes == 6 * 48 * 4 and gate.kind == "exact"
    assert any("blocks.0" in reader for reader in gate.used_by)
    kinds = {row.name: row.kind for row in rows}
    assert kinds["blocks.0.down_proj.weight"] == "parameter"
    assert set(kinds.values()) == {"parameter", "input", "vector", "exact"}
    assert [row.shape for row in rows if row.kind == "vector"] == [(8,)]


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    memrewrite.compile(model, backend="aot_eager")
    before = copy.deepcopy(model.state_dict())
    x, random = torch.randn(5, 8), torch.get_rng_state()
    rows = memrewrite.saved_tensors(model, x)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert sum(row.bytes for row in rows) == hooked(lambda: model(x))


def test_what_is_saved_outside_the_compiled_graphs_is_named_so() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x).tanh()
            torch._dynamo.graph_break()
            return self.two(outside(x))

    @torch.compiler.disable
    def outside(x: Tensor) -> Tensor:
        return x.exp()

    model = Broken()
    memrewrite.compile(model, backend="aot_eager")
    x = torch.randn(5, 8)
    rows = memrewrite.saved_tensors(model, x)
    assert sum(row.bytes for row in rows) == hooked(lambda: model(x))
    assert [row.shape for row in rows if row.kind == "outside"] == [(5, 8)]


def test_it_refuses_what_it_cannot_answer() -> None:
    with pytest.raises(ValueError, match="not compiled by memrewrite"):
        memrewrite.saved_tensors(nn.Linear(2, 2), torch.randn(1, 2))
    model = memrewrite.compile(nn.Sequential(nn.Linear(2, 2)), backend="aot_eager")
    with torch.no_grad(), pytest.raises(ValueError, match="turned off"):
        memrewrite.saved_tensors(model, torch.randn(1, 2))
