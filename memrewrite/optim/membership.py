"""Which parameters of an optimizer are ours, in which way, and whether all is well with them."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from memrewrite.errors import UnsupportedError
from memrewrite.gradients.basis import Vector
from memrewrite.optim.attachment import Attachment, members, name_of
from memrewrite.optim.galore import Target, check_state, check_target
from memrewrite.optim.velora_coordinates import warn_of_sums
from memrewrite.session.selection import small_gradient
from memrewrite.session.session import Session, live_sessions
from memrewrite.sites.candidates import candidates, why_not
from memrewrite.sites.eligible import (
    SHARDED,
    Selection,
    sites_of,
    weights_of,
)
from memrewrite.sites.sharded import can_be_gathered, is_sharded

PATIENCE = 20  # optimizer steps before a session that no optimizer serves is reported

_attachments: weakref.WeakKeyDictionary[Optimizer, Attachment] = weakref.WeakKeyDictionary()
_selections: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Selection]] = (
    weakref.WeakKeyDictionary()
)


def attachments() -> list[tuple[Optimizer, Attachment]]:
    """Of all optimizers that have stepped or were attached."""
    return list(_attachments.items())


def attachment_of(optimizer: Optimizer) -> Attachment:
    """What `attached` made."""
    return _attachments[optimizer]


def attached(optimizer: Optimizer) -> Attachment:
    """The optimizer's attachment, made or brought up to date, and checked."""
    attachment = _attachments.setdefault(optimizer, Attachment())
    sessions = live_sessions()
    found = [parameter for _, parameter in members(optimizer)]
    key = (_bindings(sessions), *map(id, sessions), *map(id, found))
    if key != attachment.key:
        ported = {id(p): session for session in sessions for p in session.ported()}
        attachment.ported = {id(p): ported[id(p)] for p in found if id(p) in ported}
        _expect_small(sessions, found, attachment)
        ours = [session for session in sessions if session.galore is not None]
        for session in ours:
            _check_whole(session, found)
        # A small gradient needs no GaLore.
        left = [p for p in found if id(p) not in attachment.ported]
        attachment.targets = _targets(ours, left, attachment.targets)
        attachment.scaled = _scaled(sessions, found)
        attachment.serves = _serves(sessions, found)
        attachment.key = key
        for session in sessions:
            warn_of_sums(session)
    if attachment.targets:
        _check_optimizer(optimizer, next(iter(attachment.targets.values())).name)
    if is_adam(optimizer):
        _check_members(optimizer, attachment)
    return attachment


def catch_up(optimizer: Optimizer, attachment: Attachment) -> None:
    """A closure may have compiled the first graphs within the step, behind `attached`."""
    if attachment.key[:1] != (_bindings(live_sessions()),):
        attached(optimizer)


def _bindings(sessions: list[Session]) -> int:
    return sum(len(graph.bindings) for session in sessions for graph in session.graphs)


def _serves(sessions: list[Session], found: list[nn.Parameter]) -> bool:
    """Whether an optimizer may meet a gradient of ours, now or once a graph is compiled."""
    members = {id(p) for p in found}
    models = (s.model() for s in sessions if s.velora is not None or s.galore is not None)
    return any(id(p) in members for m in models if m is not None for p in m.parameters())


def _check_whole(session: Session, members: list[nn.Parameter]) -> None:
    """Raise UnsupportedError where weights were sharded after GaLore was asked for."""
    model = session.model()
    if model is None or not any(map(is_sharded, members)):
        return
    ours = {id(p) for p in members}
    for candidate in weights_of(model):
        if candidate.name in session.whole and is_sharded(candidate.parameter):
            if id(candidate.parameter) in ours and not can_be_gathered(candidate.parameter):
                raise UnsupportedError(
                    f"GaLore is to project {candidate.name} {candidate.shape}, which is {SHARDED} "
                    "since: a projector needs the whole matrix. Compile without galore_rank, leave "
                    "the sharded weights out of memrewrite.GaLore(sites=...), or train with "
                    "DistributedDataParallel, under which GaLore works"
                )


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


def _expect_small(
    sessions: list[Session], members: list[nn.Parameter], attachment: Attachment
) -> None:
    """Weights that no graph was compiled for yet: torch.distributed.checkpoint takes a step on
    gradients of zeros to learn what an optimizer's state looks like."""
    ours, attachment.expected = {id(p) for p in members}, {}
    for session in sessions:
        model, velora = session.model(), session.velora
        if model is None or velora is None or session.factored():
            continue
        found = candidates(model)
        chosen = session.selected(found)
        for candidate in (c for c in found if c.name in chosen and id(c.parameter) in ours):
            if why_not(candidate, velora) is None and small_gradient(candidate, velora):
                like = candidate.parameter
                v = torch.zeros(velora.subtoken_size, device=like.device)
                v = v.double() if like.dtype == torch.float64 else v
                attachment.expected[id(like)] = Vector(v, candidate.kind == "conv1d")
                attachment.ported[id(like)] = session


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


def is_adam(optimizer: Optimizer) -> bool:
    return inspect.unwrap(type(optimizer).step) is inspect.unwrap(Adam.step)


def _check_optimizer(optimizer: Optimizer, name: str) -> None:
    if not is_adam(optimizer):
        raise UnsupportedError(
            f"GaLore is to update {name}, but its optimizer is a {name_of(optimizer)}; "
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
