"""compile() end to end without code generation: gradients, bytes, and ways of training."""

from __future__ import annotations

import copy
import itertools
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    Block,
    Stack,
    assert_same,
    check_against_oracle,
    count_saved,
    gradients,
    loss_of,
    relative_errors,
    vectors_of,
)
from quick import only
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memrewrite
from memrewrite import VeLoRA
from memrewrite.session.session import session_of

ALL8 = VeLoRA(subtoken_size=8, sites="all")


def compiled(model: nn.Module, velora: Any = ALL8, **kwargs: Any) -> nn.Module:
    return memrewrite.compile(model, velora=velora, backend="aot_eager", **kwargs)


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Mixed(nn.Module):
    """A random stack: shapes, biases, forms of linear, sharing and tying drawn."""

    def __init__(self, widths: list[int], forms: list[str], bias: bool) -> None:
        super().__init__()
        self.forms = forms
        pairs = list(pairwise(widths))
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in pairs)
        self.side = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)
        self.raw = nn.ParameterList(nn.Parameter(torch.randn(a, b) / a**0.5) for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for i, form in enumerate(self.forms):
            x = torch.sin(x)
            if form == "shared":
                x = self.linears[i](x) * self.side[i](x)
            elif form == "matmul":
                x = x @ self.raw[i]
            elif form == "tied":
                x = self.linears[i](x) @ self.linears[i].weight
                x = self.linears[i](x)
            else:
                x = self.linears[i](x)
        return x


@pytest.mark.slow
@settings(max_examples=15)
@given(
    widths=st.lists(st.integers(5, 24), min_size=2, max_size=4),
    lead=st.lists(st.integers(2, 4), min_size=1, max_size=3),
    data_=st.data(),
    size=st.integers(2, 9),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.5]),
)
def test_gradients_are_the_oracles(
    widths: list[int], lead: list[int], data_: st.DataObject, size: int, bias: bool, scale: float
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    kinds = st.sampled_from(["plain", "shared", "matmul", "tied"])
    forms = data_.draw(st.lists(kinds, min_size=len(widths) - 1, max_size=len(widths) - 1))
    model = Mixed(widths, forms, bias).double()
    x = data(*lead, widths[0])
    if all(width < size for width in widths[:-1]):
        return
    velora = VeLoRA(subtoken_size=size, sites="all", scale=scale)
    check_against_oracle(model, loss_of(x), velora, 1e-10, backend="aot_eager")


@pytest.mark.slow
@settings(max_examples=10)
@given(
    depth=st.integers(1, 3),
    features=st.integers(9, 40),
    hidden=st.integers(9, 64),
    lead=st.lists(st.integers(2, 5), min_size=1, max_size=2),
    size=st.integers(2, 9),
)
def test_kept_bytes_are_the_predicted_ones(
    depth: int, features: int, hidden: int, lead: list[int], size: int
) -> None:
    torch._dynamo.reset()
    model, x = Stack(depth, features, hidden).double(), data(*lead, features)
    compiled(model, VeLoRA(subtoken_size=size, sites="all"))
    loss_of(x)(model).backward()
    report = memrewrite.report(model)
    free = tuple(vectors_of(model).values())
    assert count_saved(model, lambda m: m(x), free) == report.totals["saved_bytes_after"]


class Relu(nn.Module):
    """No input of its linears can be rebuilt without a matmul, so every z is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(24, 40), nn.Linear(40, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.dropout(self.b(F.dropout(self.a(x), 0.5)), 0.5))


def test_z_has_the_predicted_size_in_the_graph_and_in_memory() -> None:
    model, x = Relu().double(), data(6, 24)
    compiled(model, VeLoRA(subtoken_size=16, sites=["b", "c"]))
    run = loss_of(x)
    run(model).backward()
    groups = -(-40 // 16)  # the last sub-token is padded
    rows = {r.name: r for r in memrewrite.report(model).sites}
    for name in ("b", "c"):
        assert rows[name].reason.startswith("z saved"), rows[name]
        assert rows[name].bytes_before == 6 * 40 * 8
        assert rows[name].bytes_after == 6 * groups * 8
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(model)
    ours = [t for t in kept if not isinstance(t, nn.Parameter)]
    zs = [t for t in ours if tuple(t.shape) == (6, groups) and t.dtype == torch.float64]
    assert [t.untyped_storage().nbytes() for t in zs[:2]] == [6 * groups * 8] * 2
    wide = [t for t in ours if tuple(t.shape) == (6, 40)]
    assert {t.dtype for t in wide} == {torch.bool}  # the dropout masks, and no activation


def test_without_velora_gradients_are_torch_compiles() -> None:
    model, x = Stack(1).double(), data(4, 5, 32)
    plain = copy.deepcopy(model)
    plain.compile(backend="aot_eager")
    loss_of(x)(plain).backward()
    compiled(model, velora=False)
    loss_of(x)(model).backward()
    assert max(relative_errors(gradients(model), gradients(plain)).values()) < 1e-12
    rows = memrewrite.report(model).sites
    assert all(
        r.decision == "exact" and r.reason.startswith("no compression is asked for") for r in rows
    )
    totals = memrewrite.report(model).totals
    assert totals["saved_bytes_after"] < totals["saved_bytes_before"]


def test_dynamic_shapes_compile_once_and_follow_the_oracle() -> None:
    model = Stack(1).double()
    reference = copy.deepcopy(model)
    compiled(model, dynamic=True)
    loss_of(data(4, 5, 32))(model).backward()
    model.zero_grad()
    x = data(3, 7, 32)
    loss_of(x)(model).backward()
    assert len(session_of(model).graphs) == 1
    import oracle
    from models import vectors

    with oracle.velora(vectors(model, reference)):
        loss_of(x)(reference).backward()
    assert max(relative_errors(gradients(model), gradients(reference)).values()) < 1e-10
    assert "s" in memrewrite.report(model).totals["formula_after"]


@pytest.mark.parametrize("dtype", only([torch.bfloat16, torch.float16], torch.bfloat16), ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    model, x = Stack(1), torch.randn(4, 5, 32)

    def run(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(x).float().square().mean()

    velora = VeLoRA(subtoken_size=8, sites="all")
    compiled(model, velora)
    run(model).backward()
    report = memrewrite.report(model)
    assert {r.decision for r in report.sites} == {"compressed"}
    reference = Stack(1)
    reference.load_state_dict(model.state_dict())
    import oracle
    from models import vectors

    with oracle.velora(vectors(model, reference)):
        loss_of(x)(reference).backward()
    errors = relative_errors(gradients(model), gradients(reference))
    assert max(errors.values()) < (0.05 if dtype is torch.bfloat16 else 0.01), errors
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_two_forwards_before_one_backward_and_accumulation() -> None:
    model, xs = Stack(1).double(), [data(4, 32), data(4, 32)]
    reference = copy.deepcopy(model)
    compiled(model)
    first, second = (loss_of(x)(model) for x in xs)
    (first + second).backward()
    once = gradients(model)
    model.zero_grad()
    for x in xs:
        loss_of(x)(model).backward()
    assert max(relative_errors(gradients(model), once).values()) < 1e-12
    import oracle
    from models import vectors

    with oracle.velora(vectors(model, reference)):
        for x in xs:
            loss_of(x)(reference).backward()
    assert max(relative_errors(once, gradients(reference)).values()) < 1e-10


def test_train_eval_no_grad_and_inference() -> None:
    model, x = Stack(1).double(), data(4, 32)
    expected = model(x)
    compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert "inference" in str(memrewrite.report(model))
    loss_of(x)(model).backward()
    before = memrewrite.state_dict(model)
    model.eval()
    torch.testing.assert_close(model(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
    model.train()
    loss_of(x * 2)(model).backward()
    assert_same(memrewrite.state_dict(model), before)
    assert {r.decision for r in memrewrite.report(model).sites} == {"compressed"}


class Checkpointed(Stack):
    checkpointing = True

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(x)


class CheckpointedAttention(nn.Module):
    """What is recomputed draws random numbers: their state is kept as well."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def attend(self, x: Tensor, block: nn.Module) -> Tensor:
        y = block(x)
        return x + F.scaled_dot_product_attention(y, y, y, dropout_p=0.0)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(self.attend, x, block, use_reentrant=False)
        return x


def test_checkpointed_attention() -> None:
    x = torch.randn(2, 4, 6, 32).double()
    model = CheckpointedAttention().double()
    model(x).square().mean().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    memrewrite.compile(model, backend="aot_eager")
    model(x).square().mean().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_checkpointing_inside_the_model() -> None:
    x = data(4, 5, 32)

    def without(model: nn.Module) -> Tensor:
        model.checkpointing = False  # the oracle cannot look into a recomputation
        return loss_of(x)(model)

    model, plain = Checkpointed().double(), Stack().double()
    report = check_against_oracle(model, loss_of(x), ALL8, 1e-10, without, backend="aot_eager")
    assert {r.decision for r in report.sites} == {"compressed"}
    compiled(plain)
    loss_of(x)(plain).backward()
    kept = memrewrite.report(plain).totals["saved_bytes_after"]
    assert report.totals["saved_bytes_after"] < kept


class Broken(Stack):
    """A graph break before each block: blocks of one shape share one captured graph."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x)
        return self.head(x)


def test_graph_breaks_and_layers_that_share_one_graph() -> None:
    model = Broken(3).double()
    report = check_against_oracle(model, loss_of(data(4, 5, 32)), ALL8, 1e-10, backend="aot_eager")
    exact = {r.name: r.reason for r in report.sites if r.decision == "exact"}
    assert exact == {"head": "not part of any compiled training graph"}  # Dynamo leaves it eager
    assert len(session_of(model).graphs) == 2  # the first block's input needs no gradient
    assert [len(g.bindings) for g in session_of(model).graphs] == [1, 2]


@pytest.mark.slow
def test_layers_of_one_graph_that_are_selected_differently() -> None:
    velora = VeLoRA(subtoken_size=8, sites=["blocks.1.*"])
    report = check_against_oracle(
        Broken(3).double(), loss_of(data(4, 5, 32)), velora, 1e-10, backend="aot_eager"
    )
    compressed = {r.name for r in report.sites if r.decision == "compressed"}
    assert compressed == {f"blocks.1.{n}_proj" for n in ("gate", "up", "down")}


@torch._dynamo.config.patch(recompile_limit=2)
def test_several_models_in_one_process() -> None:
    """More than Dynamo compiles of one function."""
    models = [Stack(1).double() for _ in range(3)]
    x = data(4, 32)
    for model in models:
        compiled(model)
        loss_of(x)(model).backward()
        assert len(session_of(model).graphs) == 1
    other, plain = Block().double(), Block().double()
    plain.load_state_dict(other.state_dict())
    compiled(other, velora=False)
    for model in (other, plain):
        loss_of(x)(model).backward()
    assert len(session_of(other).graphs) == 1
    assert max(relative_errors(gradients(other), gradients(plain)).values()) < 1e-12


def encoder_layer(layer: Any, x: Tensor) -> Tensor:
    """nn.TransformerEncoderLayer written out, so that the oracle sees its packed projection."""
    attention = layer.self_attn
    packed = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    heads = packed.unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)  # (3, B, 4, S, 8)
    mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    x = layer.norm1(x + attention.out_proj(mixed))
    return layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))


def test_stock_modules_are_really_compiled() -> None:
    """Dynamo skips frames of torch.nn: in-place compilation of these is a silent no-op."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True).double()
    x = data(3, 6, 32)
    report = check_against_oracle(
        layer,
        loss_of(x),
        ALL8,
        1e-10,
        run_eager=lambda m: encoder_layer(m, x).square().mean(),
        backend="aot_eager",
    )
    decisions = {r.name: r.decision for r in report.sites}
    assert decisions["self_attn.in_proj_weight"] == "compressed"  # Dynamo shows no linear there
    assert decisions["linear2"] == "compressed"
    sequential = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32)).double()
    check_against_oracle(sequential, loss_of(x), ALL8, 1e-10, backend="aot_eager")
    linear = nn.Linear(32, 8).double()
    report = check_against_oracle(linear, loss_of(x), ALL8, 1e-10, backend="aot_eager")
    assert [r.name for r in report.sites] == ["Linear"]


