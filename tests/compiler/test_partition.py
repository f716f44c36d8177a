"""What the partition recomputes beyond torch's default."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn import functional as F

import memrewrite

D, VOCABULARY, LAYERS = 16, 1024, 3


class Gated(nn.Module):
    """Backward reads both products of x."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = (nn.Linear(D, 4 * D, bias=False) for _ in range(2))
        self.out = nn.Linear(4 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.value(x) * self.gate(x).sigmoid())


class Classifier(nn.Module):
    """A stack and a head that is large beside it, with the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(Gated() for _ in range(LAYERS)))
        self.head = nn.Linear(D, VOCABULARY, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.head(self.body(x))
        return F.cross_entropy(z, y), z


def products_saved(rows: int, **options: Any) -> int:
    torch._dynamo.reset()
    model = memrewrite.compile(Classifier(), backend="aot_eager", **options)
    given = torch.randn(rows, D), torch.randint(VOCABULARY, (rows,))
    model(*given)[0].backward()
    rows = memrewrite.saved_tensors(model, *given)
    return sum(row.operation == "mm" and row.module.startswith("body") for row in rows)


def test_a_loss_in_chunks_spends_a_twentieth_of_the_matmuls_on_recomputing() -> None:
    """One product of each layer, as both are more; where tensors are more than gradients."""
    assert products_saved(256, loss_chunks=4) == LAYERS
    assert products_saved(256, loss_chunks=False) == 2 * LAYERS
    assert products_saved(8, loss_chunks=4) == 2 * LAYERS


def test_a_budget_of_the_users_own_decides() -> None:
    with functorch_config.patch(activation_memory_budget=0.999):
        assert products_saved(256, loss_chunks=4) == 2 * LAYERS
