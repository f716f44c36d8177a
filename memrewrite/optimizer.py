"""GaLore in the user's own optimizer: attached at its first step, with no line of code.

A stock `torch.optim.Adam` or `AdamW` steps as it always does. Around its step the
gradients of the projected parameters are hidden (`.grad` is None, which every torch
optimizer skips), and after it those parameters take their rewritten update. State lives
in `optimizer.state[p]` as plain tensors:

    step ()   exp_avg, exp_avg_sq (r, D) or (O, r)   [max_exp_avg_sq]   projector (side, r)

so `state_dict`, `load_state_dict` and `torch.load(weights_only=True)` know it already.
Everything that can be refused is refused before anything is written.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from memrewrite.errors import UnsupportedError
from memrewrite.projection import sites_of
from memrewrite.state import Session, live_sessions, warn
from memrewrite.target import Target, check_state, check_target, refresh_if_due
from memrewrite.update import Kind, Update, build, hyperparameters


@dataclass
class Attachment:
    """What memrewrite does around the steps of one optimizer."""

    targets: dict[int, Target] = field(default_factory=dict)  # by id of the parameter
    hidden: list[tuple[Target, dict[str, Any], Tensor]] = field(default_factory=list)
    key: tuple[int, ...] = ()  # of the sessions and parameters that `targets` was made from
    hooks: tuple[Any, Any] | None = None
    warned: bool = False

    def hide(self, optimizer: Optimizer) -> None:
        """Take the gradients of all targets out of the stock step's sight."""
        for group, parameter in _members(optimizer):
            target = self.targets.get(id(parameter))
            if target is not None and parameter.grad is not None:
                self.hidden.append((target, group, parameter.grad))
        for target, _, _ in self.hidden:
            target.parameter.grad = None

    def reveal(self) -> list[tuple[Target, dict[str, Any], Tensor]]:
        """Give hidden gradients back; one that was set since is newer and stays."""
        hidden, self.hidden = self.hidden, []
        for target, _, grad in hidden:
            if target.parameter.grad is None:
                target.parameter.grad = grad
        return hidden


_attachments: weakref.WeakKeyDictionary[Optimizer, Attachment] = weakref.WeakKeyDictionary()
_updates: dict[tuple[Kind, str], Update] = {}
_installed: list[Any] = []


def install() -> None:
    """Look at every optimizer step from now on. Idempotent."""
    if not _installed:
        _installed.append(register_optimizer_step_pre_hook(_before_step))


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
    """The optimizers that update projected parameters of a session."""
    for optimizer, attachment in list(_attachments.items()):
        if any(target.session is session for target in attachment.targets.values()):
            yield optimizer, attachment


# --- which parameters, and whether all is well ----------------------------------------------


def _attached(optimizer: Optimizer) -> Attachment:
    """The optimizer's attachment, made or brought up to date, and checked."""
    attachment = _attachments.setdefault(optimizer, Attachment())
    sessions = live_sessions()
    members = [parameter for _, parameter in _members(optimizer)]
    key = (*map(id, sessions), *map(id, members))
    if key != attachment.key:
        attachment.targets = _targets(sessions, members, attachment.targets)
        attachment.key = key
    if attachment.targets:
        _check_optimizer(optimizer, next(iter(attachment.targets.values())).name)
    for group, parameter in _members(optimizer):
        target = attachment.targets.get(id(parameter))
        state = optimizer.state.get(parameter)
        if target is not None:
            check_target(target)
            kind = target.kind(group)
            if state and state.get("exp_avg") is not target.checked:
                check_state(target, kind, state)
                target.checked = state["exp_avg"]
        elif state and isinstance(state.get("projector"), Tensor):
            raise ValueError(
                f"the optimizer holds projected state for a parameter of shape "
                f"{tuple(parameter.shape)} (rank {state['projector'].shape[1]}) that is not "
                "projected now: compile the model with the galore options of the run that "
                "saved it, or start with a new optimizer"
            )
    return attachment


