"""Adam steps on compressed weights: which are small, their update, when stock Adam takes over."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.optim import Adam, Optimizer

from memrewrite.errors import warn
from memrewrite.gradients.basis import Vector
from memrewrite.gradients.gradient import ProjectedGrad
from memrewrite.gradients.packing import VECTOR, unpack
from memrewrite.moments.factored import (
    FULL_SIZE,
    MOMENTS,
    FactoredKind,
    agrees,
    initialise,
    inputs,
    is_untouched,
    kind_of,
    moments,
    obstacle,
    spread_state,
    turn,
)
from memrewrite.optim.attachment import Attachment, members, name_of, numbers_of, slowed, update_of
from memrewrite.session.session import Session


def takes(
    parameter: nn.Parameter, group: dict[str, Any], optimizer: Optimizer, attachment: Attachment
) -> bool:
    """True for a parameter that the stock step is to leave to us, this time."""
    if parameter.grad is None:
        return False
    if parameter in attachment.targets or parameter in attachment.stored:
        return True
    if parameter in attachment.ported:
        _make_small(parameter, optimizer, attachment.expected.get(parameter))
        if _takes_small(parameter, group, optimizer.state[parameter], attachment):
            return True
    session = attachment.scaled.get(parameter)
    if session is None or (session.step_scale == 1.0 and not attachment.traced):
        return False
    attachment.dense[parameter] = session
    return True


def _make_small(parameter: nn.Parameter, optimizer: Optimizer, basis: Vector | None) -> None:
    """Read zeros as a small gradient ahead of the first forward: the state will be of its form."""
    if basis is None or optimizer.state.get(parameter) or bool(parameter.grad.any()):  # type: ignore[union-attr]
        return
    a = parameter.detach().new_zeros(basis.small(parameter.shape))
    parameter.grad = ProjectedGrad(a, basis, parameter.shape)


def _takes_small(
    parameter: nn.Parameter, group: dict[str, Any], state: dict[str, Any], attachment: Attachment
) -> bool:
    reason = obstacle(parameter, group, state)
    if reason is None and state and not _along(parameter, state, attachment):
        reason = "its v was replaced while the moments stayed"
    if reason is not None:
        _give_up(parameter, group, state, reason, attachment)
        return False
    grad: Any = parameter.grad
    kind = kind_of(parameter, grad.basis, group)
    attachment.factored[parameter] = kind
    if not state:
        state.update(initialise(kind, grad, group["capturable"]))
    attachment.compared[parameter] = state[VECTOR], grad.basis.v
    return True


def _along(parameter: nn.Parameter, state: dict[str, Any], attachment: Attachment) -> bool:
    """Whether the moments can go on along the gradient's v, which may have to give way.

    Compared anew only where one of the two is another tensor: v is never written in place.
    """
    grad: Any = parameter.grad
    held, v = state[VECTOR], grad.basis.v
    known = attachment.compared.get(parameter)
    if known is not None and known[0] is held and known[1] is v:
        return True
    if agrees(state, v):
        return True
    if is_untouched(state):
        turn(state, parameter)
        return True
    kept = attachment.ported[parameter].vectors
    if kept is not None and any(v is late for late in kept.means.late):
        _start_anew(parameter, state, attachment)
        return True
    if known is not None and known[0] is held:  # the user's own v: memrewrite.load_state_dict
        return False
    _follow(parameter, unpack(held, v.dtype).to(v.device), attachment)
    return True


def _start_anew(parameter: nn.Parameter, state: dict[str, Any], attachment: Attachment) -> None:
    """Drop the moments of a provisional v: W will not move along its directions again."""
    for tensor in (*(state[name] for name in MOMENTS if name in state), state["step"]):
        tensor.zero_()
    turn(state, parameter)
    attachment.warn_once(
        "restart",
        f"the Adam moments of a compressed weight {tuple(parameter.shape)} start anew: its v "
        "was ones until this batch, the first that could calibrate it",
    )


def _follow(parameter: nn.Parameter, v: torch.Tensor, attachment: Attachment) -> None:
    """Go on along the v of a state that was loaded after the forward of this gradient."""
    grad: Any = parameter.grad
    kept = attachment.ported[parameter].vectors
    assert kept is not None  # the gradient came along one of them
    kept.replace(grad.basis.v, v)
    share = torch.dot(grad.basis.v, v)
    basis = Vector(v, grad.basis.left)
    parameter.grad = ProjectedGrad(grad.coordinates * share.to(grad.dtype), basis, grad.shape)
    attachment.warn_once(
        "loaded",
        f"an optimizer's state was loaded after the forward of this step: the moments of a "
        f"compressed weight {tuple(parameter.shape)} are along another v than its gradient. The "
        "v of the moments is kept, and this one step goes by an approximation of the gradient; "
        "load the optimizer before the first forward",
    )


def step_densely(
    optimizer: Optimizer, group: dict[str, Any], parameters: Sequence[nn.Parameter], scale: float
) -> None:
    """torch's own step of some parameters of a group, scaled by `lr_scale`."""
    group = {**slowed(group, scale), "params": list(parameters)}
    if parameters[0].device.type == "cpu":
        group["capturable"] = False  # only a compiled step takes it there, and this is none
    one: Any = _OneGroup(optimizer, group)
    inspect.unwrap(Adam.step)(one)


