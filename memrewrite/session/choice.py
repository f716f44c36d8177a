"""Which arguments of a captured graph are weights that a method applies to."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from memrewrite.methods.method import Ask, Method, State
from memrewrite.sites.weights import Site, by_parameter, candidates


@dataclass(eq=False)
class Part:
    """A method, its state for one model, and its weights in one graph."""

    method: Method
    state: State
    sites: dict[int, Site]  # by argument position
    asks: list[Ask] = field(default_factory=list)  # of a method whose asks never change
    small: bool = True  # whether gradients may be returned small

    def __post_init__(self) -> None:
        if not self.method.moves:
            self.asks = self.ask()

    def ask(self, form: bool | None = None) -> list[Ask]:
        """The asks of the coming call, or those of one of `Method.forms`."""
        found = [self.method.ask(i, s, self.state, form) for i, s in self.sites.items()]
        if self.small:
            return found
        return [a for a in map(self.method.without_port, found) if a is not None]


@dataclass(eq=False)
class Choice:
    """What is rewritten where a graph is called with these parameters."""

    names: dict[int, str]  # argument position -> the weight's name
    parameters: list[tuple[int, weakref.ref[Tensor]]]
    parts: list[Part]
    foreign: bool = False  # plain tensors replace the weights, as by functional_call


def choose(
    model: nn.Module | None,
    methods: Sequence[tuple[Method, State]],
    positions: Sequence[int],
    args: Sequence[Any],
    small: bool,
) -> Choice:
    """The choice for the parameters in `args`; small: gradients may be returned small."""
    found = candidates(model) if model is not None else []
    aliases = by_parameter(found)
    names = {p: aliases[args[p]][0].name for p in positions if args[p] in aliases}
    left, parts = list(positions), []
    for method, state in methods:
        chosen = method.choose(model, found) if model is not None else {}
        sites = {p: chosen[args[p]] for p in left if args[p] in chosen}
        left = [p for p in left if p not in sites]
        mine = {p: site.weight.name for p, site in sites.items()}
        names = names | mine if method.compresses else mine | names
        state.recall(list(sites.values()))
        parts.append(Part(method, state, sites, small=small))
    parameters: list[Any] = [(i, weakref.ref(args[i])) for i in positions]
    swapped = {a for a in args if isinstance(a, Tensor) and not isinstance(a, nn.Parameter)}
    foreign = not names and not swapped.isdisjoint(aliases)
    return Choice(names, parameters, parts, foreign)


def weights_with_small_gradients(
    model: nn.Module | None, methods: Sequence[tuple[Method, State]]
) -> Iterator[nn.Parameter]:
    """Weights whose gradients may be returned small, as far as no graph is needed to know."""
    if model is None:
        return
    found, taken = candidates(model), set[nn.Parameter]()
    for method, _ in methods:
        for parameter, site in method.choose(model, found).items():
            if parameter not in taken and method.returns_small(site):
                yield parameter
            taken.add(parameter)
