"""Save vectors in an optimizer's state, and restore vectors and bases from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from memrewrite.gradients.packing import CALIBRATED, SUM, VECTOR, pack
from memrewrite.methods.method import Ask
from memrewrite.methods.velora import SubTokens, wide
from memrewrite.session.session import Session
from memrewrite.sites.eligible import sites_of
from memrewrite.sites.weights import candidates


def go_on_from(session: Session, optimizer: Optimizer) -> None:
    """Restore every v and every basis from the state that an optimizer has loaded."""
    model, vectors, bases = session.model(), session.vectors, session.bases
    if model is None:
        return
    for name, like in _compressed(session, model, optimizer):
        state = optimizer.state.get(like)
        if vectors is not None and isinstance(state, dict):
            size = (vectors.options.subtoken_size,)
            ask = Ask(0, wide(like.dtype), like.device, like.dtype, size)
            vectors.recall_vector([name], ask, [state])
    if bases is not None:
        for site in sites_of(model, bases.options, frozen=True).projected:
            state = optimizer.state.get(site.weight.parameter)
            if isinstance(state, dict) and site.weight.name in bases.by_name:
                del bases.by_name[site.weight.name]
                bases.recall_basis(site, state)


def store_vectors(session: Session, optimizer: Optimizer) -> None:
    """Store v, or the sum of its running mean, in the full-size states of compressed weights.

    Zeros if it is not calibrated yet: torch.distributed.checkpoint needs the same keys at all
    steps.
    """
    model, vectors = session.model(), session.vectors
    if model is None or vectors is None:
        return
    running = vectors.options.init == "running_mean"
    key, known = (SUM, vectors.sums) if running else (CALIBRATED, vectors.vectors)
    for name, like in _compressed(session, model, optimizer):
        value = known.get(name)
        if value is None:
            dtype = torch.float64 if running else wide(like.dtype)
            size = vectors.options.subtoken_size
            value = torch.zeros(size, device=like.device, dtype=dtype)
        _store(optimizer, like, key, value)


def _compressed(
    session: Session, model: nn.Module, optimizer: Optimizer
) -> list[tuple[str, nn.Parameter]]:
    """An optimizer's weights that VeLoRA selects, under each of their names."""
    method = next((m for m in session.methods if isinstance(m, SubTokens)), None)
    ours = {p for group in optimizer.param_groups for p in group["params"]}
    found = candidates(model) if method is not None else []
    if method is None or not any(weight.parameter in ours for weight in found):
        return []
    chosen = method.select(found)
    mine = [w for w in found if w.parameter in ours and w.name in chosen]
    return [(w.name, w.parameter) for w in mine if method.why_not(w) is None]


def _store(optimizer: Optimizer, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    if isinstance(optimizer, SGD):  # without momentum its state is empty, and may have more keys
        optimizer.state[parameter]
    state = optimizer.state.get(parameter)
    if not isinstance(state, dict) or VECTOR in state:
        return
    if state or isinstance(optimizer, SGD):  # others initialize a state only if it is empty
        state[key] = pack(value.detach(), parameter.dtype)
