"""A projector without the full gradient: what the refreshes of small gradients read.

Between refreshes a backward returns R, dW in the coordinates of P. On the step of a refresh it
returns, in the same way, dW in the coordinates of a basis B of k = r + 16 columns of the *other*
side, the sketch

    left     P (O, r)     B (D, k)     S = dW B     (O, k)
    right    P (D, r)     B (O, k)     S = dW^T B   (D, k)

and the r leading left singular vectors of S are the new P. B's first columns span the
mean of the latest R that Adam keeps: S is then one more round of a power iteration that runs
through the steps, as in PowerSGD. The other columns are random, orthogonal to those; they find
what is new, and their energy tells what B misses. The update of that step reads P^T S B^T in
place of P^T dW: what is outside B is left out of this one step.

The first steps have no R to start from: there are refreshes at steps 0, 2 and 4 as well.
Sources: Halko, Martinsson & Tropp 2011, algorithm 4.4; Vogels et al. 2019, arXiv:1905.13727
(a warm start for it).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from memrewrite.gradients import range_finder
from memrewrite.gradients.basis import Projector, Sketch
from memrewrite.gradients.range_finder import OVERSAMPLING, Refreshed
from passes.ops import project

EARLY = (2, 4)  # steps with a refresh of their own


def is_due(done: int, every: int) -> bool:
    """Whether the step behind `done` others is to bring a sketch."""
    return done % every == 0 or (done in EARLY and done < every)


def width(rank: int, other: int) -> int:
    """Columns of a sketch's basis."""
    return min(rank + OVERSAMPLING, other)


def start(
    name: str,
    like: Tensor,
    rank: int,
    left: bool,
    columns: Tensor | None = None,
    done: int = 0,
) -> Sketch:
    """The basis of the next sketch of a weight (O, D), behind `done` steps.

    columns: the mean of the latest R that Adam keeps, (r, D) or (O, r); without it all of the
    basis is random, the same for the same name and step, on every rank.
    """
    other = like.shape[1] if left else like.shape[0]
    columns_of_b = width(rank, other)
    wide = torch.promote_types(like.dtype, torch.float32)
    warm = None if columns is None else _columns(columns, left).to(wide)  # (other, r)
    if warm is not None and not (bool(torch.isfinite(warm).all()) and bool(warm.any())):
        warm = None
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {done}".encode()))
    known = 0 if warm is None else min(rank, columns_of_b)
    drawn = torch.randn(other, columns_of_b - known, generator=generator, dtype=torch.float64)
    drawn = drawn.to(like.device, wide)
    parts = [drawn] if warm is None else [warm / warm.norm(), drawn]
    basis: Tensor = torch.linalg.qr(torch.cat(parts, 1)).Q  # (other, k)
    return Sketch(basis.to(like.dtype).contiguous(), not left, known)


def following(
    name: str, like: Tensor, rank: int, left: bool, state: Mapping[str, Tensor], due: bool
) -> Projector:
    """The basis that the next gradient of a weight (O, D) comes in, by its optimizer's state.

    due: a refresh comes next. A function of the state alone, so that a run goes on bit by bit
    from a checkpoint of it.
    """
    if not due:
        return Projector(state["projector"], left)
    return start(name, like, rank, left, state["exp_avg"], int(state["step"]))


def refresh(
    sketch: Tensor, basis: Sketch, old: Tensor | None, rank: int, shape: Sequence[int]
) -> Refreshed | str:
    """The new P from a gradient in the coordinates of `basis`, or why there is none.

    Its energy is an estimate of what P holds of the full gradient of `shape`. P was fitted to the
    random columns that it is made from, so it is rather too high: a median of 2 to 8 % where
    measured.
    """
    s = _columns(sketch, basis.left)  # (side, k)
    found = range_finder.refresh(s, old, rank, left=True, method="svd", seed=0)
    if isinstance(found, str):
        return found
    p, other = found.projector, shape[0] if basis.left else shape[1]
    return Refreshed(p, min(1.0, _energy(p.t() @ s, basis, other) / _energy(s, basis, other)))


def _energy(s: Tensor, basis: Sketch, other: int) -> float:
    """Of the gradient that a sketch is of: the random columns stand for all that B misses."""
    drawn = s.shape[1] - basis.warm
    share = (other - basis.warm) / drawn if drawn else 0.0
    squares = s.double().square()
    return float(squares[:, : basis.warm].sum() + share * squares[:, basis.warm :].sum())


def coordinates(sketch: Tensor, basis: Projector, p: Tensor, left: bool) -> Tensor:
    """R in the new P, as far as the sketch has it: (r, D) or (O, r)."""
    if left:  # S (O, k), B (D, k)
        return project(sketch, p, left) @ basis.p.to(sketch.dtype).t()
    return basis.p.to(sketch.dtype) @ project(sketch, p, left)  # S^T (k, D), B (O, k)


def _columns(r: Tensor, left: bool) -> Tensor:
    return r.t() if left else r
