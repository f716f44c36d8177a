"""A small net with GaLore in a stock Adam; gradients are set by hand, no forward is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import memrewrite
from memrewrite import GaLore
from memrewrite.session.session import session_of

EXACT = GaLore(rank=2, update_every=4, refresh="svd")


class Net(nn.Module):
    """Tall, wide and square weights, a bias, a norm, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.up = nn.Linear(8, 16)
        self.mix = nn.Linear(16, 16, bias=False)
        self.down = nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 12, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.mix(torch.tanh(self.up(self.embedding(ids)))))
        return self.lm_head(self.norm(self.down(h)))


BODY = ("up.weight", "mix.weight", "down.weight")


def net(galore: GaLore | None = EXACT, seed: int = 0, **kwargs: Any) -> Net:
    torch.manual_seed(seed)
    model = Net().double()
    if galore is None:
        return model
    return compiled(model, galore=galore, **kwargs)


def compiled(model: Any, **kwargs: Any) -> Any:
    memrewrite.compile(model, backend="aot_eager", **kwargs)
    session_of(model).calls.called = True  # most of these tests set gradients themselves
    return model


def gradients(model: nn.Module, step: int) -> None:
    """The same gradients for every model of one shape: no forward is needed."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def fit(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        gradients(model, step)
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def collected(model: nn.Module, name: str, steps: range) -> list[Tensor]:
    grads = []
    for step in steps:
        gradients(model, step)
        grads.append(model.get_parameter(name).grad.clone())  # type: ignore[union-attr]
    model.zero_grad()
    return grads
