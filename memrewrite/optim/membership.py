"""Which parameters of an optimizer belong to compiled models, and checks of their state."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memrewrite.errors import UnsupportedError
from memrewrite.gradients.basis import Vector
from memrewrite.methods.vectors import Vectors
from memrewrite.methods.velora import SubTokens, wide
from memrewrite.moments.moment import stores
from memrewrite.moments.optimizers import ADAM, row_of
from memrewrite.moments.projected import PROJECTOR, STALE, Target, check_state, check_target
from memrewrite.moments.stored import full_from_here, take_back
from memrewrite.optim.attachment import Attachment, members, name_of
from memrewrite.optim.factored_step import warn_of_sums
from memrewrite.session.session import Session, live_sessions
from memrewrite.sites.eligible import SHARDED, Selection, sites_of
from memrewrite.sites.sharded import can_be_gathered, is_sharded
from memrewrite.sites.weights import candidates, matrices

PATIENCE = 20  # optimizer steps before a session that no optimizer serves is reported

_attachments: weakref.WeakKeyDictionary[Optimizer, Attachment] = weakref.WeakKeyDictionary()
_selections: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Selection]] = (
    weakref.WeakKeyDictionary()
)


def attachments() -> list[tuple[Optimizer, Attachment]]:
    """The attachments of all optimizers that have stepped or were attached."""
    return list(_attachments.items())


def attachment_of(optimizer: Optimizer) -> Attachment:
    """The attachment that `attached` made."""
    return _attachments[optimizer]


def attached(optimizer: Optimizer) -> Attachment:
    """The optimizer's attachment, created or updated, and checked."""
    attachment = _attachments.setdefault(optimizer, Attachment())
    sessions = live_sessions()
    found = [parameter for _, parameter in members(optimizer)]
    key = (_bindings(sessions), *map(id, sessions), *map(id, found))
    if key != attachment.key:
        small = {p: session for session in sessions for p in session.returned(Vectors)}
        attachment.ported = {p: small[p] for p in found if p in small}
        _expect_small(sessions, found, attachment)
        ours = [session for session in sessions if session.galore is not None]
        for session in ours:
            _check_whole(session, found)
        # A small gradient needs no GaLore.
        left = [p for p in found if p not in attachment.ported]
        attachment.targets = _targets(ours, left, attachment.targets)
        attachment.scaled = _scaled(sessions, found)
        attachment.stored = _stored(sessions, left, attachment)
        attachment.serves = _serves(sessions, found)
        attachment.key = key
        for session in sessions:
            warn_of_sums(session)
    if attachment.targets:
        name = next(iter(attachment.targets.values())).name
        _check_optimizer(optimizer, f"GaLore is to update {name}", "galore_rank")
    elif attachment.stored:
        parameter, session = next(iter(attachment.stored.items()))
        assert session.moments is not None
        what = f"{session.moments.name!r} is to store the moments of a weight"
        _check_optimizer(optimizer, f"{what} {tuple(parameter.shape)}", "moments=")
    if steps_as_known(optimizer):
        _check_members(optimizer, attachment)
    return attachment


def catch_up(optimizer: Optimizer, attachment: Attachment) -> None:
    """Update an attachment after a closure, which may have compiled graphs within the step."""
    if attachment.key[:1] != (_bindings(live_sessions()),):
        attached(optimizer)


def _bindings(sessions: list[Session]) -> int:
    return sum(len(graph.bindings) for session in sessions for graph in session.graphs)


def _serves(sessions: list[Session], found: list[nn.Parameter]) -> bool:
    """Whether an optimizer may get a small gradient, now or once a graph is compiled."""
    members = set(found)
    models = (s.model() for s in sessions if s.velora or s.galore or s.moments)
    return any(p in members for m in models if m is not None for p in m.parameters())


def _check_whole(session: Session, members: list[nn.Parameter]) -> None:
    """Raise UnsupportedError where weights were sharded after GaLore was asked for."""
    model = session.model()
    if model is None or not any(map(is_sharded, members)):
        return
    ours = set(members)
    for weight in matrices(model):
        if weight.name in session.whole and is_sharded(weight.parameter):
            if weight.parameter in ours and not can_be_gathered(weight.parameter):
                raise UnsupportedError(
                    f"GaLore is to project {weight.name} {weight.shape}, which is {SHARDED} "
                    "since: a projector needs the whole matrix. Compile without galore_rank, leave "
                    "the sharded weights out of memrewrite.GaLore(sites=...), or train with "
                    "DistributedDataParallel, under which GaLore works"
                )


def _scaled(sessions: list[Session], members: list[nn.Parameter]) -> dict[Tensor, Session]:
    """Parameters to scale, matched by name: sharding replaces the parameter that a graph saw."""
    ours = set(members)
    return {
        weight.parameter: session
        for session in sessions
        if (factored := session.factored()) and (model := session.model()) is not None
        for weight in candidates(model)
        if weight.name in factored and weight.parameter in ours
    }


def _stored(
    sessions: list[Session], left: Sequence[nn.Parameter], attachment: Attachment
) -> dict[Tensor, Session]:
    """Weights whose moments are in a storage format, excluding those of other methods."""
    ours = {p for p in left if p not in attachment.targets}
    found: dict[Tensor, Session] = {}
    for session in (s for s in sessions if s.moments is not None):
        model, form = session.model(), session.moments
        mine = [p for p in model.parameters() if p in ours] if model is not None else []
        found |= {p: session for p in mine if stores(form, p)}
        if mine:
            session.unserved_steps = PATIENCE + 1  # served: never complain
    return found


