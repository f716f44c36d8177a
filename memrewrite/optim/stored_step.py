"""Adam steps on weights whose moments are in a storage format (`moments.stored`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from memrewrite.gradients.gradient import ProjectedGrad
from memrewrite.moments.optimizers import flags_of, row_of
from memrewrite.moments.stored import StoredKind
from memrewrite.moments.update import EXAMPLE, rows_of, wide
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
    attachment.kinds[parameter] = kind
    state, grad = optimizer.state[parameter], parameter.grad
    _prepare(state, kind, parameter, group["capturable"], attachment)
    gradient = grad.to_dense() if isinstance(grad, ProjectedGrad) else gathered(grad.detach())  # type: ignore[union-attr]
    compiled = update_of(kind, session)
    scale = session.step_scale if parameter in attachment.scaled else 1.0
    numbers = numbers_of(compiled, state["step"], group, shared, scale)
    weight, held = gathered(parameter.detach()), [state[key] for key in _keys(kind)]
    pair = [weight, gradient]
    if kind.dynamic:
        pair = [rows_of(t, kind.shape[1]) for t in (weight, gradient.contiguous())]
    compiled.apply([*pair, *kind.inputs(state)], numbers)
    increment_version([parameter, *held])  # maybe written through another tensor of its storage
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


def _keys(kind: StoredKind) -> list[str]:
    names = kind.row.moments_of(kind.flags)
    return [key for name in names for key in kind.moment.keys(name)]


def _prepare(
    state: dict[str, Any],
    kind: StoredKind,
    parameter: nn.Parameter,
    capturable: bool,
    attachment: Attachment,
) -> None:
    """Create the state of a weight, or convert it from full-size moments.

    Checked again only if its first tensor is another one than in the last step.
    """
    if not state:
        device = parameter.device if capturable else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state.update(kind.zeros(gathered(parameter)))
    elif state.get(_keys(kind)[0]) is not attachment.checked.get(parameter):
        _take_over(state, kind, parameter, attachment)
    attachment.checked[parameter] = state[_keys(kind)[0]]
    if state["step"].device.type != "cpu" and not capturable:
        state["step"] = state["step"].cpu()  # load_state_dict moves it for fused=True


def _take_over(
    state: dict[str, Any], kind: StoredKind, parameter: nn.Parameter, attachment: Attachment
) -> None:
    """Convert loaded state: of the same format, cast by `load_state_dict`; or full-size moments."""
    zeros = kind.zeros(gathered(parameter))
    for name in kind.row.moments_of(kind.flags):
        keys = kind.moment.keys(name)
        known = all(k in state and state[k].shape == zeros[k].shape for k in keys)
        cast = {k: state[k].to(zeros[k].dtype) for k in keys} if known else {}
        if cast and all(torch.equal(cast[k].to(state[k].dtype), state[k]) for k in keys):
            state.update(cast)
            continue
        full = state.get(name)
        if not isinstance(full, Tensor) or full.shape != parameter.shape:
            found = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor)}
            raise ValueError(
                f"the optimizer's state of a weight {tuple(parameter.shape)} has tensors {found}: "
                f"neither moments as {kind.moment.name!r} stores them nor full-size ones; compile "
                "with the options of the run that saved it, or start with a new optimizer"
            )
        state.update(kind.entries(name, kind.moment.write(full.to(wide(kind.dtype)), name=name)))
        attachment.warn_once(
            "stored",
            f"the optimizer held full-size moments of a weight {tuple(parameter.shape)}: they are "
            f"stored as {kind.moment.name!r} from here on",
        )
