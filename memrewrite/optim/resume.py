"""Going on from a checkpoint that holds the model's and the optimizer's state alone.

Trainers save `model.state_dict()` and `optimizer.state_dict()` and nothing of ours. What a run
needs besides is therefore in the optimizer's state of each weight, as plain tensors:

    vector              v (M,) of a factored state, along which its moments are
    calibrated_vector   v (M,) of a compressed weight whose moments are full-size
    calibrated_sum      the sum (M,) behind the running mean of one
    projector, step     of a projected one: the basis of the next gradient follows from them

It is read back the first time that a graph needs a v or a basis and the session has none, and
whenever an optimizer that has stepped is given another state.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from memrewrite.gradients import sketch
from memrewrite.gradients.packing import CALIBRATED, SUM, VECTOR, pack, unpack
from memrewrite.record.request import Weight
from memrewrite.sites.candidates import Candidate, candidates, why_not
from memrewrite.sites.eligible import Site, sites_of

if TYPE_CHECKING:
    from memrewrite.session.session import Session

State = Mapping[str, Any]


# --- reading -------------------------------------------------------------------------------


def states_of(parameters: Iterable[Tensor]) -> dict[int, State]:
    """By id of a parameter, what the optimizers of this process hold of it.

    An optimizer knows its parameters, and nobody knows all optimizers but the garbage
    collector. It is asked when a run starts, never in a step. Where one of those that have a
    parameter has no state of it, a new run starts: another one may be left over from the last.
    """
    optimizers = [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]
    known = [(_members(o), getattr(o, "state", None)) for o in optimizers]
    tables = [(members, state) for members, state in known if isinstance(state, dict)]
    found: dict[int, State] = {}
    for parameter in parameters:
        held = [state.get(parameter) for members, state in tables if id(parameter) in members]
        states = [state for state in held if isinstance(state, dict) and state]
        if states and len(states) == len(held):
            found[id(parameter)] = states[0]
    return found


def _members(optimizer: Optimizer) -> set[int]:
    """Ids; none of one that is not made yet."""
    return {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


def recall_vector(
    session: Session, names: Sequence[str], weight: Weight, states: Iterable[State]
) -> bool:
    """Take the v of an input from the states of the weights (of these names) that read it."""
    assert session.velora is not None
    running = session.velora.init == "running_mean"
    for state in states:
        if running and (total := _read(state, (SUM,), weight.size, torch.float64)) is not None:
            session.set_sum(names, weight, total)
            return True
        v = None if running else _read(state, (VECTOR, CALIBRATED), weight.size, weight.dtype)
        if v is not None and not session.was_provisional(names[0], v, weight, state):
            session.vectors |= dict.fromkeys(names, v)
            return True
    return False


def _read(state: State, keys: Sequence[str], size: int, dtype: torch.dtype) -> Tensor | None:
    """The (M,) under the first of some keys that is there, and is calibrated."""
    packed = next((state[key] for key in keys if key in state), None)
    if not isinstance(packed, Tensor) or not packed.ndim or packed.shape[-1] != size:
        return None
    found = unpack(packed.detach(), dtype)
    return found if 0.0 < float(found.norm()) < math.inf else None


def recall_bases(session: Session, sites: Sequence[Site]) -> None:
    """Go on with the projectors that optimizers hold of weights that have no basis yet."""
    missing = [site for site in sites if site.candidate.name not in session.bases]
    if missing and not session.settled:
        states = states_of(site.candidate.parameter for site in missing)
        for site in missing:
            _recall_basis(session, site, states.get(id(site.candidate.parameter), {}))


def _recall_basis(session: Session, site: Site, state: State) -> None:
    assert session.galore is not None
    p = state.get("projector")
    if not isinstance(p, Tensor) or p.shape[-1] != site.rank or state.get("projector_stale"):
        return
    weight, name = site.candidate.parameter.detach(), site.candidate.name
    due = sketch.is_due(int(state["step"]), session.galore.update_every)
    session.bases[name] = sketch.following(name, weight, site.rank, site.left, state, due)


def go_on_from(session: Session, optimizer: Optimizer) -> None:
    """Take every v and every basis from the state that an optimizer has been given."""
    model = session.model()
    if model is None:
        return
    for candidate in _compressed(session, model, optimizer):
        like, state = candidate.parameter, optimizer.state.get(candidate.parameter)
        if session.velora is not None and isinstance(state, dict):
            wide = torch.float64 if like.dtype == torch.float64 else torch.float32
            weight = Weight(0, session.velora.subtoken_size, wide, like.device)
            recall_vector(session, [candidate.name], weight, [state])
    if session.galore is not None and session.galore.gradients == "coordinates":
        for site in sites_of(model, session.galore, frozen=True).projected:
            state = optimizer.state.get(site.candidate.parameter)
            if isinstance(state, dict) and site.candidate.name in session.bases:
                del session.bases[site.candidate.name]
                _recall_basis(session, site, state)


# --- writing -------------------------------------------------------------------------------


def store_vectors(session: Session, optimizer: Optimizer) -> None:
    """Leave v, or the sum behind it, in the full-size states of compressed weights.

    Zeros stand for what is not calibrated yet: a checkpoint's keys are the same at all steps,
    as torch.distributed.checkpoint needs it.
    """
    model, velora = session.model(), session.velora
    if model is None or velora is None:
        return
    running = velora.init == "running_mean"
    key, known = (SUM, session.sums) if running else (CALIBRATED, session.vectors)
    for candidate in _compressed(session, model, optimizer):
        value = known.get(candidate.name)
        if value is None:
            like = candidate.parameter
            dtype = torch.float64 if running or like.dtype == torch.float64 else torch.float32
            value = torch.zeros(velora.subtoken_size, device=like.device, dtype=dtype)
        _store(optimizer, candidate.parameter, key, value)


def _compressed(session: Session, model: nn.Module, optimizer: Optimizer) -> list[Candidate]:
    """An optimizer's weights that VeLoRA is asked to compress."""
    ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = candidates(model) if session.velora is not None else []
    if not any(id(c.parameter) in ours for c in found):
        return []
    chosen = session.selected(found)
    mine = [c for c in found if id(c.parameter) in ours and c.name in chosen]
    return [c for c in mine if why_not(c, session.velora) is None]


def _store(optimizer: Optimizer, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    if isinstance(optimizer, SGD):  # without momentum it keeps nothing, and does not mind
        optimizer.state[parameter]
    state = optimizer.state.get(parameter)
    if not isinstance(state, dict) or VECTOR in state:
        return
    if state or isinstance(optimizer, SGD):  # others take an empty state for one to be made
        state[key] = pack(value.detach(), parameter.dtype)
