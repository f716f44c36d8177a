"""Models compiled part by part, and options and rows that used to be dropped without a word."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memrewrite
from memrewrite import GaLore, MemrewriteWarning, VeLoRA

ALL8 = VeLoRA(subtoken_size=8, sites="all")


def blocks(count: int = 2) -> nn.Sequential:
    """Compiled one by one, as torchtitan does."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(count)])
    for block in model:
        memrewrite.compile(block, backend="aot_eager", velora=ALL8)
    return model


def trained(model: nn.Module, *shape: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(shape or (4, 64))).square().mean().backward()
    optimizer.step()
    return model


def test_the_report_gathers_the_parts() -> None:
    model = trained(blocks())
    whole, parts = memrewrite.report(model), [memrewrite.report(block) for block in model]
    assert [r.name for r in whole.sites] == ["0.0", "1.0"]
    assert all(row.decision == "compressed" for row in whole.sites)
    assert [r.name for r in whole.optimizer if len(r.shape) > 1] == ["0.0", "1.0"]
    for key in ("graphs", "saved_bytes_before", "saved_bytes_after", "state_bytes_after"):
        assert whole.totals[key] == sum(part.totals[key] for part in parts) > 0
    key = "peak_bytes_after"
    assert whole.totals[key] == max(part.totals[key] for part in parts)
    assert "0: saved for backward" in str(whole) and "1: saved for backward" in str(whole)
    wrapped = nn.ModuleDict({"module": model[0]})  # as DDP's
    assert memrewrite.report(wrapped).to_dict()["totals"]["recent_calls"] == 1


def test_names_of_rows_are_no_numbers() -> None:
    text = memrewrite.report(blocks(11)).full()
    assert "\n10.0 " in text and "\n0.0 " in text


def test_the_state_of_the_parts_goes_round() -> None:
    model, other = trained(blocks()), blocks()
    state = memrewrite.state_dict(model)
    assert {key.partition("/")[0] for key in state} == {"0", "1"}
    memrewrite.load_state_dict(other, state)
    found = memrewrite.state_dict(other)
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    one = {key: tensor for key, tensor in state.items() if key.startswith("0/")}
    bad = {"1/velora.v.0": torch.ones(3)}
    with pytest.raises(ValueError, match="subtoken_size is 8"):
        memrewrite.load_state_dict(other, one | bad)
    assert all(torch.equal(memrewrite.state_dict(other)[k], state[k]) for k in state)
    with pytest.raises(ValueError, match=r"'7/velora\.v\.0' is of no part that is compiled: 0, 1"):
        memrewrite.load_state_dict(other, {"7/velora.v.0": torch.ones(8)})


def test_the_dump_of_the_parts(tmp_path: Path) -> None:
    model = blocks()
    with pytest.raises(ValueError, match="nothing has been compiled yet"):
        memrewrite.dump(model, tmp_path)
    memrewrite.dump(trained(model), tmp_path)
    assert [(tmp_path / part / "index.html").exists() for part in "01"] == [True, True]


def test_a_model_of_which_nothing_is_compiled() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for ask in (memrewrite.report, memrewrite.state_dict):
        with pytest.raises(ValueError, match="not compiled by memrewrite"):
            ask(model)


# --- rows -----------------------------------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Any:
        return self.b(torch.tanh(self.a(x)))


def test_a_shared_weight_has_two_rows_and_counts_once() -> None:
    model = memrewrite.compile(Shared(), backend="aot_eager", velora=ALL8)
    a, b = memrewrite.report(trained(model, 4, 8, 64)).sites
    assert (a.name, a.decision, b.name, b.decision) == ("a", "compressed", "b", "compressed")
    assert b.reason == "shares its weight with a, where it is counted"
    assert a.bytes_before > 0 == b.bytes_before


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.at = nn.Parameter(torch.randn(48, 64)), nn.Parameter(torch.randn(8, 64))
        self.b = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Any:
        return self.b(torch.einsum("bsd,od->bso", x + self.at, self.w).tanh())


def test_a_weight_of_einsum_has_a_row_and_a_remedy() -> None:
    model = memrewrite.compile(Einsum(), backend="aot_eager", velora=ALL8)
    rows = {row.name: row for row in memrewrite.report(trained(model, 4, 8, 64)).sites}
    assert rows.keys() == {"Einsum.w", "b"}  # what is added needs none
    assert rows["Einsum.w"].decision == "exact"
    assert "batched matmul (of einsum or bmm)" in rows["Einsum.w"].reason
    assert "F.linear" in rows["Einsum.w"].reason


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_an_unknown_option_raises_as_in_torch_compile(backend: Any) -> None:
    model = nn.Linear(16, 16)
    with pytest.raises(RuntimeError, match="Unexpected optimization option no_such"):
        memrewrite.compile(model, backend=backend, options={"no_such": 1})
    assert model._compiled_call_impl is None


@pytest.mark.parametrize(
    "dropped", [{"options": {"max_autotune": True}}, {"mode": "reduce-overhead"}]
)
def test_what_is_inductors_alone_is_told(dropped: dict[str, Any]) -> None:
    with pytest.warns(MemrewriteWarning, match="is Inductor's, so backend"):
        memrewrite.compile(nn.Linear(16, 16), backend="aot_eager", **dropped)


@pytest.mark.parametrize("option", ["velora", "galore", "galore_rank"])
def test_options_of_compile_are_no_arguments_of_the_models_call(option: str) -> None:
    model, x = nn.Linear(16, 16), torch.randn(2, 16)
    with pytest.raises(TypeError, match=rf"estimate takes no {option}=.*compile the model first"):
        memrewrite.estimate(model, x, **{option: None})
    memrewrite.compile(model, backend="aot_eager")
    with pytest.raises(TypeError, match=rf"saved_tensors takes no {option}="):
        memrewrite.saved_tensors(model, x, **{option: None})

    class Own(nn.Linear):
        def forward(self, x: Tensor, velora: Any = None) -> Tensor:
            return super().forward(x)

    assert memrewrite.estimate(Own(16, 16), x, velora=3).rewritten.peak


def test_frozen_quantised_weights_are_not_warned_of() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.uint8), requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemrewriteWarning)
        memrewrite.compile(model, backend="aot_eager", galore=GaLore(4, sites="all"))


@pytest.mark.slow
def test_dora_op_by_op() -> None:
    """Inductor's eye of more than 255 rows counts in uint16."""
    import peft

    found = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 8))
        config = peft.LoraConfig(r=4, target_modules=["0", "2"], use_dora=True)
        model = peft.get_peft_model(model, config)
        if ours:
            memrewrite.compile(model, backend="aot_eager")
        model(torch.ones(4, 300)).square().mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_the_gradient_that_the_readme_names_is_exported() -> None:
    model = memrewrite.compile(nn.Linear(64, 64), backend="aot_eager", velora=ALL8)
    model(torch.randn(4, 64)).sum().backward()
    assert isinstance(model.weight.grad, memrewrite.ProjectedGrad)
