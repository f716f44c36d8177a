"""GaLore's Adam in eager PyTorch, written from the paper's algorithm 2: the tests' oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def top(g: Tensor, rank: int, left: bool, old: Tensor | None) -> Tensor:
    """Leading singular vectors, with the signs nearest to the basis before."""
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    p = (u if left else vh.T)[:, :rank]
    return p if old is None else torch.where((p * old).sum(0) < 0, -p, p)


def train(
    w: Tensor, grads: Sequence[Tensor], rank: int, left: bool, every: int, scale: float,
    lr: float, betas: tuple[float, float], eps: float, decay: float, decoupled: bool,
    amsgrad: bool = False, maximize: bool = False,
) -> Tensor:  # fmt: skip
    m = v = u = torch.zeros((), dtype=w.dtype)
    p: Tensor | None = None
    for t, g in enumerate(grads, 1):
        p = top(g, rank, left, p) if (t - 1) % every == 0 or p is None else p
        g = (-g if maximize else g) + (0 if decoupled else decay * w)
        r = p.T @ g if left else g @ p
        m = betas[0] * m + (1 - betas[0]) * r
        v = betas[1] * v + (1 - betas[1]) * r * r
        u = torch.maximum(u, v) if amsgrad else v
        n = m / (1 - betas[0] ** t) / ((u / (1 - betas[1] ** t)).sqrt() + eps)
        step = lr * scale * (p @ n if left else n @ p.T)
        w = (w * (1 - lr * decay) if decoupled else w) - step
    return w
