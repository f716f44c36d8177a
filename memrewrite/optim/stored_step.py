"""Adam steps on weights whose moments are in a storage format (`moments.stored`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from memrewrite.gradients.gradient import ProjectedGrad
from memrewrite.moments.optimizers import flags_of, row_of
from memrewrite.moments.stored import Held, StoredKind, stored_from_here
from memrewrite.moments.update import EXAMPLE, rows_of
from memrewrite.optim.attachment import Attachment, numbers_of, update_of
from memrewrite.session.session import Session
from memrewrite.sites.sharded import gathered, is_sharded, keep_shard


def update(
    session: Session,
    parameter: nn.Parameter,
    group: dict[str, Any],
    optimizer: Optimizer,
    attachment: Attachment,
    shared: dict[Any, tuple[Any, ...]],
) -> None:
    """One step of one weight; a small gradient is expanded, a sharded one gathered."""
    kind = _kind(session, parameter, group, optimizer)
    held = kind.held(tuple(parameter.shape))
    attachment.kinds[parameter] = kind
    state, grad = optimizer.state[parameter], parameter.grad
    _prepare(state, held, parameter, group["capturable"], attachment)
    gradient = grad.to_dense() if isinstance(grad, ProjectedGrad) else gathered(grad.detach())  # type: ignore[union-attr]
    compiled = update_of(kind, session)
    scale = session.step_scale if parameter in attachment.scaled else 1.0
    numbers = numbers_of(compiled, state["step"], group, shared, scale)
    weight = gathered(parameter.detach())
    pair = [weight, gradient]
    if kind.dynamic:
        pair = [rows_of(t, kind.shape[1]) for t in (weight, gradient.contiguous())]
    compiled.apply([*pair, *held.inputs(state, fresh=kind.dynamic)], numbers)
    # Maybe written through other tensors of their storage.
    increment_version([parameter, *(state[key] for key in held.keys)])
    keep_shard(parameter, weight)


def _kind(
    session: Session, parameter: nn.Parameter, group: dict[str, Any], optimizer: Optimizer
) -> StoredKind:
    row = row_of(optimizer, group)
    assert row is not None and session.moments is not None  # `membership` has checked it
    moment = session.moments
    plain = is_sharded(parameter) or parameter.is_contiguous()  # in memory, once gathered
    dynamic = moment.row is not None and parameter.numel() % moment.row == 0 and plain
    shape: Any = (EXAMPLE, moment.row) if dynamic else tuple(parameter.shape)
    how = parameter.dtype, parameter.device, flags_of(group), row, moment
    return StoredKind(shape, *how, dynamic)


def _prepare(
    state: dict[str, Any],
    held: Held,
    parameter: nn.Parameter,
    capturable: bool,
    attachment: Attachment,
) -> None:
    """Create the state of a weight, or convert it from full-size moments.

    Checked again only if its first tensor is another one than in the last step.
    """
    first = held.keys[0]
    if not state:
        device = parameter.device if capturable else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state.update(held.zeros(parameter.device))
    elif state.get(first) is not attachment.checked.get(parameter):
        what = f"a weight {tuple(parameter.shape)}"
        if held.take_over(state, what):
            attachment.warn_once("stored", stored_from_here(held.moment, what))
    attachment.checked[parameter] = state[first]
    if state["step"].device.type != "cpu" and not capturable:
        state["step"] = state["step"].cpu()  # load_state_dict moves it for fused=True
