"""Consume a projected gradient, and choose the basis of the next backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from memrewrite.gradients import range_finder, sketch
from memrewrite.gradients.basis import Projector, Sketch, equal
from memrewrite.gradients.gradient import ProjectedGrad
from memrewrite.moments.projected import ProjectedKind, Target, is_stale, mark_stale, prepare, take


def is_small(grad: Tensor) -> bool:
    """True for a gradient in the coordinates of a projector, or a sketch of one."""
    return (
        isinstance(grad, ProjectedGrad) and not grad.is_dense and isinstance(grad.basis, Projector)
    )


def given(kind: ProjectedKind) -> ProjectedKind:
    """The kind of update whose gradient input is R."""
    return replace(kind, given=True)


def receive(
    target: Target,
    kind: ProjectedKind,
    state: dict[str, Any],
    grad: ProjectedGrad,
    group: dict[str, Any],
    warn_once: Callable[[str, str], None],
) -> tuple[Tensor | None, str | None]:
    """(R, why a refresh failed or None); R is None if the gradient is in another projector."""
    basis, small = grad.basis, grad.coordinates
    assert isinstance(basis, Projector) and small is not None
    fresh = not state
    done = prepare(state, kind, grad, group["capturable"])
    if not isinstance(basis, Sketch):
        if fresh:
            state["projector"] = basis.p
            mark_stale(state, False)
        return (small if equal(basis.p, state["projector"]) else None), None
    failure = None
    if fresh or target.is_due(done) or is_stale(state):
        old = None if fresh else state["projector"]
        new = sketch.refresh(small, basis, old, kind.rank, kind.shape)
        mark_stale(state, isinstance(new, str))
        if isinstance(new, range_finder.Refreshed):
            take(target, kind, state, new, group, done)
        elif new != range_finder.ZERO:
            target.failures += 1
            failure = f"at step {done + 1}: {new}"
    else:
        warn_once(
            "sketch",
            "an optimizer with projected state meets gradients that were sketched for a new "
            "projector: it was loaded after the forward of this step. This one step uses an "
            "approximation of the gradients; load the optimizer before the first forward",
        )
    return sketch.coordinates(small, basis, state["projector"], kind.left), failure


def announce(target: Target, kind: ProjectedKind, state: dict[str, Any]) -> None:
    """Set the basis of the next gradient in the session."""
    kept, name = target.session.bases, target.name
    assert kept is not None  # only called for weights whose gradients are in coordinates
    bases = kept.by_name
    if not state["projector"].is_contiguous():  # a compiled backward is specialized to strides
        state["projector"] = state["projector"].contiguous()
    if is_stale(state):  # the next gradient is sketched anew
        bases.pop(name, None)
        return
    known, like = bases.get(name), target.parameter.detach()
    due = target.is_due(int(state["step"]))
    if due or known is None or known.p is not state["projector"]:
        bases[name] = sketch.following(name, like, kind.rank, kind.left, state, due)
