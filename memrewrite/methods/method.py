"""The protocol of a method: what to save in place of an activation, or to return as a gradient.

    choose      the weights of a model that it applies to
    ask         the extra inputs of a captured graph for one weight: a basis, a port
    passes      the rewrite of the joint graph
    freed       the operations that it saves, some of which recomputation may spend
    whole       the weights whose whole gradient has its small form
    state       what it keeps of a model between steps: vectors, projectors, or nothing

Every method is one file. Reports, dumps, estimates and the partitioner call these functions
and know no method by name. Users subclass `Compressor`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from memrewrite.gradients.basis import Basis
from memrewrite.sites.select import why_exact
from memrewrite.sites.weights import Site, Weight
from passes.base import Pass
from passes.emit import Decompositions
from passes.joint.find import WeightGradient
from passes.split.tolerance import Rounding

Chosen = dict[nn.Parameter, Site]


@dataclass(frozen=True)
class Ask:
    """The extra inputs of one weight in a captured graph: part of the compile cache's key.

    position: of the weight, among the graph's arguments.
    basis: the shape of the extra input (v, P), of `dtype`; None for none.
    port: the shape of the small gradient that backward returns, of `port_dtype`; None for the
        full gradient.
    left: see `sites.weights.Site`.
    """

    position: int
    dtype: torch.dtype
    device: torch.device
    port_dtype: torch.dtype
    basis: tuple[int, ...] | None = None
    port: tuple[int, int] | None = None
    left: bool = False


@dataclass(frozen=True)
class Placed:
    """An ask, and the argument positions of its basis and its port."""

    ask: Ask
    basis: int | None
    port: int | None

    @property
    def weight(self) -> int:
        return self.ask.position


@dataclass(frozen=True)
class Task:
    """A method's asks of one graph. Its extra inputs, in order: all bases, then all ports."""

    method: Method = field(compare=False, repr=False)
    key: tuple[Any, ...]
    asks: tuple[Ask, ...]
    first: int  # argument position of the first extra input

    @property
    def inputs(self) -> int:
        """How many extra inputs there are."""
        return sum((ask.basis is not None) + (ask.port is not None) for ask in self.asks)

    def placed(self) -> list[Placed]:
        bases = iter(range(self.first, self.first + len(self.asks)))
        places = [next(bases) if ask.basis is not None else None for ask in self.asks]
        ports = iter(range(next(bases, self.first + len(self.asks)), self.first + self.inputs))
        return [
            Placed(ask, basis, next(ports) if ask.port is not None else None)
            for ask, basis in zip(self.asks, places, strict=True)
        ]


@dataclass(frozen=True)
class Context:
    """What passes need to know of the graph, in addition to a task."""

    weights: frozenset[int]  # argument positions of all parameters
    decompositions: Decompositions  # with which AOTAutograd traced the graph


@dataclass
class Bound:
    """A method's asks in one captured graph, bound to the weights that it is called with."""

    gm: GraphModule  # Dynamo's graph
    asks: Sequence[Ask]
    names: Mapping[int, str]  # argument position -> the weight's name
    parameters: Mapping[int, weakref.ref[Tensor]]
    readers: Mapping[int, Sequence[int]]  # weight -> weights that read the same input, leader first
    group: Callable[[], Any]  # the process group whose ranks train this model together, or None
    ready: bool = False
    calls: int = 0  # before `ready`
    unread: dict[int, Tensor] = field(default_factory=dict)

    def leaders(self) -> list[Ask]:
        """One ask per input."""
        return [a for a in self.asks if self.readers.get(a.position, (None,))[0] == a.position]

    def names_of(self, position: int) -> tuple[str, ...]:
        """Names of the weights that read the same compressed input; else the weight's name."""
        return tuple(self.names[p] for p in self.readers.get(position, [position]))

    def parameter(self, position: int) -> Tensor | None:
        return self.parameters[position]()


class State:
    """What a method keeps of one model between steps; this base class keeps nothing."""

    prefix = ""  # of its keys in a state dict

    def recall(self, sites: Sequence[Site]) -> None:
        """Restore from the optimizer state of these weights, before `Method.ask`."""

    def prepare(self, bound: Bound, args: Sequence[Any]) -> None:
        """Called before each call of a graph until `bound.ready` is set."""
        bound.ready = True

    def handed(self, bound: Bound) -> list[Basis]:
        """The bases of the coming call: one per ask that has a basis."""
        return []

    def known(self, bound: Bound, ask: Ask) -> Basis | None:
        """The basis of a weight's next gradient, if it is small and already known."""
        return None

    def follow(self, bound: Bound, observed: Sequence[int], totals: Sequence[Tensor]) -> None:
        """Called after each call of a graph with the extra outputs of `observe`."""

    def sentence(self, name: str) -> str:
        """A sentence for the report on a weight; "" for none."""
        return ""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def read(self, state: Mapping[str, Tensor]) -> Any:
        """Parse entries with `prefix` for `take`. Raises ValueError; changes nothing."""

    def take(self, found: Any) -> None: ...

    def held(self) -> list[Tensor]:
        """Its tensors that a backward may read."""
        return []


