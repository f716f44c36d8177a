"""Hooks on the step of every optimizer, which need no change in the user's code.

A `torch.optim.Adam` or `AdamW` runs its own step, excluding the weights whose state is kept in
another way (projected, factored, stored); these take their rewritten update after it. Their
state is in `optimizer.state[p]`, as plain tensors that `state_dict`, `load_state_dict` and
`torch.load(weights_only=True)` support: see `moments`. Errors are raised before anything is
written. Optimizers without parameters of a compiled model are not affected.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from memrewrite.errors import warn
from memrewrite.gradients.gradient import ProjectedGrad
from memrewrite.loss.kept import keep_before
from memrewrite.moments.factored import FactoredKind
from memrewrite.moments.projected import Target, refresh_if_due
from memrewrite.moments.projected_gradients import announce, given, is_small, receive
from memrewrite.moments.update import Update
from memrewrite.optim import membership, stored_step
from memrewrite.optim.attachment import Attachment, compiled, members, numbers_of, update_of
from memrewrite.optim.factored_step import (
    spread_orphans,
    step_densely,
    takes,
    update_factored,
    warn_of_dense,
    warn_of_scale,
)
from memrewrite.optim.full_gradients import give_full_gradients, uncompiled
from memrewrite.optim.resume import go_on_from, store_vectors
from memrewrite.session.session import Session, live_sessions
from memrewrite.session.skipping import is_tracing
from memrewrite.sites.sharded import gathered, keep_shard

_installed: list[Any] = []


def install() -> None:
    """Register the hooks on all optimizers. Idempotent."""
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(uncompiled(_before_step)))


def attach(optimizer: Optimizer) -> None:
    """`compile(optimizer)`: check and attach it now, as its first step would.

    Raises ValueError where none of its parameters is projected, and whatever the first
    step would raise.
    """
    if not membership.attached(optimizer).targets:
        raise ValueError(
            f"no parameter of this {type(optimizer).__name__} is projected: compile the model "
            "first, memrewrite.compile(model, galore_rank=...), and build the optimizer over "
            "its parameters"
        )


def attachments(session: Session) -> Iterator[tuple[Optimizer, Attachment]]:
    """The optimizers that update projected, factored or stored weights of a session."""
    for optimizer, attachment in membership.attachments():
        served = [target.session for target in attachment.targets.values()]
        served += [*attachment.ported.values(), *attachment.stored.values()]
        if session in served:
            yield optimizer, attachment


def updates_of(session: Session) -> list[Update]:
    """The compiled updates of a session's weights so far, one per kind."""
    kinds: set[Any] = set()
    for _, attachment in attachments(session):
        targets = [t for t in attachment.targets.values() if t.session is session]
        known = {target.known for target in targets if target.known is not None}
        kinds |= known | {given(kind) for kind in known}
        kinds |= {k for p, k in attachment.factored.items() if attachment.ported[p] is session}
        kinds |= {k for p, k in attachment.kinds.items() if attachment.stored.get(p) is session}
    backend = session.engine.backend
    found = [u for (kind, engine), u in compiled.items() if engine == backend and kind in kinds]
    # In the order of this session: another model may have compiled some of them before.
    return sorted(found, key=lambda u: (isinstance(u.kind, FactoredKind), str(u.kind)))


# --- around a step --------------------------------------------------------------------------


def _before_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """The global pre-hook, which runs before the hooks of the optimizer."""
    keep_before(parameter for _, parameter in members(optimizer))
    attachment = membership.attached(optimizer)
    attachment.factored, attachment.dense, attachment.collected = {}, {}, False
    if not attachment.state_hooks and live_sessions():
        attachment.state_hooks = [
            optimizer.register_state_dict_pre_hook(_store_vectors),
            optimizer.register_load_state_dict_post_hook(_go_on),
        ]
    _complain_of_unserved()
    for session in live_sessions():
        session.seek()
    if not membership.steps_as_known(optimizer):
        warn_of_scale(optimizer, attachment)
        warn = partial(warn_of_dense, optimizer, attachment)
        return give_full_gradients(optimizer, args, kwargs, warn)
    spread_orphans(optimizer, attachment)
    if not attachment.serves:
        return None
    if attachment.post_hook is None:
        attachment.post_hook = optimizer.register_step_post_hook(uncompiled(_update))
        skipping = uncompiled(_skipping(weakref.ref(optimizer), attachment))
        optimizer._init_group = skipping  # type: ignore[attr-defined]
    # Before the user's post-hooks, which must see a complete step.
    after: Any = optimizer._optimizer_step_post_hooks
    after.move_to_end(attachment.post_hook.id, last=False)
    return None


def _store_vectors(optimizer: Optimizer) -> None:
    """Before `state_dict`: add v, as a resumed run may have only this dictionary."""
    for session in live_sessions():
        store_vectors(session, optimizer)


def _go_on(optimizer: Optimizer) -> None:
    """After `load_state_dict`, also within a run: restore v and bases from the new state."""
    for session in live_sessions():
        go_on_from(session, optimizer)


