"""GaLore's gradients in coordinates: backward returns R = P^T dW or dW P.  [approximate]

    (dy^T x) P = dy^T (x P)        P^T (dy^T x) = (dy P)^T x

The projection moves to the operands of the weight gradient's matmul, so dW is never formed, and
x P may be saved in place of x. On the step of a refresh the basis is that of a sketch, of the
other side (`gradients.sketch`). See `passes.joint.push`. Source: Zhao et al. 2024,
arXiv:2403.03507; sketched refreshes: design.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from memrewrite.gradients import sketch
from memrewrite.methods.bases import Bases
from memrewrite.methods.method import Ask, Chosen, Context, Method, Placed, Task
from memrewrite.sites.eligible import sites_of
from memrewrite.sites.options import GaLore
from memrewrite.sites.weights import Site, Weight
from passes.base import Pass
from passes.joint.find import WeightGradient
from passes.joint.push import Projected, push_projections, return_projections
from passes.split.recompute import pushed_operations


@dataclass(frozen=True)
class Projection(Method):
    """The method of GaLore(gradients="coordinates").

    settled: for an estimate of a step between two refreshes: every weight has a projector.
    """

    options: GaLore
    settled: bool = False
    name = "galore"
    symbol = "p"
    kept = "x P"
    compresses = False
    moves = True
    narrows = True
    small = True
    forms = (True, False)  # the side of the projector; the other side, for a sketch

    def choose(self, model: nn.Module, found: Sequence[Weight]) -> Chosen:
        """Matrices only: a convolution's gradient is projected by the optimizer."""
        sites = sites_of(model, self.options).projected
        return {s.weight.parameter: s for s in sites if s.weight.parameter.ndim == 2}

    def ask(self, position: int, site: Site, state: Any, form: bool | None = None) -> Ask:
        """form: see `forms`; None: that of the next gradient's basis."""
        like = site.weight.parameter
        left = state.basis(site).left
        if form is not None:
            left = site.left is form
        rows, columns = like.shape
        side = rows if left else columns
        rank = site.rank if left is site.left else sketch.width(site.rank, side)
        port = (rank, columns) if left else (rows, rank)
        basis = (side, rank)
        return Ask(position, like.dtype, like.device, like.dtype, basis, port, left)

    def returns_small(self, site: Site) -> bool:
        return True

    def without_port(self, ask: Ask) -> Ask | None:
        return None

    def passes(self, task: Task, context: Context) -> list[Pass]:
        return [
            return_projections(
                Projected(p.weight, p.port, p.basis, p.ask.left)
                for p in task.placed()
                if p.port is not None and p.basis is not None
            ),
            push_projections(),
        ]

    def freed(self, gradient: WeightGradient, placed: Placed) -> Any:
        assert placed.ask.basis is not None
        return pushed_operations(gradient, placed.ask.basis[1])

    def state(self, model: weakref.ref[nn.Module]) -> Bases:
        return Bases(model, self.options, self.settled)

    def small_bytes(self, site: Site) -> int:
        parameter = site.weight.parameter
        return site.rank * parameter.shape[1 if site.left else 0] * parameter.element_size()