def _expect_small(
    sessions: list[Session], members: list[nn.Parameter], attachment: Attachment
) -> None:
    """Weights that will have small gradients, before any graph is compiled: to find the format of
    an optimizer's state, torch.distributed.checkpoint takes a step on gradients of zeros."""
    ours, attachment.expected = set(members), {}
    for session in sessions:
        model = session.model()
        method = next((m for m in session.methods if isinstance(m, SubTokens)), None)
        if model is None or method is None or session.factored():
            continue
        for parameter, site in method.choose(model, candidates(model)).items():
            if parameter in ours and method.small_gradient(site.weight):
                size = method.options.subtoken_size
                v = torch.zeros(size, device=parameter.device, dtype=wide(parameter.dtype))
                attachment.expected[parameter] = Vector(v, site.left)
                attachment.ported[parameter] = session


def _targets(
    sessions: list[Session], members: list[nn.Parameter], known: dict[Tensor, Target]
) -> dict[Tensor, Target]:
    alive = set(sessions)
    targets = {key: target for key, target in known.items() if target.session in alive}
    missing = set(members) - targets.keys()
    for session in sessions:
        model, galore = session.model(), session.galore
        if model is None or galore is None or missing.isdisjoint(model.parameters()):
            continue
        sites = _selection(model, session).projected
        for index, site in enumerate(sites):
            offset = galore.update_every * index // len(sites) if galore.stagger else 0
            if site.weight.parameter in missing:
                targets[site.weight.parameter] = Target(site, session, galore, offset)
                session.unserved_steps = PATIENCE + 1  # served: never warn
    return {p: targets[p] for p in members if p in targets}


def _selection(model: nn.Module, session: Session) -> Selection:
    """The projected weights, selected again only if the model's parameters have changed."""
    assert session.galore is not None
    key = (id(session), *map(id, model.parameters()))
    known = _selections.get(model)
    if known is None or known[0] != key:
        known = _selections[model] = (key, sites_of(model, session.galore, frozen=True))
    return known[1]


def steps_as_known(optimizer: Optimizer) -> bool:
    """Whether an optimizer has the step of a row of `moments.optimizers`."""
    return all(row_of(optimizer, group) is not None for group in optimizer.param_groups)


def _check_optimizer(optimizer: Optimizer, what: str, option: str) -> None:
    if not steps_as_known(optimizer):
        raise UnsupportedError(
            f"{what}, but its optimizer is a {name_of(optimizer)}; use torch.optim.Adam or AdamW "
            f"(a subclass must not override step), or compile the model without {option}"
        )
    for group in optimizer.param_groups:
        if group["differentiable"]:
            raise UnsupportedError(
                f"{what}, but its optimizer is differentiable=True: the rewritten update is not "
                "differentiated; leave it out"
            )


def _check_members(optimizer: Optimizer, attachment: Attachment) -> None:
    for group, parameter in members(optimizer):
        target = attachment.targets.get(parameter)
        state = optimizer.state.get(parameter)
        if target is not None:
            check_target(target)
            kind = target.kind(group)
            if state and state.get("exp_avg") is not target.checked:
                if told := check_state(target, kind, state):
                    attachment.warn_once("stored", told)
        elif isinstance(state, dict) and isinstance(state.get(PROJECTOR), Tensor):
            parts = [k for k in state if k.startswith(PROJECTOR) and k not in (PROJECTOR, STALE)]
            rank = "in parts" if parts else f"rank {state[PROJECTOR].shape[-1]}"
            raise ValueError(
                f"the optimizer holds projected state for a parameter of shape "
                f"{tuple(parameter.shape)} ({rank}) that is not projected now: compile the model "
                "with the galore options of the run that saved it, or start with a new optimizer"
            )
        elif isinstance(state, dict) and parameter not in attachment.stored:
            _take_back(parameter, state, attachment)
        grad, ours = parameter.grad, attachment.targets or attachment.stored
        if ours and grad is not None and grad.is_sparse:
            raise UnsupportedError(
                f"a parameter of shape {tuple(parameter.shape)} has a sparse gradient, which "
                "neither Adam nor GaLore takes: make its layer sparse=False"
            )


def _take_back(parameter: nn.Parameter, state: dict[str, Any], attachment: Attachment) -> None:
    """Bring moments in several tensors back in full, as stock Adam would read one of them.

    Raises ValueError where no registered form stores them so.
    """
    parts = [k for k in state if k.startswith(tuple(ADAM.moments)) and k not in ADAM.moments]
    if not parts:
        return
    shapes = dict.fromkeys((n for n in ADAM.moments if n in state), tuple(parameter.shape))
    if told := full_from_here(take_back(state, shapes, parameter.dtype)):
        attachment.warn_once("stored", told)
    else:
        raise ValueError(
            f"the optimizer holds moments of a weight {tuple(parameter.shape)} in a storage format "
            f"({', '.join(parts)}) that the model is not compiled with: pass the moments= of the "
            "run that saved it, or start with a new optimizer"
        )
