"""GaLore in the user's own optimizer: attached at its first step, with no line of code.

A stock `torch.optim.Adam` or `AdamW` steps as it always does, except that it does not see
the gradients of the projected parameters while it collects its own; after it those
parameters take their rewritten update. State lives in `optimizer.state[p]`:

    step ()   exp_avg, exp_avg_sq (r, D) or (O, r)   [max_exp_avg_sq]   projector (side, r)

plain tensors, so `state_dict`, `load_state_dict` and `torch.load(weights_only=True)` know
it already. Everything that can be refused is refused before anything is written, and an
optimizer that has nothing to do with us is left alone.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from memrewrite.attachment import Attachment, compiled, members, numbers_of, update_of
from memrewrite.errors import UnsupportedError, warn
from memrewrite.factored import FactoredKind
from memrewrite.projected import ProjectedGrad
from memrewrite.projection import Selection, sites_of
from memrewrite.pushed import announce, given, is_small, receive
from memrewrite.sites import candidates
from memrewrite.small_gradients import (
    spread_orphans,
    step_densely,
    takes,
    update_factored,
    warn_of_dense,
    warn_of_scale,
    warn_of_sums,
)
from memrewrite.state import Session, live_sessions
from memrewrite.target import Target, check_state, check_target, refresh_if_due
from memrewrite.update import Update, build

PATIENCE = 20  # optimizer steps before a session that no optimizer serves is reported


_attachments: weakref.WeakKeyDictionary[Optimizer, Attachment] = weakref.WeakKeyDictionary()
_selections: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Selection]] = (
    weakref.WeakKeyDictionary()
)
_installed: list[Any] = []


def install() -> None:
    """Look at every optimizer step from now on. Idempotent."""
    if not _installed:
        hook: Any = torch.compiler.disable(_before_step)  # type: ignore[no-untyped-call]
        _installed.append(register_optimizer_step_pre_hook(hook))


def attach(optimizer: Optimizer) -> None:
    """`compile(optimizer)`: what its first step would do, now.

    Raises ValueError where none of its parameters is projected, and whatever the first
    step would raise.
    """
    if not _attached(optimizer).targets:
        raise ValueError(
            f"no parameter of this {type(optimizer).__name__} is projected: compile the model "
            "first, memrewrite.compile(model, galore_rank=...), and build the optimizer over "
            "its parameters"
        )


def attachments(session: Session) -> Iterator[tuple[Optimizer, Attachment]]:
    """The optimizers that update projected or compressed parameters of a session."""
    for optimizer, attachment in list(_attachments.items()):
        served = [target.session for target in attachment.targets.values()]
        if any(one is session for one in (*served, *attachment.ported.values())):
            yield optimizer, attachment


def updates_of(session: Session) -> list[Update]:
    """The compiled updates that a session's weights have had so far, one per kind."""
    kinds: set[Any] = set()
    for _, attachment in attachments(session):
        targets = [t for t in attachment.targets.values() if t.session is session]
        known = {target.known for target in targets if target.known is not None}
        kinds |= known | {given(kind) for kind in known}
        kinds |= {k for i, k in attachment.factored.items() if attachment.ported[i] is session}
    backend = session.engine.backend
    found = [u for (kind, engine), u in compiled.items() if engine == backend and kind in kinds]
    # Not in the order of the process: another model may have compiled some of them before.
    return sorted(found, key=lambda u: (isinstance(u.kind, FactoredKind), str(u.kind)))


# --- which parameters, and whether all is well ----------------------------------------------


def _attached(optimizer: Optimizer) -> Attachment:
    """The optimizer's attachment, made or brought up to date, and checked."""
    attachment = _attachments.setdefault(optimizer, Attachment())
    sessions = live_sessions()
    found = [parameter for _, parameter in members(optimizer)]
    bindings = sum(len(graph.bindings) for session in sessions for graph in session.graphs)
    key = (bindings, *map(id, sessions), *map(id, found))
    if key != attachment.key:
        ported = {id(p): session for session in sessions for p in session.ported()}
        attachment.ported = {id(p): ported[id(p)] for p in found if id(p) in ported}
        ours = [session for session in sessions if session.galore is not None]
        left = [p for p in found if id(p) not in ported]  # a small gradient needs no GaLore
        attachment.targets = _targets(ours, left, attachment.targets)
        attachment.scaled = _scaled(sessions, found)
        attachment.key = key
        for session in sessions:
            warn_of_sums(session)
    if attachment.targets:
        _check_optimizer(optimizer, next(iter(attachment.targets.values())).name)
    if _is_adam(optimizer):
        _check_members(optimizer, attachment)
    return attachment