def test_frozen_layers_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 16)
            self.body = nn.Linear(16, 16)
            self.head = nn.Linear(16, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(self.embed(tokens))))

    model = Tied().double()
    tokens = torch.randint(0, 11, (3, 4))
    report = check_against_oracle(
        model, lambda m: m(tokens).square().mean(), ALL8, 1e-10, backend="aot_eager"
    )
    assert {r.name: r.decision for r in report.sites} == {
        "body": "compressed",
        "head": "compressed",
    }
    frozen = Tied().double()
    frozen.body.requires_grad_(False)
    report = check_against_oracle(
        frozen, lambda m: m(tokens).square().mean(), ALL8, 1e-10, backend="aot_eager"
    )
    assert next(r for r in report.sites if r.name == "body").reason == "not trained"


def test_a_v_projection_whose_input_q_and_k_still_need_says_so() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(self.first(x), 0.5)
            return self.q_proj(h) * self.k_proj(h) * self.v_proj(h)

    model = Attention().double()
    compiled(model, VeLoRA(subtoken_size=8, sites="auto"))
    loss_of(data(4, 16))(model).backward()
    row = next(r for r in memrewrite.report(model).sites if r.name == "v_proj")
    assert row.decision == "compressed"
    assert (
        "kept alive by the exact gradient of q_proj and the exact gradient of k_proj" in row.reason
    )
    assert "frees no bytes" in row.reason and "shared with q_proj, k_proj" in row.reason


