"""Adam steps on compressed weights: factored updates, and when torch's Adam takes over."""

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
    """Whether memrewrite steps this parameter in this step, in place of torch's Adam."""
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
    """Make a gradient of zeros before the first forward small, so that its state is factored."""
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
    """Whether the moments are along the gradient's v, after one of the two is replaced if needed.

    Compared again only if one of them is another tensor, as v is never written in place.
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
    if known is not None and known[0] is held:  # v is from memrewrite.load_state_dict
        return False
    _follow(parameter, unpack(held, v.dtype).to(v.device), attachment)
    return True


def _start_anew(parameter: nn.Parameter, state: dict[str, Any], attachment: Attachment) -> None:
    """Reset the moments of a provisional v, along which W will not move again."""
    for tensor in (*(state[name] for name in MOMENTS if name in state), state["step"]):
        tensor.zero_()
    turn(state, parameter)
    attachment.warn_once(
        "restart",
        f"the Adam moments of a compressed weight {tuple(parameter.shape)} are reset: its v "
        "was ones until this batch, the first that could calibrate it",
    )


def _follow(parameter: nn.Parameter, v: torch.Tensor, attachment: Attachment) -> None:
    """Use the v of a state that was loaded after the forward of this gradient."""
    grad: Any = parameter.grad
    kept = attachment.ported[parameter].vectors
    assert kept is not None  # the gradient is along one of its vectors
    kept.replace(grad.basis.v, v)
    share = torch.dot(grad.basis.v, v)
    basis = Vector(v, grad.basis.left)
    parameter.grad = ProjectedGrad(grad.coordinates * share.to(grad.dtype), basis, grad.shape)
    attachment.warn_once(
        "loaded",
        f"an optimizer's state was loaded after the forward of this step: the moments of a "
        f"compressed weight {tuple(parameter.shape)} are along another v than its gradient. The "
        "v of the moments is kept, and this one step uses an approximate gradient; "
        "load the optimizer before the first forward",
    )


def step_densely(
    optimizer: Optimizer, group: dict[str, Any], parameters: Sequence[nn.Parameter], scale: float
) -> None:
    """torch's step of some parameters of a group, scaled by `lr_scale`."""
    group = {**slowed(group, scale), "params": list(parameters)}
    if parameters[0].device.type == "cpu":
        group["capturable"] = False  # on the CPU only a compiled step allows it
    one: Any = _OneGroup(optimizer, group)
    inspect.unwrap(Adam.step)(one)


class _OneGroup:
    """A proxy of an optimizer that has one parameter group."""

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
    """Let torch's Adam take over, with equal full-size moments; warns once."""
    if VECTOR in state:
        spread_state(state, parameter, group)
        attachment.warn_once(
            "full",
            f"the Adam state of a compressed weight {tuple(parameter.shape)} becomes full-size "
            f"from here on, with the same values: {reason}",
        )
    elif reason == FULL_SIZE and "full" not in attachment.warned:
        attachment.warn_once(
            "plain",
            f"the optimizer holds full-size Adam state of a compressed weight "
            f"{tuple(parameter.shape)}: of a run without velora, with gradients='dense', or of a "
            "first gradient that was full. Adam uses it unchanged, so it stays full-size, "
            "and every small gradient is expanded: start with a new optimizer to have small "
            "moments, or pass gradients='dense' to memrewrite.VeLoRA",
        )


def spread_orphans(optimizer: Optimizer, attachment: Attachment) -> None:
    """Expand factored state of weights without small gradients, as of a run with other options."""
    for group, parameter in members(optimizer):
        state = optimizer.state.get(parameter)
        if parameter.grad is None or parameter in attachment.ported:
            continue  # it takes no step now, or a factored one
        if isinstance(state, dict) and VECTOR in state:
            reason = "no compiled graph returns a small gradient for it now"
            _give_up(parameter, group, state, reason, attachment)


def warn_of_dense(optimizer: Optimizer, attachment: Attachment) -> None:
    grads = [p.grad for _, p in members(optimizer) if p in attachment.ported]
    small = [g for g in grads if isinstance(g, ProjectedGrad) and not g.is_dense]
    served = {attachment.ported[p] for _, p in members(optimizer) if p in attachment.ported}
    if small and not all("dense" in session.calls.warned for session in served):
        for session in served:  # one warning even if each parameter has its own optimizer
            session.calls.warned.add("dense")
        attachment.warn_once(
            "dense",
            f"{name_of(optimizer)} reads the full gradients of {len(small)} compressed "
            f"weights: {sum(g.nbytes for g in small):,} bytes are built from "
            f"{sum(g.stored_bytes for g in small):,} in each step. torch.optim.Adam and AdamW "
            "step on the small ones; memrewrite.VeLoRA(gradients='dense') silences this",
        )


def warn_of_scale(optimizer: Optimizer, attachment: Attachment) -> None:
    """Warn that lr_scale has no effect on the steps of an optimizer other than Adam."""
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
            "without it: put them in a separate parameter group, or pass lr_scale=1.0",
        )


def warn_of_sums(session: Session) -> None:
    """Warn that lr_scale has no effect on compressed weights whose gradients have other terms."""
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
            f"gradients are sums (for one, {name} {shape}: it is shared); put them in a separate "
            "parameter group of the optimizer"
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
    if kind.dynamic:  # it wrote through other tensors of the same storage, unseen by autograd
        increment_version([parameter, *(state[name] for name in moments(kind))])
