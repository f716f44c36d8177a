"""The extension points: a compressor, a moment and an optimizer from outside of the package."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface import MODELS
from models import Stack, count_saved, gradients, loss_of, relative_errors
from quick import only
from torch import Tensor, nn

import memrewrite
from memrewrite import MemrewriteWarning, VeLoRA
from memrewrite.bench.configurations import parse
from memrewrite.methods.method import METHODS
from memrewrite.session.session import session_of


# --- the proof: a compressor in twenty lines --------------------------------------------------
class BF16(memrewrite.Compressor):
    """bf16 in place of an fp32 activation."""

    name = "bf16"

    def declines(self, x: Tensor) -> str | None:
        return None if x.dtype == torch.float32 else f"x is {x.dtype}"

    def compress(self, x: Tensor) -> Tensor:
        return x.bfloat16()

    def reconstruct(self, z: Tensor, *, shape: Any, dtype: torch.dtype) -> Tensor:
        return z.to(dtype)


# ----------------------------------------------------------------------------------------------


class Scaled(memrewrite.Compressor):
    """Two tensors: 8-bit rows and a scale each; the last dimension is padded to a multiple of 4."""

    name = "scaled"

    def compress(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(1, keepdim=True) + 1e-30
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 4))
        return (padded / scale * 127).round().to(torch.int8), scale

    def reconstruct(self, z: tuple[Tensor, Tensor], *, shape: Any, dtype: torch.dtype) -> Tensor:
        values, scale = z
        return (values.to(dtype) / 127 * scale)[:, : shape[1]].reshape(shape)


def mlp() -> nn.Sequential:
    """Nothing of it can be rebuilt without another matmul: every linear's input is kept."""
    return nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8))