class Method:
    """See the module's docstring."""

    name: ClassVar[str] = ""
    symbol: ClassVar[str] = "v"  # of its basis, in the names of placeholders
    kept: ClassVar[str] = "z"  # name of what is saved in place of x, in reports
    gain: ClassVar[str] = ""  # its use where nothing is saved in place of x, in reports
    remedy: ClassVar[str] = "its sites"  # the option by which a user chooses weights
    compresses: ClassVar[bool] = True  # x itself: a report names the weights that read z
    moves: ClassVar[bool] = False  # its asks change from step to step
    factors: ClassVar[bool] = False  # Adam's moments may be of the small gradient, exactly
    narrows: bool = False  # also the gradient of a head whose loss runs in chunks
    small: bool = False  # gradients may be returned in a small form
    rounding: Rounding | None = None  # of what the forward saves, whatever the weights
    forms: ClassVar[Sequence[bool | None]] = (None,)  # values of `form` in `ask`

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for methods that rewrite a graph in the same way."""
        return (self.name,)

    def choose(self, model: nn.Module, found: Sequence[Weight]) -> Chosen:
        """The weights that it applies to, of the model's candidates `found`."""
        raise NotImplementedError

    def select(self, found: Sequence[Weight]) -> set[str]:
        """The names of the weights that its options select, supported or not."""
        return {weight.name for weight in found}

    def why_not(self, weight: Weight) -> str | None:
        """The reason why a selected weight stays exact, as far as no graph is needed, or None."""
        return why_exact(weight)

    def declines(self, x: Tensor) -> str | None:
        """The reason not to compress an activation (N, D), by its shape and dtype, or None."""
        return None

    def ask(self, position: int, site: Site, state: Any, form: bool | None = None) -> Ask:
        parameter = site.weight.parameter
        dtype = parameter.dtype
        return Ask(position, dtype, parameter.device, dtype, left=site.left)

    def returns_small(self, site: Site) -> bool:
        """Whether backward may return a weight's gradient in a small form."""
        return False

    def without_port(self, ask: Ask) -> Ask | None:
        """The ask for a graph that returns full gradients; None where the method then is no use."""
        return ask

    def passes(self, task: Task, context: Context) -> list[Pass]:
        raise NotImplementedError

    def freed(self, gradient: WeightGradient, placed: Placed) -> Any:
        """Operations (a multiply-add is two) that the passes save in a gradient's matmul."""
        return 0

    def whole(self, graph: Graph, weights: Sequence[int]) -> list[int]:
        """Weights whose whole gradient has the small form, in a graph between two passes."""
        return []

    def observe(
        self, gm: GraphModule, asks: Sequence[Ask]
    ) -> tuple[GraphModule, int, list[int]] | None:
        """(a copy with extra outputs, the number of original ones, the weights of the extra)."""
        return None

    def state(self, model: weakref.ref[nn.Module]) -> State:
        return State()

    def small_bytes(self, site: Site) -> int:
        """Bytes of a gradient in the small form."""
        return site.weight.parameter.nbytes

    def basis_bytes(self, site: Site) -> int:
        """Bytes of the basis that an optimizer's state holds beside moments of a small gradient."""
        return 0


OWNERS: dict[str, str] = {}  # prefix of keys in a state dict -> the option that writes them
METHODS: dict[str, Callable[[], Method]] = {}  # by the name for `activations=`


def method_of(activations: object) -> Method:
    """The method of `activations=`. Raises TypeError or ValueError where it is none."""
    if isinstance(activations, Method):
        if not activations.name:
            raise ValueError(f"{type(activations).__name__} has no name: set the attribute `name`")
        return activations
    known = ", ".join(map(repr, METHODS)) or "none"
    if isinstance(activations, str):
        if activations not in METHODS:
            raise ValueError(f"activations={activations!r} is not registered; known: {known}")
        return METHODS[activations]()
    raise TypeError(
        f"activations={activations!r} is a {type(activations).__name__}; pass a "
        f"memrewrite.Compressor, or the name of a registered one ({known})"
    )


def iterate(tasks: Sequence[Task]) -> Iterator[tuple[Method, Placed]]:
    """Every ask of a graph, with its method."""
    for task in tasks:
        for placed in task.placed():
            yield task.method, placed