def test_a_failing_rewrite_keeps_the_exact_gradient_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from passes.base import Pass

    def explode(gm: Any) -> None:
        raise RuntimeError("planted")

    from memrewrite.compiler import backend

    monkeypatch.setattr(backend, "passes_for", lambda *_: [Pass("planted", explode, False)])
    model, x = Stack(1).double(), data(4, 32)
    plain = copy.deepcopy(model)
    compiled(model)
    with pytest.warns(memrewrite.MemrewriteWarning, match="planted"):
        loss_of(x)(model).backward()
    loss_of(x)(plain).backward()
    assert max(relative_errors(gradients(model), gradients(plain)).values()) < 1e-12
    report = memrewrite.report(model)
    assert "REWRITE FAILED" in str(report)
    assert all(r.decision == "exact" for r in report.sites)


class Dropped(nn.Module):
    """Its first output shows which mask the forward drew."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.a, self.b, self.dropout = nn.Linear(16, 32), nn.Linear(32, 24), nn.Dropout(0.3)
        self.checkpointed = checkpointed

    def drop(self, x: Tensor) -> Tensor:
        return self.dropout(torch.relu(self.a(x) + 3))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = checkpoint(self.drop, x, use_reentrant=False) if self.checkpointed else self.drop(x)
        return h, self.b(h)


inductor = pytest.mark.inductor


@pytest.mark.parametrize(
    ("backend", "velora", "checkpointed", "budget"),
    [
        *(("aot_eager", *case) for case in itertools.product([False, True], [False, True], [1, 0])),
        pytest.param("inductor", False, False, 1, marks=inductor),
        pytest.param("inductor", True, False, 1, marks=inductor),
        pytest.param("inductor", False, True, 1, marks=inductor),
    ],
)
def test_backward_reads_the_mask_that_forward_drew(
    backend: str, velora: bool, checkpointed: bool, budget: float
) -> None:
    """Recomputed, a random operation would draw another one."""
    torch.manual_seed(0)
    model = Dropped(checkpointed)
    how = VeLoRA(4, ["a"]) if velora else False
    memrewrite.compile(model, velora=how, backend=backend)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        h, y = model(torch.randn(64, 16))
    weight = model.b.weight.detach().clone()
    y.sum().backward()
    mask = (h.detach() != 0).float() / 0.7
    torch.testing.assert_close(model.a.bias.grad, (mask * weight.sum(0)).sum(0))
    torch.testing.assert_close(model.b.weight.grad, h.detach().sum(0).expand(24, -1))
    totals = memrewrite.report(model).to_dict()["totals"]
    if budget:  # under a budget torch's own backward draws another mask
        assert totals["saved_bytes_after"] <= totals["saved_bytes_before"]  # booleans, or a seed
