"""Which arguments of a captured graph are weights that VeLoRA compresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from memrewrite.options import VeLoRA
from memrewrite.plan import Weight
from memrewrite.sites import Candidate, candidates, why_not

if TYPE_CHECKING:
    from memrewrite.state import Session


def weights_of(
    session: Session, positions: Sequence[int], args: Sequence[Any]
) -> tuple[dict[int, str], list[Weight]]:
    """Of the parameters among `args`: their candidate names, and those that are selected."""
    model = session.model()
    found = candidates(model) if model is not None else []
    chosen = session.selected(found)
    aliases: dict[int, list[Candidate]] = {}
    for candidate in found:
        aliases.setdefault(id(candidate.parameter), []).append(candidate)
    names, selected = {}, []
    for position in positions:
        known = aliases.get(id(args[position]), [])
        wanted = [c for c in known if c.name in chosen and why_not(c, session.velora) is None]
        for candidate in (wanted or known)[:1]:
            names[position] = candidate.name
        if wanted:
            selected.append(_weight(position, wanted[0], session.velora))
    return names, selected


def _weight(position: int, candidate: Candidate, velora: VeLoRA | None) -> Weight:
    assert velora is not None
    parameter = candidate.parameter
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    size, port = velora.subtoken_size, None
    coordinates = velora.gradients == "coordinates" and velora.init != "running_mean"
    wrapper = hasattr(parameter, "__tensor_flatten__")  # a DTensor, a quantised weight
    if coordinates and candidate.kind == "linear" and not wrapper:
        port = (parameter.shape[0], -(-parameter.shape[1] // size))
    return Weight(position, size, dtype, parameter.device, port)