def _skipping(reference: weakref.ref[Optimizer], attachment: Attachment) -> Callable[..., Any]:
    """An `_init_group` for Adam that hides the gradients of our parameters while it runs."""

    def init_group(group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        optimizer: Any = reference()
        membership.catch_up(optimizer, attachment)
        attachment.collected = True
        attachment.traced |= is_tracing()
        ours = [p for p in group["params"] if takes(p, group, optimizer, attachment)]
        grads = [p.grad for p in ours]
        try:
            for parameter in ours:
                parameter.grad = None
            return type(optimizer)._init_group(optimizer, group, *args, **kwargs)
        finally:
            for parameter, grad in zip(ours, grads, strict=True):
                parameter.grad = grad

    return init_group


@torch.no_grad()
def _update(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
    attachment = membership.attachment_of(optimizer)
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)  # GradScaler's
    if found_inf is not None and bool(found_inf.item()):
        return
    grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if not attachment.collected:  # a compiled step ran `_init_group` only when traced
        for group, parameter in members(optimizer):
            takes(parameter, group, optimizer, attachment)
    shared: dict[Any, tuple[Any, ...]] = {}
    built = len(compiled)
    with contextlib.ExitStack() as stack:
        for device in {p.device.type for _, p in members(optimizer)}:
            stack.enter_context(torch.autocast(device, enabled=False))  # as stock Adam is
        for group, parameter in members(optimizer):
            target, grad = attachment.targets.get(parameter), parameter.grad
            factored, session = attachment.factored.get(parameter), attachment.stored.get(parameter)
            if (target is None and factored is None and session is None) or grad is None:
                continue
            if grad_scale is not None:
                grad.div_(grad_scale.to(grad.device))
            if factored is not None:
                session = attachment.ported[parameter]
                update_factored(factored, session, parameter, group, optimizer, shared)
                continue
            if target is None:
                assert session is not None
                stored_step.update(session, parameter, group, optimizer, attachment, shared)
                continue
            failure = _update_one(target, group, grad, optimizer, attachment, shared)
            if failure is not None:
                attachment.warn_once("refresh", _refresh_failed(target, failure))
        _step_densely(optimizer, attachment)
    if len(compiled) > built:
        served = {target.session for target in attachment.targets.values()}
        for session in {*served, *attachment.ported.values(), *attachment.stored.values()}:
            session.changed(complete=True)


def _step_densely(optimizer: Optimizer, attachment: Attachment) -> None:
    dense = attachment.dense
    for group in optimizer.param_groups if dense else []:
        scales = {dense[p].step_scale for p in group["params"] if p in dense}
        for scale in scales:
            mine = [p for p in group["params"] if p in dense and dense[p].step_scale == scale]
            step_densely(optimizer, group, mine, scale)


def _update_one(
    target: Target,
    group: dict[str, Any],
    grad: Tensor,
    optimizer: Optimizer,
    attachment: Attachment,
    shared: dict[Any, tuple[Any, ...]],
) -> str | None:
    kind, state = target.kind(group), optimizer.state[target.parameter]
    r, failure = None, None
    if is_small(grad):
        small: Any = grad
        r, failure = receive(target, kind, state, small, group, attachment.warn_once)
    if r is None:
        grad = grad.to_dense() if isinstance(grad, ProjectedGrad) else gathered(grad.detach())
        failure = refresh_if_due(target, kind, state, grad, group)
    update = update_of(kind if r is None else given(kind), target.session)
    weight = gathered(target.parameter.detach())
    gradient = grad if r is None else r.contiguous()
    numbers = numbers_of(update, state["step"], group, shared)
    update.apply([weight, gradient, *kind.inputs(state)], numbers)
    keep_shard(target.parameter, weight)
    if target.pushed:
        announce(target, kind, state)
    return failure


def _refresh_failed(target: Target, failure: str) -> str:
    return (
        f"GaLore could not refresh the projector of {target.name} "
        f"{tuple(target.parameter.shape)} {failure}. The old one stays, and the next step "
        "tries again; memrewrite.report counts further ones silently"
    )


def _complain_of_unserved() -> None:
    """Warn of a session that no optimizer serves: it updates a copy's or a wrapper's parameters."""
    for session in live_sessions():
        model = session.model()
        asked = session.galore is not None or session.moments is not None
        if not asked or session.unserved_steps > membership.PATIENCE or model is None:
            continue
        if not session.calls.called or all(p.grad is None for p in model.parameters()):
            continue  # it is not being trained
        session.unserved_steps += 1
        if session.unserved_steps == membership.PATIENCE:
            warn(
                f"{membership.PATIENCE} optimizer steps after "
                f"{'galore_rank' if session.galore else 'moments='} was asked for a model, "
                "no optimizer has stepped its parameters, so no state is "
                f"{'projected' if session.galore else 'stored in that format'}: build the "
                "optimizer over the parameters of the compiled model itself"
            )
