"""Adam steps on small gradients: which weights, their update, and when stock Adam takes over."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memrewrite.attachment import Attachment, members, numbers_of, update_of
from memrewrite.errors import warn
from memrewrite.factored import (
    VECTOR,
    FactoredKind,
    build,
    initialise,
    inputs,
    kind_of,
    obstacle,
    spread_state,
)
from memrewrite.projected import ProjectedGrad
from memrewrite.state import Session


def takes(
    parameter: nn.Parameter, group: dict[str, Any], optimizer: Optimizer, attachment: Attachment
) -> bool:
    """True for a parameter that the stock step is to leave to us, this time."""
    if parameter.grad is None or id(parameter) in attachment.targets:
        return parameter.grad is not None
    if id(parameter) not in attachment.ported:
        return False
    state = optimizer.state[parameter]
    reason = obstacle(parameter, group, state)
    if reason is None and not _same_vector(parameter, state, attachment):
        reason = "its v was replaced while the moments stayed"
    if reason is None:
        grad: Any = parameter.grad
        kind = kind_of(parameter, grad.basis, group)
        attachment.factored[id(parameter)] = kind
        if not state:
            state.update(initialise(kind, grad, group["capturable"]))
        return True
    _give_up(parameter, group, state, reason, attachment)
    _warn_of_scale(parameter, reason, attachment)
    return False


def _same_vector(parameter: nn.Parameter, state: dict[str, Any], attachment: Attachment) -> bool:
    """Compared anew only where one of the two is another tensor: v is never written in place."""
    if not state:
        return True
    grad: Any = parameter.grad
    pair = state[VECTOR], grad.basis.v
    known = attachment.compared.get(id(parameter))
    if known is not None and known[0] is pair[0] and known[1] is pair[1]:
        return True
    if not torch.equal(pair[0], pair[1].to(pair[0].dtype)):  # load_state_dict casts it
        return False
    attachment.compared[id(parameter)] = pair
    return True


def _warn_of_scale(parameter: nn.Parameter, reason: str, attachment: Attachment) -> None:
    velora = attachment.ported[id(parameter)].velora
    if velora is not None and velora.lr_scale not in (1.0, None):
        attachment.warn_once(
            "scale",
            f"lr_scale={velora.lr_scale!r} does not act on a compressed weight "
            f"{tuple(parameter.shape)}, which takes stock Adam's step: {reason}",
        )


def _give_up(
    parameter: nn.Parameter,
    group: dict[str, Any],
    state: dict[str, Any],
    reason: str,
    attachment: Attachment,
) -> None:
    """Stock Adam takes over, from the same moments."""
    if VECTOR in state:
        spread_state(state, parameter, group)
        attachment.warn_once(
            "full",
            f"the Adam state of a compressed weight {tuple(parameter.shape)} becomes full-size "
            f"from here on, with the same values: {reason}",
        )


def spread_orphans(optimizer: Optimizer, attachment: Attachment) -> None:
    """Factored state of weights that have no small gradient now: another run's options."""
    for group, parameter in members(optimizer):
        state = optimizer.state.get(parameter)
        if isinstance(state, dict) and VECTOR in state and id(parameter) not in attachment.ported:
            reason = "no compiled graph returns a small gradient for it now"
            _give_up(parameter, group, state, reason, attachment)


def warn_of_dense(optimizer: Optimizer, attachment: Attachment) -> None:
    grads = [p.grad for _, p in members(optimizer) if id(p) in attachment.ported]
    small = [g for g in grads if isinstance(g, ProjectedGrad) and not g.is_dense]
    if small:
        attachment.warn_once(
            "dense",
            f"{type(optimizer).__name__} reads the full gradients of {len(small)} compressed "
            f"weights: {sum(g.nbytes for g in small):,} bytes are built from "
            f"{sum(g.stored_bytes for g in small):,} in each step. torch.optim.Adam and AdamW "
            "step on the small ones; memrewrite.VeLoRA(gradients='dense') silences this",
        )


def warn_of_full_gradients(session: Session) -> None:
    """Compressed weights whose gradients stay full, where a scale of their step was asked for."""
    velora = session.velora
    if velora is None or velora.lr_scale in (1.0, None):
        return
    if session.scale_checked or not session.graphs:
        return
    session.scale_checked = True
    small = {id(p) for p in session.ported()}
    full = {
        b.names[position]: tuple(parameter.shape)
        for graph in session.graphs
        for b in graph.bindings.values()
        for record in b.variant.record.inputs
        for position in record.weights
        if (parameter := dict(b.parameters)[position]()) is not None and id(parameter) not in small
    }
    if full:
        name, shape = next(iter(full.items()))
        warn(
            f"lr_scale={velora.lr_scale!r} does not act on {len(full)} compressed weights whose "
            f"gradients stay full-size (for one, {name} {shape}: shared, or no layer's own); give "
            "them an optimizer parameter group of their own"
        )


def update_factored(
    kind: FactoredKind,
    session: Session,
    parameter: nn.Parameter,
    group: dict[str, Any],
    optimizer: Optimizer,
    shared: dict[Any, tuple[Any, ...]],
) -> None:
    state = optimizer.state[parameter]
    if state["step"].device.type != "cpu" and not group["capturable"]:
        state["step"] = state["step"].cpu()  # load_state_dict moves it for fused=True
    update = update_of(kind, session, build)
    assert session.velora is not None  # no gradient is small without
    scale = session.velora.step_scale
    numbers = numbers_of(update, state["step"], group, shared, scale)
    update.apply(inputs(parameter, state, kind), numbers)
