"""The loss in chunks where rows have gradients of their own: class weights, no mean, z-loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph
from torch.profiler import ProfilerActivity, profile

import memrewrite
from memrewrite.loss.lazy import LazyLogits
from memrewrite.session.session import session_of
from passes.chunked_rows import backward_op, calls, op

D, V = 6, 13
F64 = torch.float64
Built = tuple[Tensor, Tensor]


@given(
    rows=st.integers(1, 9),
    chunks=st.integers(0, 11),
    biased=st.booleans(),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    steps=st.lists(st.sampled_from([0.5, -2.0, 0.0]), max_size=3),
    ignored=st.sets(st.integers(0, 8)),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_equal_to_losses_and_logsumexp_of_whole_logits(
    rows: int,
    chunks: int,
    biased: bool,
    weighted: bool,
    smoothing: float,
    steps: list[float],
    ignored: set[int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    h, w, b = (torch.randn(s, dtype=F64, requires_grad=True) for s in ((rows, D), (V, D), (V,)))
    y = torch.randint(0, V, (rows,))
    y[[i for i in ignored if i < rows]] = -1
    q, bias = torch.rand(V, dtype=F64) if weighted else None, b if biased else None
    z = F.linear(h, w, bias)
    for step in steps:
        z = z * step if step else z.tanh()
    of_rows = F.cross_entropy(z, y, q, None, -1, None, "none", smoothing)
    want = (of_rows, z.logsumexp(1))
    got = op(h, w, bias, y, q, steps, False, -1, smoothing, chunks, True, F64)
    used, g = [h, w, b][: 2 + biased], torch.randn(2, rows, dtype=F64).unbind()
    ours, theirs = (torch.autograd.grad(outputs, used, g) for outputs in (got, want))
    for mine, other in zip((*got, *ours), (*want, *theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_shapes_and_strides_are_those_that_fake_tensors_promise() -> None:
    h, w, y = torch.randn(D, 7).t(), torch.randn(V, D), torch.randint(V, (7,))
    given = torch.ones(7), torch.ones(7), h, w, None, y, None, [], False, -100, 0.0, 3, True
    torch.library.opcheck(backward_op, (*given, torch.float32), test_utils="test_faketensor")


def weighted(z: Tensor, y: Tensor, q: Tensor) -> Built:
    return F.cross_entropy(z.view(-1, V), y.view(-1), weight=q), z


def weighted_sum(z: Tensor, y: Tensor, q: Tensor) -> Built:
    z = z / 0.3
    rows, labels = z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)
    return F.cross_entropy(rows, labels, q, reduction="sum", label_smoothing=0.1), z


def masked(z: Tensor, y: Tensor, q: Tensor) -> Built:
    losses = F.cross_entropy(z.view(-1, V), y.view(-1), reduction="none").view_as(y)
    return (losses * (y > 2)).sum() / (y > 2).sum(), z


def squared(z: Tensor, y: Tensor, q: Tensor) -> Built:
    """The scale is within what the losses read, and the bound is a soft cap."""
    z = 3 * torch.tanh(z / 3)
    rows = F.cross_entropy(z.float().view(-1, V), y.view(-1), q, reduction="none")
    return rows.square().mean(), z


def z_loss(z: Tensor, y: Tensor, q: Tensor) -> Built:
    loss = F.cross_entropy(z.view(-1, V), y.view(-1), ignore_index=3)
    return loss + 0.1 * z.logsumexp(-1).square().mean(), z


def z_loss_first(z: Tensor, y: Tensor, q: Tensor) -> Built:
    flat, labels = z.view(-1, V), y.view(-1)
    penalty = torch.logsumexp(flat, dim=-1).square()
    return (F.cross_entropy(flat, labels, reduction="none") + penalty).mean(), z


def two_norms(z: Tensor, y: Tensor, q: Tensor) -> Built:
    z = z * 2
    penalty = z.logsumexp(dim=2)[:, 1:].square().mean() + z.logsumexp([-1]).mean()
    return F.cross_entropy(z.view(-1, V), y.view(-1)) + penalty, z


class Model(nn.Module):
    """A loss of logits and class weights."""

    def __init__(self, loss: Callable[..., Built]) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.q: Tensor
        self.register_buffer("q", torch.rand(V))
        self.loss = loss

    def forward(self, tokens: Tensor) -> Built:
        return self.loss(self.head(self.embedding(tokens)), tokens, self.q)


def pair(loss: Callable[..., Built], **how: Any) -> tuple[Model, Model, Tensor]:
    torch.manual_seed(0)
    model = Model(loss)
    how = {"loss_chunks": 3, "backend": "aot_eager", **how}
    return model, memrewrite.compile(copy.deepcopy(model), **how), torch.randint(V, (2, 7))


@pytest.mark.parametrize(
    "loss", [weighted, weighted_sum, masked, squared, z_loss, z_loss_first, two_norms]
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_models_train_as_before_and_never_hold_their_logits(
    loss: Callable[..., Built], dynamic: bool
) -> None:
    model, compiled, tokens = pair(loss, dynamic=dynamic)
    (want, logits), (got, lazy) = model(tokens), compiled(tokens)
    assert type(lazy) is LazyLogits
    torch.testing.assert_close(got, want)
    (2 * got).backward(), (2 * want).backward()
    for p, q in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(lazy + 0, logits)
    assert "computed again in backward" in str(memrewrite.report(compiled)).replace("\n", " ")
    (record,) = [b.variant.record for b in session_of(compiled).bindings()]
    if not dynamic:
        text = "".join(listing for _, listing in record.listings())
        assert f"14, {V}]" not in text and f"7, {V}]" not in text


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_head(frozen: str) -> None:
    model, compiled, tokens = pair(masked)
    for m in (model, compiled):
        getattr(m.head, frozen).requires_grad_(False)
        m(tokens)[0].backward()
    for p, q in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_velora_leaves_such_a_head_exact_and_says_why() -> None:
    velora = memrewrite.VeLoRA(3, sites="all")
    model, compiled, tokens = pair(masked, velora=velora)
    model(tokens)[0].backward(), compiled(tokens)[0].backward()
    torch.testing.assert_close(compiled.head.weight.grad, model.head.weight.grad)
    assert "computed with the loss, in chunks" in str(memrewrite.report(compiled)).replace(
        "\n", " "
    )


def other_logits(z: Tensor, y: Tensor, q: Tensor) -> Built:
    return F.cross_entropy((2 * z).view(-1, V), y.view(-1)) + z.logsumexp(-1).mean(), z


def over_rows(z: Tensor, y: Tensor, q: Tensor) -> Built:
    return F.cross_entropy(z.view(-1, V), y.view(-1)) + z.logsumexp(1).mean(), z


def labels_late(z: Tensor, y: Tensor, q: Tensor) -> Built:
    penalty = z.logsumexp(-1).mean()
    return F.cross_entropy(z.view(-1, V), y.view(-1) // 2) + penalty, z


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (other_logits, "logits that are not those of the loss"),
        (over_rows, "reads the logits too"),
        (labels_late, "before the labels are made"),
    ],
)
def test_others_stay_whole_and_say_why(loss: Callable[..., Built], why: str) -> None:
    model, compiled, tokens = pair(loss)
    with pytest.warns(memrewrite.MemrewriteWarning, match=why):
        got, want = compiled(tokens), model(tokens)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_its_gradients_are_as_near_to_float64_as_plain_ones(dtype: Any) -> None:
    errors = []
    for chunks in (3, False):
        model, compiled, tokens = pair(weighted, loss_chunks=chunks)
        exact = copy.deepcopy(model).double()
        exact(tokens)[0].backward()
        with torch.autocast("cpu", dtype):
            compiled(tokens)[0].backward()
        pairs = zip(compiled.parameters(), exact.parameters(), strict=True)
        errors.append([float((p.grad - q.grad).norm() / q.grad.norm()) for p, q in pairs])  # type: ignore[union-attr,operator]
    assert all(mine < 1.5 * plain + 1e-3 for mine, plain in zip(*errors, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_within_both_operations_is_that_predicted(dtype: Any) -> None:
    h, w = torch.randn(512, 16, dtype=dtype), torch.randn(4096, 16)
    given = h, w, None, torch.randint(4096, (512,)), None, [], True, -100, 0.0, 4, True, dtype
    g = torch.randn(2, 512).unbind()
    graph, predicted = Graph(), []
    for target, arguments in ((op, given), (backward_op, (*g, *given))):
        nodes: list[Any] = []
        for value in arguments:
            nodes.append(graph.placeholder("t") if isinstance(value, Tensor) else value)
            if isinstance(value, Tensor):
                nodes[-1].meta["val"] = value
        graph.call_function(target, tuple(nodes))
    for (node, bytes_, _), arguments in zip(calls(graph), (given, (*g, *given)), strict=True):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            kept = node.target(*arguments)  # type: ignore[operator]
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = most = 0
        for event in events:
            live += event.nbytes()
            most = max(most, live)
        assert kept is not None
        predicted.append((most - live) / bytes_)
    assert predicted == pytest.approx([1, 1], rel=0.03)