def _scaled(sessions: list[Session], members: list[nn.Parameter]) -> dict[int, Session]:
    """By name, because a sharded weight is another parameter than the one that a graph saw."""
    ours = {id(p) for p in members}
    return {
        id(candidate.parameter): session
        for session in sessions
        if (factored := session.factored()) and (model := session.model()) is not None
        for candidate in candidates(model)
        if candidate.name in factored and id(candidate.parameter) in ours
    }


def _targets(
    sessions: list[Session], members: list[nn.Parameter], known: dict[int, Target]
) -> dict[int, Target]:
    alive = {id(session) for session in sessions}
    targets = {key: target for key, target in known.items() if id(target.session) in alive}
    missing = {id(p) for p in members} - targets.keys()
    for session in sessions:
        model, galore = session.model(), session.galore
        if model is None or galore is None or missing.isdisjoint(map(id, model.parameters())):
            continue
        sites = _selection(model, session).projected
        for index, site in enumerate(sites):
            offset = galore.update_every * index // len(sites) if galore.stagger else 0
            if id(site.candidate.parameter) in missing:
                target = Target(site, session, galore, offset)
                targets[id(site.candidate.parameter)] = target
                session.unserved_steps = PATIENCE + 1  # served: never complain
    return {id(p): targets[id(p)] for p in members if id(p) in targets}


def _selection(model: nn.Module, session: Session) -> Selection:
    """What is projected, asked again only where the model has other parameters than before."""
    assert session.galore is not None
    key = (id(session), *map(id, model.parameters()))
    known = _selections.get(model)
    if known is None or known[0] != key:
        known = _selections[model] = (key, sites_of(model, session.galore, frozen=True))
    return known[1]


def _is_adam(optimizer: Optimizer) -> bool:
    return inspect.unwrap(type(optimizer).step) is inspect.unwrap(Adam.step)


def _check_optimizer(optimizer: Optimizer, name: str) -> None:
    if not _is_adam(optimizer):
        raise UnsupportedError(
            f"GaLore is to update {name}, but its optimizer is a {type(optimizer).__name__}; "
            "use torch.optim.Adam or AdamW (a subclass must not override step), or compile the "
            "model without galore_rank"
        )
    for group in optimizer.param_groups:
        if group["differentiable"]:
            raise UnsupportedError(
                f"GaLore is to update {name}, but its optimizer is differentiable=True: the "
                "rewritten update is not differentiated; leave it out"
            )


def _check_members(optimizer: Optimizer, attachment: Attachment) -> None:
    for group, parameter in members(optimizer):
        target = attachment.targets.get(id(parameter))
        state = optimizer.state.get(parameter)
        if target is not None:
            check_target(target)
            kind = target.kind(group)
            if state and state.get("exp_avg") is not target.checked:
                check_state(target, kind, state)
        elif isinstance(state, dict) and isinstance(state.get("projector"), Tensor):
            raise ValueError(
                f"the optimizer holds projected state for a parameter of shape "
                f"{tuple(parameter.shape)} (rank {state['projector'].shape[-1]}) that is not "
                "projected now: compile the model with the galore options of the run that "
                "saved it, or start with a new optimizer"
            )
        grad = parameter.grad
        if attachment.targets and grad is not None and grad.is_sparse:
            raise UnsupportedError(
                f"a parameter of shape {tuple(parameter.shape)} has a sparse gradient, which "
                "neither Adam nor GaLore takes: make its layer sparse=False"
            )


# --- around a step --------------------------------------------------------------------------


