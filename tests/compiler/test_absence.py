"""Gradients that never came take no memory, and those that came count as ever: in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import memrewrite
from memrewrite.compiler.absence import with_undefined_tangents
from memrewrite.compiler.backend import Engine
from memrewrite.session.session import session_of
from passes.base import aten
from passes.joint.absent import (
    LEAST,
)

ROWS, CLASSES = 64, 4096  # the smallest logits, in float32, that are worth it


class Classifier(nn.Module):
    """(loss, logits), as a Hugging Face model returns them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16, dtype=dtype)
        self.head = nn.Linear(16, CLASSES, dtype=dtype)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(torch.tanh(self.body(x)))  # (N, C)
        return F.cross_entropy(logits, y), logits


class Zeros(TorchDispatchMode):
    """Counts tensors of zeros of the logits' size."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        zeros = func in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
        self.count += zeros and out.numel() == ROWS * CLASSES
        return out


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 8, dtype=dtype), torch.randint(0, CLASSES, (ROWS,))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the loss": lambda loss, logits: loss,
    "both": lambda loss, logits: loss + logits.square().mean(),
    "the logits": lambda loss, logits: logits.square().mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_plain_model(name: str) -> None:
    torch.manual_seed(0)
    plain, mine = Classifier(torch.float64), Classifier(torch.float64)
    mine.load_state_dict(plain.state_dict())
    memrewrite.compile(mine, backend="aot_eager")
    for _ in range(2):
        x, y = batch(torch.float64)
        for model in (plain, mine):
            LOSSES[name](*model(x, y)).backward()
    for p, q in zip(plain.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-12)


def test_images_in_channels_last_train_as_ever() -> None:
    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.to(memory_format=torch.channels_last)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return y.exp().mean(), y

    torch.manual_seed(0)
    plain, mine = Segments(), Segments()
    mine.load_state_dict(plain.state_dict())
    memrewrite.compile(mine, backend="aot_eager")
    x = torch.randn(2, 3, 192, 192).to(memory_format=torch.channels_last)
    for model in (plain, mine):
        model(x)[0].backward()
    for p, q in zip(plain.parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


@pytest.mark.parametrize(("ours", "expected"), [(False, 1), (True, 0)])
def test_no_zeros_are_filled_in(ours: bool, expected: int) -> None:
    model: Any = Classifier()
    if ours:
        memrewrite.compile(model, backend="aot_eager")
    else:
        model.compile(backend="aot_eager")
    for _ in range(2):
        loss, _ = model(*batch())
        with Zeros() as zeros:
            loss.backward()
        assert zeros.count == expected


def test_report_says_what_is_not_filled_in() -> None:
    model = memrewrite.compile(Classifier(), backend="aot_eager")
    model(*batch())[0].backward()
    text = str(memrewrite.report(model))
    assert f"{ROWS * CLASSES * 4:,} bytes of zeros" in text
    assert memrewrite.report(model).to_dict()["totals"]["absent_bytes"] == LEAST


def test_what_is_done_with_outputs_stays_possible() -> None:
    torch.manual_seed(0)
    plain, theirs, mine = Classifier(), Classifier(), Classifier()
    for model in (theirs, mine):
        model.load_state_dict(plain.state_dict())
    theirs.compile(backend="aot_eager")
    memrewrite.compile(mine, backend="aot_eager")
    x, y = batch()
    found, hooked = [], []
    for model in (plain, theirs, mine):
        loss, logits = model(x, y)
        logits.retain_grad()
        seen: list[Tensor | None] = []
        logits.register_hook(seen.append)
        loss /= 2  # accumulation, in place
        loss.backward(retain_graph=True)
        loss.backward()
        again, _ = checkpoint(model, x, y, use_reentrant=False)
        again.backward()
        with torch.no_grad():
            assert not model(x, y)[0].requires_grad
        found.append([p.grad for p in model.parameters()])
        hooked.append([*seen, logits.grad])
    for a, b, c in zip(*found, strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)
    # A hook on an output of a compiled model sees what is differentiated outside of it: nothing.
    assert hooked[1] == hooked[2] == [None, None, None]


def test_an_output_that_only_autograd_sees_keeps_its_zeros() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Any:
            return x * 1, x * 2

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            ctx.seen = gradients
            assert all(g is not None for g in gradients)
            return gradients[0] + 2 * gradients[1]

    x = torch.randn(3, requires_grad=True)
    (one,) = with_undefined_tangents(lambda x: [Hidden.apply(x)[0]], [0])(x)  # hides the second
    one.sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


def test_a_recorded_cuda_graph_cannot_branch() -> None:
    assert Engine("inductor", None, None, None).branches
    assert not Engine("inductor", "reduce-overhead", None, None).branches
    model = memrewrite.compile(Classifier(), mode="reduce-overhead")
    plan_of: Any = session_of(model)
    assert not plan_of.engine.branches