def _members(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield group, parameter


def _targets(
    sessions: list[Session], members: list[nn.Parameter], known: dict[int, Target]
) -> dict[int, Target]:
    wanted: dict[int, Target] = {}
    for session in sessions:
        model = session.model()
        if session.galore is None or model is None:
            continue
        sites = sites_of(model, session.galore, frozen=True).projected
        for index, site in enumerate(sites):
            gap = session.galore.update_every
            offset = gap * index // len(sites) if session.galore.stagger else 0
            wanted[id(site.candidate.parameter)] = Target(site, session, session.galore, offset)
    alive = {id(session) for session in sessions}
    kept = {key: target for key, target in known.items() if id(target.session) in alive}
    return {id(p): t for p in members if (t := kept.get(id(p)) or wanted.get(id(p))) is not None}


def _check_optimizer(optimizer: Optimizer, name: str) -> None:
    kind = type(optimizer)
    if inspect.unwrap(kind.step) is not inspect.unwrap(Adam.step):
        raise UnsupportedError(
            f"GaLore is to update {name}, but its optimizer is a {kind.__name__}; use "
            "torch.optim.Adam or AdamW (a subclass must not override step), or compile the "
            "model without galore_rank"
        )
    for group in optimizer.param_groups:
        if group["differentiable"]:
            raise UnsupportedError(
                f"GaLore is to update {name}, but its optimizer is differentiable=True: the "
                "rewritten update is not differentiated; leave it out"
            )


# --- around a step --------------------------------------------------------------------------


def _before_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
    """The global pre-hook: it runs ahead of all hooks of the optimizer's own."""
    attachment = _attached(optimizer)
    attachment.reveal()  # what a step that raised had hidden
    if not attachment.targets:
        return
    for _, parameter in _members(optimizer):
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} has a sparse gradient, which "
                "Adam does not support: make its layer sparse=False"
            )
    if attachment.hooks is None:
        attachment.hooks = (
            optimizer.register_step_pre_hook(_hide),
            optimizer.register_step_post_hook(_update),
        )
    # Behind the user's own pre-hooks and ahead of the user's own post-hooks, which so see
    # the gradients that they would see without us.
    before: Any = optimizer._optimizer_step_pre_hooks
    after: Any = optimizer._optimizer_step_post_hooks
    before.move_to_end(attachment.hooks[0].id)
    after.move_to_end(attachment.hooks[1].id, last=False)


def _hide(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    attachment = _attachments[optimizer]
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        attachment.hide(optimizer)
        return None

    def watched() -> Any:  # the gradients appear inside the stock step
        loss = closure()
        attachment.hide(optimizer)
        return loss

    return args[:1], {"closure": watched}


@torch.no_grad()
def _update(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
    attachment = _attachments[optimizer]
    pending = attachment.reveal()
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)  # GradScaler's
    if found_inf is not None and bool(found_inf.item()):
        return
    grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    shared: dict[Any, tuple[Any, ...]] = {}
    for target, group, grad in pending:
        if grad_scale is not None:
            grad.div_(grad_scale.to(grad.device))
        kind, state = target.kind(group), optimizer.state[target.parameter]
        failure = refresh_if_due(target, kind, state, grad, group)
        if failure is not None:
            _warn_once(attachment, target, failure)
        update = _update_of(kind, target.session)
        tensors = [target.parameter.detach(), grad.detach(), state["exp_avg"], state["exp_avg_sq"]]
        tensors += [state["max_exp_avg_sq"]] if kind.amsgrad else []
        numbers = _numbers(update, state["step"], group, shared)
        update.apply([*tensors, state["projector"]], numbers)


def _numbers(
    update: Update, step: Tensor, group: dict[str, Any], shared: dict[Any, tuple[Any, ...]]
) -> tuple[Any, ...]:
    """Count a step; the scalars of its update, the same for all weights of a kind and group."""
    if step.device.type != "cpu":  # reading it would wait for the device
        return update.numbers(step, hyperparameters(group, update.kind.decays))
    key = (update.kind, id(group), float(step))
    if key in shared:
        step += 1
    else:
        shared[key] = update.numbers(step, hyperparameters(group, update.kind.decays))
    return shared[key]


def _update_of(kind: Kind, session: Session) -> Update:
    key = (kind, session.engine.backend)
    if key not in _updates:
        _updates[key] = build(kind, session.engine)
    return _updates[key]


def _warn_once(attachment: Attachment, target: Target, failure: str) -> None:
    if not attachment.warned:
        attachment.warned = True
        warn(
            f"GaLore could not refresh the projector of {target.name} "
            f"{tuple(target.parameter.shape)} {failure}. The old one stays, and the next step "
            "tries again; memrewrite.report counts further ones silently"
        )