def _before_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
    """The global pre-hook: it runs ahead of all hooks of the optimizer's own."""
    attachment = _attached(optimizer)
    attachment.factored, attachment.dense = {}, {}
    _complain_of_unserved()
    if not _is_adam(optimizer):
        warn_of_dense(optimizer, attachment)
        warn_of_scale(optimizer, attachment)
        return
    spread_orphans(optimizer, attachment)
    if not (attachment.targets or attachment.ported or attachment.scaled):
        return
    if attachment.post_hook is None:
        hook: Any = torch.compiler.disable(_update)  # type: ignore[no-untyped-call]
        attachment.post_hook = optimizer.register_step_post_hook(hook)
        skipping: Any = _skipping(weakref.ref(optimizer), attachment)
        skipping = torch.compiler.disable(skipping)  # type: ignore[no-untyped-call]
        optimizer._init_group = skipping  # type: ignore[attr-defined]
    # Ahead of the user's own post-hooks: the step that they follow is complete.
    after: Any = optimizer._optimizer_step_post_hooks
    after.move_to_end(attachment.post_hook.id, last=False)


def _skipping(reference: weakref.ref[Optimizer], attachment: Attachment) -> Callable[..., Any]:
    """Adam's collection of parameters and gradients, blind to ours for as long as it runs."""

    def init_group(group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        optimizer: Any = reference()
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
    attachment = _attachments[optimizer]
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)  # GradScaler's
    if found_inf is not None and bool(found_inf.item()):
        return
    grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    shared: dict[Any, tuple[Any, ...]] = {}
    built = len(compiled)
    with contextlib.ExitStack() as stack:
        for device in {p.device.type for _, p in members(optimizer)}:
            stack.enter_context(torch.autocast(device, enabled=False))  # as stock Adam is
        for group, parameter in members(optimizer):
            target, grad = attachment.targets.get(id(parameter)), parameter.grad
            factored = attachment.factored.get(id(parameter))
            if (target is None and factored is None) or grad is None:
                continue
            if grad_scale is not None:
                grad.div_(grad_scale.to(grad.device))
            if factored is not None:
                session = attachment.ported[id(parameter)]
                update_factored(factored, session, parameter, group, optimizer, shared)
                continue
            assert target is not None
            failure = _update_one(target, group, grad, optimizer, attachment, shared)
            if failure is not None:
                attachment.warn_once("refresh", _refresh_failed(target, failure))
        _step_densely(optimizer, attachment)
    if len(compiled) > built:
        served = [target.session for target in attachment.targets.values()]
        for session in {*served, *attachment.ported.values()}:
            session.changed(complete=True)


def _step_densely(optimizer: Optimizer, attachment: Attachment) -> None:
    dense = attachment.dense
    for group in optimizer.param_groups if dense else []:
        scales = {dense[id(p)].step_scale for p in group["params"] if id(p) in dense}
        for scale in scales:
            mine = [p for p in group["params"] if id(p) in dense]
            mine = [p for p in mine if dense[id(p)].step_scale == scale]
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
        r, failure = receive(target, kind, state, small, group, attachment)
    if r is None:
        grad = grad.to_dense() if isinstance(grad, ProjectedGrad) else grad.detach()
        failure = refresh_if_due(target, kind, state, grad, group)
    update = update_of(kind if r is None else given(kind), target.session, build)
    tensors = [target.parameter.detach(), grad if r is None else r.contiguous()]
    tensors += [state["exp_avg"], state["exp_avg_sq"]]
    tensors += [state["max_exp_avg_sq"]] if kind.amsgrad else []
    numbers = numbers_of(update, state["step"], group, shared)
    update.apply([*tensors, state["projector"]], numbers)
    if target.pushed:
        announce(target, kind, state, r)
    return failure


def _refresh_failed(target: Target, failure: str) -> str:
    return (
        f"GaLore could not refresh the projector of {target.name} "
        f"{tuple(target.parameter.shape)} {failure}. The old one stays, and the next step "
        "tries again; memrewrite.report counts further ones silently"
    )


def _complain_of_unserved() -> None:
    """A model that trains, by somebody else's parameters: a copy's, or a sharded wrapper's."""
    for session in live_sessions():
        model = session.model()
        if session.galore is None or session.unserved_steps > PATIENCE or model is None:
            continue
        if not session.called or all(p.grad is None for p in model.parameters()):
            continue  # it is not being trained
        session.unserved_steps += 1
        if session.unserved_steps == PATIENCE:
            warn(
                f"{PATIENCE} optimizer steps after galore_rank was asked for a model, no "
                "optimizer has stepped its parameters, so no state is projected: build the "
                "optimizer over the parameters of the compiled model itself"
            )