class _OneGroup:
    """An optimizer, but for its parameter groups."""

    def __init__(self, optimizer: Optimizer, group: dict[str, Any]) -> None:
        self.optimizer, self.param_groups = optimizer, [group]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def _init_group(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.optimizer)._init_group(self, *args, **kwargs)  # type: ignore[attr-defined]


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
    elif reason == FULL_SIZE and "full" not in attachment.told:
        attachment.warn_once(
            "plain",
            f"the optimizer holds full-size Adam state of a compressed weight "
            f"{tuple(parameter.shape)}: of a run without velora, with gradients='dense', or of a "
            "first gradient that was full. Adam goes on from it as it is, so it stays full-size, "
            "and every small gradient is built in full: start with a new optimizer to have small "
            "moments, or pass gradients='dense' to memrewrite.VeLoRA",
        )


def spread_orphans(optimizer: Optimizer, attachment: Attachment) -> None:
    """Factored state of weights that have no small gradient now: another run's options."""
    for group, parameter in members(optimizer):
        state = optimizer.state.get(parameter)
        if parameter.grad is None or parameter in attachment.ported:
            continue  # it takes no step, or one of ours
        if isinstance(state, dict) and VECTOR in state:
            reason = "no compiled graph returns a small gradient for it now"
            _give_up(parameter, group, state, reason, attachment)


def warn_of_dense(optimizer: Optimizer, attachment: Attachment) -> None:
    grads = [p.grad for _, p in members(optimizer) if p in attachment.ported]
    small = [g for g in grads if isinstance(g, ProjectedGrad) and not g.is_dense]
    served = {attachment.ported[p] for _, p in members(optimizer) if p in attachment.ported}
    if small and not all("dense" in session.calls.told for session in served):
        for session in served:  # one warning where each parameter has an optimizer of its own
            session.calls.told.add("dense")
        attachment.warn_once(
            "dense",
            f"{name_of(optimizer)} reads the full gradients of {len(small)} compressed "
            f"weights: {sum(g.nbytes for g in small):,} bytes are built from "
            f"{sum(g.stored_bytes for g in small):,} in each step. torch.optim.Adam and AdamW "
            "step on the small ones; memrewrite.VeLoRA(gradients='dense') silences this",
        )


def warn_of_scale(optimizer: Optimizer, attachment: Attachment) -> None:
    """lr_scale is a factor on Adam's step, and this optimizer has another."""
    asked = {
        session.velora.lr_scale
        for session in attachment.scaled.values()
        if session.velora is not None and session.velora.lr_scale not in (1.0, None)
    }
    if asked:
        attachment.warn_once(
            "scale",
            f"lr_scale={asked.pop()!r} is a factor on the steps of torch.optim.Adam and AdamW; "
            f"{name_of(optimizer)} steps {len(attachment.scaled)} compressed weights "
            "without it: give them a parameter group of their own, or pass lr_scale=1.0",
        )


def warn_of_sums(session: Session) -> None:
    """Compressed weights whose gradients have other terms, where a scale was asked for."""
    velora = session.velora
    if velora is None or velora.lr_scale in (1.0, None):
        return
    if session.scale_checked or not session.graphs:
        return
    session.scale_checked = True
    factored = session.factored()
    others = {
        binding.names[position]: tuple(parameter.shape)
        for binding in session.bindings()
        for record in binding.variant.record.inputs
        for position in record.weights
        if (parameter := dict(binding.parameters)[position]()) is not None
        and binding.names[position] not in factored
    }
    if others:
        name, shape = next(iter(others.items()))
        warn(
            f"lr_scale={velora.lr_scale!r} does not act on {len(others)} compressed weights whose "
            f"gradients are sums (for one, {name} {shape}: it is shared); give them an optimizer "
            "parameter group of their own"
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
    if session.vectors is not None and session.vectors.means.provisional:
        grad: Any = parameter.grad
        session.vectors.means.stepped(grad.basis.v, grad.coordinates)
    update = update_of(kind, session)
    numbers = numbers_of(update, state["step"], group, shared, session.step_scale)
    update.apply(inputs(parameter, state, kind), numbers)
    if kind.dynamic:  # it wrote through tensors of the same memory that autograd does not know
        increment_version([parameter, *(state[name] for name in moments(kind))])
