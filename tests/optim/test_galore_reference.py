"""Against the galore-torch package, where the two definitions coincide.

They differ in three places, which the test takes out: eps (theirs is added before the bias
correction; here it is negligible), decay (after the step; here none), and the signs of a new
basis (LAPACK's; here aligned with the old one, as ours are).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from galore_torch import GaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector
from torch import Tensor, nn

import memrewrite
from memrewrite import GaLore
from memrewrite.session.session import session_of


def with_aligned_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = GaLoreProjector.get_orthogonal_matrix

    def aligned(self: Any, weights: Tensor, rank: int, type: str) -> Tensor:
        new, old, dim = raw(self, weights, rank, type), self.ortho_matrix, int(type == "right")
        if old is None:
            return new
        return torch.where((new * old).sum(dim, keepdim=True) < 0, -new, new)

    monkeypatch.setattr(GaLoreProjector, "get_orthogonal_matrix", aligned)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)])
@pytest.mark.parametrize(("side", "theirs"), [("short", "std"), ("long", "reverse_std")])
def test_fifty_steps_with_two_refreshes(
    shape: tuple[int, int], side: Any, theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_aligned_signs(monkeypatch)
    model = nn.Linear(*shape[::-1], bias=False)
    other = nn.Parameter(model.weight.detach().clone())
    galore = GaLore(4, update_every=20, refresh="svd", side=side, sites="all")
    memrewrite.compile(model, galore=galore, backend="aot_eager")
    session_of(model).calls.called = True  # the gradients are set by hand
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-20, weight_decay=0.0)
    group = {"rank": 4, "update_proj_gap": 20, "scale": 0.25, "proj_type": theirs}
    reference = GaLoreAdamW(
        [{"params": [other], **group}], lr=0.01, eps=1e-20, no_deprecation_warning=True
    )
    direction = torch.randn(shape)
    for _ in range(50):
        model.weight.grad = torch.randn(shape) + direction
        other.grad = model.weight.grad.clone()
        optimizer.step()
        reference.step()
    ours, theirs_now = model.weight.detach(), other.detach()
    assert float((ours - theirs_now).abs().max() / theirs_now.abs().max()) < 1e-4
