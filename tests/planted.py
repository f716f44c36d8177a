"""Models and ways of training for the bench to measure, some of them planted to be caught."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import Tensor, nn

BALLAST = 100_000_000  # bytes


class Regression(nn.Module):
    """A multilayer perceptron that returns its loss."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        layers = [m for _ in range(4) for m in (nn.Linear(width, width), nn.Tanh())]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).square().mean()


def model() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """(model, args, kwargs): a step of some tens of milliseconds."""
    return Regression(), (torch.randn(512, 512),), {}


def plain(model: nn.Module) -> None:
    """The model as it is."""


def twice(model: nn.Module) -> None:
    """Everything is computed two times."""
    own: Any = model.forward

    def again(module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():
            torch.autograd.grad(own(*args), list(module.parameters()))

    model.register_forward_pre_hook(again)


def heavy(model: nn.Module) -> None:
    """BALLAST bytes are held while the forward runs."""
    held: list[Tensor] = []

    def load(module: nn.Module, args: tuple[Any, ...]) -> None:
        held.append(torch.ones(BALLAST // 4))

    def unload(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        held.clear()

    model.register_forward_pre_hook(load)
    model.register_forward_hook(unload)


def raises(model: nn.Module) -> None:
    """An ordinary error in the forward."""

    def fail(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise ArithmeticError("planted")

    model.register_forward_pre_hook(fail)


def too_large(model: nn.Module) -> None:
    """More memory than any machine has."""
    model.register_forward_pre_hook(lambda module, args: torch.empty(2**55) and None)


def killed(model: nn.Module) -> None:
    """As the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def silent(model: nn.Module) -> None:
    """It never answers."""
    signal.pause()
