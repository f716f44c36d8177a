"""Which arguments of a captured graph are weights whose gradients are rewritten."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memrewrite.gradients.basis import small_shape
from memrewrite.record.request import Weight
from memrewrite.sites.candidates import Candidate, candidates, why_not
from memrewrite.sites.eligible import Site, sites_of
from memrewrite.sites.options import VeLoRA

if TYPE_CHECKING:
    from memrewrite.session.session import Session


@dataclass(eq=False)
class Choice:
    """What is rewritten when a graph is called with certain parameters."""

    names: dict[int, str]  # argument position -> candidate name
    parameters: list[tuple[int, weakref.ref[Tensor]]]
    selected: list[Weight]  # VeLoRA's
    sites: list[tuple[int, Site]]  # GaLore's, where gradients come in coordinates
    foreign: bool = False  # plain tensors stand in for the weights: functional_call's


def choose(session: Session, positions: Sequence[int], args: Sequence[Any]) -> Choice:
    """Of the parameters among `args`."""
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
    taken = {weight.position for weight in selected}
    sites = _sites(session, [p for p in positions if p not in taken], args)
    names = {position: site.candidate.name for position, site in sites} | names
    parameters: list[Any] = [(i, weakref.ref(args[i])) for i in positions]
    swapped = {id(a) for a in args if isinstance(a, Tensor) and not isinstance(a, nn.Parameter)}
    foreign = not names and not swapped.isdisjoint(aliases)
    return Choice(names, parameters, selected, sites, foreign)


def _sites(
    session: Session, positions: Sequence[int], args: Sequence[Any]
) -> list[tuple[int, Site]]:
    """Matrices alone: a convolution's gradient is projected by the optimizer."""
    model, galore = session.model(), session.galore
    if model is None or galore is None or galore.gradients == "dense":
        return []
    known = {id(s.candidate.parameter): s for s in sites_of(model, galore).projected}
    places = [(p, known[id(args[p])]) for p in positions if id(args[p]) in known]
    return [(p, site) for p, site in places if args[p].ndim == 2]


def _weight(position: int, candidate: Candidate, velora: VeLoRA | None) -> Weight:
    assert velora is not None
    parameter = candidate.parameter
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    left, port = candidate.kind == "conv1d", small_gradient(candidate, velora)
    return Weight(position, velora.subtoken_size, dtype, parameter.device, port, left)


def small_gradient(candidate: Candidate, velora: VeLoRA) -> tuple[int, int] | None:
    """The shape in which the gradient of a selected weight is asked for; None: in full."""
    parameter = candidate.parameter
    wrapper = hasattr(parameter, "__tensor_flatten__")  # a DTensor, a quantised weight
    if velora.full_gradients or candidate.kind not in ("linear", "conv1d") or wrapper:
        return None
    return small_shape(parameter.shape, velora.subtoken_size, candidate.kind == "conv1d")


def small_weights(session: Session) -> list[nn.Parameter]:
    """Weights whose gradients may come small, whatever the graphs turn out to be."""
    model = session.model()
    if model is None or session.full is not None:
        return []
    found = candidates(model)
    chosen = session.selected(found)
    wanted = [c for c in found if c.name in chosen and why_not(c, session.velora) is None]
    velora = session.velora
    ported = [c for c in wanted if velora is not None and small_gradient(c, velora)]
    weights = [parameter for _, parameter in model.named_parameters()]
    sites = _sites(session, range(len(weights)), weights)
    return [*(c.parameter for c in ported), *(site.candidate.parameter for _, site in sites)]