def oracle(
    model: nn.Sequential, x: Tensor, rounded: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """dW = dy^T round(x), by hand; all other gradients are autograd's."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for name, layer in model.named_children():
        inputs[name] = x
        x = outputs[name] = layer(x)
        x.retain_grad()
    x.square().mean().backward()
    found = gradients(model)
    for name, y in outputs.items():
        assert y.grad is not None
        found[f"{name}.weight"] = y.grad.t() @ rounded(inputs[name].detach())
    return found


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_of_a_compressor_are_those_of_its_rounding(dynamic: bool) -> None:
    torch.manual_seed(0)
    model = mlp()
    eager = copy.deepcopy(model)
    memrewrite.compile(model, activations=BF16(), backend="aot_eager", dynamic=dynamic)
    for rows in (6, 10) if dynamic else (6,):
        x = torch.randn(rows, 32)
        for m in (model, eager):
            m.zero_grad()
        loss_of(x)(model).backward()
        theirs = oracle(eager, x, bf16)
        assert max(relative_errors(gradients(model), theirs).values()) < 1e-6
        assert not torch.equal(theirs["1.weight"], (theirs["1.weight"] + 0).bfloat16().float())
    assert len(session_of(model).graphs) == 1


def test_report_dump_saved_tensors_and_estimate_know_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, plain, x = mlp(), mlp(), torch.randn(256, 32)
    memrewrite.compile(model, activations=BF16(), backend="aot_eager")
    memrewrite.compile(plain, backend="aot_eager")
    predicted = memrewrite.estimate(model, x).rewritten.saved
    for m in (model, plain):
        loss_of(x)(m).backward()
    report = memrewrite.report(model)
    assert {row.decision for row in report.sites} == {"compressed"}
    assert all("x in bf16 saved in place of x" in row.reason for row in report.sites)
    kept = memrewrite.saved_tensors(model, x)
    small = [row for row in kept if row.kind == "compressed"]
    assert {row.dtype for row in small} == {torch.bfloat16}
    assert sum(row.bytes for row in small) == 2 * 256 * (32 + 64 + 64)
    alone: Any = lambda m: m(x).sum()  # noqa: E731
    assert kept.bytes == count_saved(model, alone) == report.totals["saved_bytes_after"]
    assert predicted == kept.bytes < count_saved(plain, alone, besides=(x,))
    memrewrite.dump(model, tmp_path)
    record = json.loads((tmp_path / "dump.json").read_text())
    (graph,) = record["graphs"]
    assert graph["passes"][0]["name"] == "compress_activations[bf16]"
    assert all(entry["small_bytes"].keys() == {"bf16"} for entry in graph["inputs"])
    assert "bf16[256, 64]" in (tmp_path / "graph0" / "forward.txt").read_text()


def test_a_compressor_may_keep_several_tensors_and_pad_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 22), nn.Linear(22, 6))
    eager, x = copy.deepcopy(model), torch.randn(9, 30)
    memrewrite.compile(model, activations=Scaled(), backend="aot_eager")
    loss_of(x)(model).backward()
    how, value = Scaled(), torch.float32
    theirs = oracle(
        eager, x, lambda t: how.reconstruct(how.compress(t), shape=tuple(t.shape), dtype=value)
    )
    assert max(relative_errors(gradients(model), theirs).values()) < 1e-6
    rows = [r for r in memrewrite.saved_tensors(model, x) if r.kind == "compressed"]
    assert sorted({str(r.dtype) for r in rows}) == ["torch.float32", "torch.int8"]


@pytest.mark.parametrize("name", only(["llama", "gpt2"], "gpt2"))
def test_a_compressor_on_real_models(name: str) -> None:
    torch.manual_seed(0)
    model, run = MODELS[name](layers=1)
    eager = copy.deepcopy(model)
    memrewrite.compile(model, activations=BF16(), backend="aot_eager")
    run(model).backward()
    run(eager).backward()
    worst = relative_errors(gradients(model), gradients(eager))
    assert 1e-5 < max(worst.values()) < 0.02  # rounded, and no more than that
    vectors = [n for n, p in model.named_parameters() if p.ndim == 1]
    assert max(worst[n] for n in vectors) < 1e-5  # nothing else reads what was rounded


def test_velora_goes_first_and_the_rest_is_compressed() -> None:
    torch.manual_seed(0)
    model = Stack()
    velora = VeLoRA(8, ["*.down_proj"])
    memrewrite.compile(model, velora=velora, activations=BF16(), backend="aot_eager")
    loss_of(torch.randn(4, 32))(model).backward()
    session = session_of(model)
    (binding,) = session.bindings()
    taken: dict[str, set[str]] = {"velora": set(), "bf16": set()}
    for entry in binding.variant.record.inputs:
        for method, weights in entry.compressed.items():
            taken[method] |= {binding.names[w] for w in weights}
    assert taken["velora"] == {"blocks.0.down_proj", "blocks.1.down_proj"}
    assert taken["bf16"] >= {"blocks.0.up_proj", "head"}


def test_an_activation_that_is_declined_stays_exact_and_is_told() -> None:
    torch.manual_seed(0)
    model = mlp().double()
    memrewrite.compile(model, activations=BF16(), backend="aot_eager")
    eager, x = copy.deepcopy(model), torch.randn(6, 32).double()
    loss_of(x)(model).backward()
    loss_of(x)(eager).backward()
    assert max(relative_errors(gradients(model), gradients(eager)).values()) < 1e-14
    reasons = [row.reason for row in memrewrite.report(model).sites]
    assert all("bf16 leaves it exact: x is torch.float64" in reason for reason in reasons)


# --- bad input --------------------------------------------------------------------------------


class Short(BF16):
    name = "short"

    def reconstruct(self, z: Tensor, *, shape: Any, dtype: torch.dtype) -> Tensor:
        return z.to(dtype)[:, 1:]


class Narrow(BF16):
    name = "narrow"

    def reconstruct(self, z: Tensor, *, shape: Any, dtype: torch.dtype) -> Tensor:
        return z


class Writing(BF16):
    name = "writing"

    def compress(self, x: Tensor) -> Tensor:
        return x.mul_(0.5).bfloat16()


class Failing(BF16):
    name = "failing"

    def compress(self, x: Tensor) -> Tensor:
        raise RuntimeError("out of ideas")


class Nothing(BF16):
    name = "nothing"

    def compress(self, x: Tensor) -> Any:
        return None


class Constant(BF16):
    name = "constant"

    def compress(self, x: Tensor) -> Tensor:
        return x * torch.tensor([2.0])


class Looking(BF16):
    name = "looking"

    def compress(self, x: Tensor) -> Tensor:
        return x.bfloat16() if float(x.abs().max()) < 1 else x


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (Short(), r"short\.reconstruct returned float32\[6, 31\] in place of float32\[6, 32\]"),
        (Narrow(), r"narrow\.reconstruct returned bfloat16"),
        (Writing(), r"writing writes to its operands"),
        (Failing(), r"out of ideas"),
        (Nothing(), r"nothing returned None"),
        (Constant(), r"constant reads a constant tensor"),
        (Looking(), r"looking"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_method_that_fails_is_named_and_the_exact_graph_kept(method: Any, told: str) -> None:
    torch.manual_seed(0)
    model = mlp()
    eager, x = copy.deepcopy(model), torch.randn(6, 32)
    memrewrite.compile(model, activations=method, backend="aot_eager")
    with pytest.warns(MemrewriteWarning, match="keeps its exact gradients") as caught:
        loss_of(x)(model).backward()
    text = " ".join(str(w.message) for w in caught)
    assert method.name in text
    assert re.search(told, text), text
    loss_of(x)(eager).backward()
    assert max(relative_errors(gradients(model), gradients(eager)).values()) < 1e-6
    assert all("undone" in row.reason for row in memrewrite.report(model).sites)


def test_a_method_that_changes_an_exact_gradient_is_undone() -> None:
    from memrewrite.methods.method import Context, Task
    from passes.base import Pass, aten, call

    class Wrong(BF16):
        name = "wrong"

        def passes(self, task: Task, context: Context) -> list[Pass]:
            def rewrite(gm: Any) -> None:
                output = gm.graph.output_node()
                found = list(output.args[0])
                at = output.meta["gradient_of"].index(1)  # a bias
                found[at] = call(found[at], aten.mul.Tensor, found[at], 2.0)
                output.args = (tuple(found),)

            changes = frozenset(ask.position for ask in task.asks)
            return [Pass("wrong", rewrite, exact=False, changes=changes)]

    torch.manual_seed(0)
    model = mlp()
    eager, x = copy.deepcopy(model), torch.randn(6, 32)
    memrewrite.compile(model, activations=Wrong(), backend="aot_eager")
    with pytest.warns(MemrewriteWarning, match=r"pass wrong changed the gradient of argument 1"):
        loss_of(x)(model).backward()
    loss_of(x)(eager).backward()
    assert max(relative_errors(gradients(model), gradients(eager)).values()) < 1e-6


def test_a_name_is_registered_once() -> None:
    memrewrite.register("bf16-of-a-test", BF16)
    try:
        with pytest.raises(ValueError, match="'bf16-of-a-test' is registered already"):
            memrewrite.register("bf16-of-a-test", BF16)
        assert parse("activations-bf16-of-a-test").activations == "bf16-of-a-test"
        assert not parse("activations-bf16-of-a-test+checkpointing").exact
        model = mlp()
        memrewrite.compile(model, activations="bf16-of-a-test", backend="aot_eager")
        loss_of(torch.randn(4, 32))(model).backward()
        assert memrewrite.report(model).sites[0].decision == "compressed"
    finally:
        del METHODS["bf16-of-a-test"]
    with pytest.raises(ValueError, match="'bf16-of-a-test' is not registered; known: "):
        memrewrite.compile(mlp(), activations="bf16-of-a-test")
    with pytest.raises(TypeError, match=r"activations=3 is a int; pass a memrewrite\.Compressor"):
        memrewrite.compile(mlp(), activations=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no name"):
        memrewrite.compile(mlp(), activations=memrewrite.Compressor())


def test_a_second_compile_with_an_equal_method_does_nothing() -> None:
    model, method = mlp(), BF16()
    memrewrite.compile(model, activations=method, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert memrewrite.compile(model, activations=method, backend="aot_eager") is model
    with pytest.raises(ValueError, match=r"memrewrite\.restore\(model\)"):
        memrewrite.compile(model, activations=Scaled(), backend="aot_eager")


@pytest.mark.inductor
def test_generated_code_keeps_what_the_compressor_returns() -> None:
    """Inductor would take a cast to bf16 and back away, and with it the method."""
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(256, 32)
    eager = copy.deepcopy(model)
    memrewrite.compile(model, activations=BF16())
    loss_of(x)(model).backward()
    theirs = oracle(eager, x, bf16)
    assert max(relative_errors(gradients(model), theirs).values()) < 1e-5
    kept = memrewrite.saved_tensors(model, x)
    assert sum(r.bytes for r in kept if r.dtype == torch.bfloat16) == 2 * 256 * (32 + 64 + 64)
    alone: Any = lambda m: m(x).sum()  # noqa: E731
    assert kept.bytes == count_saved(model, alone) == 2 * 256 * (32 + 64 + 64)
