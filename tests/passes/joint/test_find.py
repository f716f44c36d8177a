"""Which matmuls are weight gradients, and which near misses are left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphs import joint_graph
from torch import Tensor

from passes.joint.find import Found, shared_inputs, weight_gradients

W = torch.randn(6, 8)
X2, X3, X4 = torch.randn(5, 8), torch.randn(2, 5, 8), torch.randn(2, 3, 5, 8)


def found(fn: Callable[..., Tensor], weights: list[Tensor], inputs: list[Tensor]) -> Found:
    gm = joint_graph(fn, weights, inputs)
    return weight_gradients(gm.graph, set(range(len(weights))))


FORMS = {  # name -> (function, weight, bias or not, transposed)
    "mm": (lambda w, x: x @ w.t(), W, False),
    "linear": (lambda w, x: F.linear(x, w), W, False),
    "addmm": (lambda w, x: torch.addmm(torch.ones(6), x.reshape(-1, 8), w.t()), W, False),
    "Conv1D": (lambda w, x: torch.addmm(torch.ones(6), x.reshape(-1, 8), w), W.t(), True),
    "x @ W": (lambda w, x: x @ w, W.t(), True),
    "behind a cast": (lambda w, x: F.linear(x.double(), w.double()), W, False),
    "behind views": (lambda w, x: F.linear(x.reshape(-1, 4, 2).reshape(-1, 8), w), W, False),
    "twisted weight": (lambda w, x: x @ w.reshape(3, 2, 8).reshape(6, 8).t(), W, False),
}


@pytest.mark.parametrize("x", [X2, X3, X4], ids=["2d", "3d", "4d"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_finds_every_form(form: str, x: Tensor) -> None:
    fn, weight, transposed = FORMS[form]
    result = found(lambda w, x: fn(w, torch.tanh(x)), [weight.contiguous()], [x])
    (gradient,) = result.gradients
    assert (gradient.weight, gradient.features) == (0, 8)
    assert gradient.storage_name.startswith("_to_copy" if "cast" in form else "tanh")
    assert gradient.transposed is transposed
    assert not result.refused


def test_bias_gradient_is_no_weight_gradient() -> None:
    result = found(lambda w, b, x: F.linear(x, w, b), [W, torch.randn(6)], [X2])
    assert [g.weight for g in result.gradients] == [0]
    assert list(result.refused) == [1]


def test_q_k_and_v_share_one_input() -> None:
    result = found(
        lambda q, k, v, o, x: F.linear(
            F.linear(torch.tanh(x), q) * F.linear(torch.tanh(x), k) * F.linear(torch.tanh(x), v), o
        ),
        [W, W + 1, W + 2, torch.randn(8, 6)],
        [X3],
    )
    # three tanh nodes of one value are three tensors until common subexpressions merge
    assert len(shared_inputs(result.gradients)) == 4

    def qkv(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        return F.linear(h, q) * F.linear(h, k) * (h.reshape(-1, 8) @ v).reshape(2, 5, 6)

    shared = shared_inputs(found(qkv, [W, W + 1, W.t().clone()], [X3]).gradients)
    assert [[g.weight for g in group] for group in shared] == [[0, 1, 2]]


def test_autocast_casts_of_one_input_are_one_input() -> None:
    def twice(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        return F.linear(h.bfloat16(), q.bfloat16()) + F.linear(h.bfloat16(), k.bfloat16())

    assert len(shared_inputs(found(twice, [W, W + 1], [X3]).gradients)) == 1


def test_a_transposed_reading_is_another_tensor() -> None:
    square = torch.randn(8, 8)

    def both(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        return F.linear(h, a) + F.linear(h.t(), b)

    assert len(shared_inputs(found(both, [square, square + 1], [square]).gradients)) == 2


def test_tied_weight_has_one_term_per_use() -> None:
    result = found(lambda w, x: F.linear(F.linear(x, w).tanh(), w.t()), [W], [X2])
    assert [g.weight for g in result.gradients] == [0, 0]
    tokens = torch.tensor([1, 2, 3])
    tied = found(lambda w, t: F.linear(F.embedding(t, w).tanh(), w), [W], [tokens])
    assert [g.features for g in tied.gradients] == [8]  # the embedding's own term stays


NEAR_MISSES = {
    "merged LoRA": (lambda a, b, x: F.linear(x, b @ a), [torch.randn(2, 8), torch.randn(6, 2)]),
    "weight norm": (lambda w, g, x: F.linear(x, g * w / w.norm()), [W, torch.ones(1)]),
    "scaled weight": (lambda w, s, x: F.linear(x, w * s), [W, torch.ones(6, 1)]),
    "elementwise": (lambda w, b, x: (x[..., :6] * w[:5, :6]) + b, [W, torch.ones(6)]),
    "stack": (
        lambda w, b, x: torch.einsum("nd,eod->eno", x, w) * b,
        [torch.randn(3, 6, 8), W[:1, :1]],
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES, ids=str)
def test_near_misses_are_refused_with_a_reason(case: str) -> None:
    fn, weights = NEAR_MISSES[case]
    result = found(fn, weights, [X2])
    assert not result.gradients
    assert set(result.refused) == {0, 1} and all(result.refused.values())


def test_a_matmul_that_serves_two_outputs_is_refused() -> None:
    gm = joint_graph(lambda w, x: F.linear(x, w), [W], [X2])
    (matmul,) = [n for n in gm.graph.nodes if n.target is torch.ops.aten.mm.default][1:2]
    output = gm.graph.output_node()
    output.args = ((*output.args[0], matmul),)
    output.meta["gradient_of"].append(None)
    result = weight_gradients(gm.graph, {0})
    assert not result.gradients
    assert "also serves" in result.refused[0]
