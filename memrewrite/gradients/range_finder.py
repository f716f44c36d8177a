"""GaLore's projector: r orthonormal columns that capture most of a gradient's energy.

A basis is defined up to signs and rotations, and Adam's moments are in its coordinates.
Every refresh therefore returns singular vectors, ordered by singular value, with signs
that agree with the previous basis, so that moment j keeps its column j.
Runs outside any compiled graph, in float32 (float64 for float64 gradients).
Sources: Zhao et al. 2024, arXiv:2403.03507, algorithm 2; Halko, Martinsson & Tropp 2011,
algorithms 4.4 and 5.1 (range finder, power iteration); Robert et al. 2024 (LDAdam),
arXiv:2410.16103, for moments="rotate".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ZERO = "the gradient is zero"
OVERSAMPLING = 16  # columns in addition to r
ENOUGH = 0.99  # share of a gradient's energy at which power iteration stops
GAIN = 0.005  # and the gain of a round below which it stops
ROUNDS = 6


@dataclass(frozen=True)
class Refreshed:
    """projector: (side, r) in the gradient's dtype. energy: |P^T G|^2 / |G|^2."""

    projector: Tensor
    energy: float


def refresh(
    gradient: Tensor, old: Tensor | None, rank: int, left: bool, method: str, seed: int
) -> Refreshed | str:
    """The new basis of a gradient (O, D, ...), or the reason why there is none."""
    a = _matrix(gradient, left)  # (side, other)
    norm = float(torch.linalg.vector_norm(a))
    if not 0.0 < norm < math.inf:  # else its squares may overflow or underflow
        largest = float(a.abs().max())
        if largest == 0.0:
            return ZERO
        if not math.isfinite(largest):
            return "the gradient has NaN or Inf entries"
        a = a / largest
        norm = float(torch.linalg.vector_norm(a))
    a = a / norm
    try:
        basis, energy = METHODS[method](a, rank, seed)  # (side, r)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        return f"the decomposition did not converge ({error})"
    if not bool(torch.isfinite(basis).all()):
        return "the decomposition is not finite"
    return Refreshed(aligned(basis, old).to(gradient.dtype).contiguous(), energy)


def _matrix(gradient: Tensor, left: bool) -> Tensor:
    rows = gradient.detach().flatten(1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return rows if left else rows.t()


def _exact(a: Tensor, rank: int, seed: int) -> tuple[Tensor, float]:
    decomposed = torch.linalg.svd(a, full_matrices=False)
    squares: Tensor = decomposed.S.square()
    return decomposed.U[:, :rank], float(squares[:rank].sum() / squares.sum())


def _randomized(a: Tensor, rank: int, seed: int) -> tuple[Tensor, float]:
    """Range finder with power iteration, then the singular vectors within that range.

    A round costs two matmuls with G and one thin QR. Rounds are repeated while they add energy,
    as they do where singular values decay slowly.
    """
    k = min(rank + OVERSAMPLING, *a.shape)
    generator = torch.Generator(a.device).manual_seed(
        seed
    )  # not the global one, which is the user's
    test = torch.randn(a.shape[1], k, generator=generator, dtype=a.dtype, device=a.device)
    q = _orthonormal(a @ test)  # (side, k)
    held = a.t() @ q  # (other, k)
    captured = _energy(held)
    for _ in range(ROUNDS):
        if captured >= ENOUGH:
            break
        q = _orthonormal(a @ held)
        held, before = a.t() @ q, captured
        captured = _energy(held)
        if captured - before < GAIN * captured:
            break
    values, vectors = torch.linalg.eigh(held.t() @ held)  # ascending, (k, k)
    return q @ vectors.flip(-1)[:, :rank], min(1.0, float(values[-rank:].sum()))


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) ** 2


def _orthonormal(x: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(x).Q
    return q


# matrix (side, other) of norm 1 -> (basis (side, r), its share of the energy).
METHODS: dict[str, Callable[[Tensor, int, int], tuple[Tensor, float]]] = {
    "svd": _exact,
    "randomized": _randomized,
}


def aligned(basis: Tensor, old: Tensor | None) -> Tensor:
    """The same columns, each with the sign that is nearest to its column of `old`.

    Without `old`, each column's largest entry is made positive.
    """
    if old is None:
        pivot = basis.gather(0, basis.abs().argmax(0, keepdim=True))[0]  # (r,)
    else:
        pivot = (old.to(basis.dtype) * basis).sum(0)
    return torch.where(pivot < 0, -basis, basis)


def rotate_moments(
    state: dict[str, Tensor], new: Tensor, old: Tensor, left: bool, bias1: float, bias2: float
) -> None:
    """Transform Adam's moments from the old coordinates to the new, in place.

    With T = P_new^T P_old and bias-corrected moments: m <- T m, and the second moment as
    mean^2 + variance of independent coordinates, |T^2 (v - m^2) + (T m)^2| (LDAdam's
    projection-aware update). amsgrad's maximum is transformed by T^2 only.
    """
    wide = torch.promote_types(new.dtype, torch.float32)
    turn = new.to(wide).t() @ old.to(wide)  # (r, r)

    def turned(x: Tensor, by: Tensor) -> Tensor:
        return by @ x if left else x @ by.t()

    m, v = state["exp_avg"].to(wide) / bias1, state["exp_avg_sq"].to(wide) / bias2
    mean = turned(m, turn)
    second = (turned(v - m.square(), turn.square()) + mean.square()).abs()
    state["exp_avg"].copy_(mean * bias1)
    state["exp_avg_sq"].copy_(second * bias2)
    if "max_exp_avg_sq" in state:
        largest = state["max_exp_avg_sq"]
        largest.copy_(turned(largest.to(wide), turn.square()))
