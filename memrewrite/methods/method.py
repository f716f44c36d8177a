"""What may stand in for a saved activation: one protocol, of which every method is one file.

A method is a value. In the order in which it is asked:

    choose      which weights of a model it takes
    ask         what a captured graph is to hand over for one of them: a basis, a port
    passes      the rewrite of the joint graph
    freed       the operations that it removes, of which some may be spent again
    whole       of which weights the whole gradient has its small form
    state       what it keeps of a model between steps: vectors, projectors, nothing

Reports, dumps, estimates and the split of the graph ask the method itself, and know none by
name. `Compressor` is the form that a user writes: two functions of tensors.
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

Chosen = dict[nn.Parameter, Site]


@dataclass(frozen=True)
class Ask:
    """A site as one captured graph sees it: part of the compile cache's key.

    position: of the weight, among the graph's arguments.
    basis: the shape of the method's extra input for it, where it has one; of this dtype.
    port: the shape of the small gradient that backward is to return, where it is; in the dtype
        of the weight.
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
    """An ask, and the arguments that are its basis and its port."""

    ask: Ask
    basis: int | None
    port: int | None

    @property
    def weight(self) -> int:
        return self.ask.position


@dataclass(frozen=True)
class Task:
    """A method's asks of one graph. Its extra inputs come in order: the bases, then the ports."""

    method: Method = field(compare=False, repr=False)
    key: tuple[Any, ...]
    asks: tuple[Ask, ...]
    first: int  # argument that is the first extra input

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
    """What passes are made for, besides a task."""

    weights: frozenset[int]  # all arguments that are parameters
    decompositions: Decompositions  # as AOTAutograd traced the graph


@dataclass
class Bound:
    """A method's asks in one captured graph, called with particular weights."""

    gm: GraphModule  # Dynamo's
    asks: Sequence[Ask]
    names: Mapping[int, str]  # argument position -> the weight's name
    parameters: Mapping[int, weakref.ref[Tensor]]
    readers: Mapping[int, Sequence[int]]  # weight -> all that read its input alike, leader first
    group: Callable[[], Any]  # the process group whose ranks train this model together, or None
    ready: bool = False
    calls: int = 0  # before it was
    unread: dict[int, Tensor] = field(default_factory=dict)

    def leaders(self) -> list[Ask]:
        """One ask of each input."""
        return [a for a in self.asks if self.readers.get(a.position, (None,))[0] == a.position]

    def names_of(self, position: int) -> tuple[str, ...]:
        """Of the weights that read the same input; the weight's own where none is compressed."""
        return tuple(self.names[p] for p in self.readers.get(position, [position]))

    def parameter(self, position: int) -> Tensor | None:
        return self.parameters[position]()


class State:
    """What a method keeps of one model between steps: nothing, unless a method says more."""

    prefix = ""  # of its keys in a saved state

    def recall(self, sites: Sequence[Site]) -> None:
        """Go on with what optimizers hold of these, before a graph is asked for them."""

    def prepare(self, bound: Bound, args: Sequence[Any]) -> None:
        """Before a call, until `bound.ready`."""
        bound.ready = True

    def handed(self, bound: Bound) -> list[Basis]:
        """One for each ask that has a basis, for the coming call."""
        return []

    def known(self, bound: Bound, ask: Ask) -> Basis | None:
        """In which the next gradient of a weight comes, where it comes small and that is known."""
        return None

    def follow(self, bound: Bound, observed: Sequence[int], totals: Sequence[Tensor]) -> None:
        """After a call of a graph that `observe` gave more outputs."""

    def sentence(self, name: str) -> str:
        """What a report adds to the reason of a weight's row."""
        return ""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def read(self, state: Mapping[str, Tensor]) -> Any:
        """What `take` takes, from entries with its prefix. Raises ValueError, changing nothing."""

    def take(self, found: Any) -> None: ...

    def held(self) -> list[Tensor]:
        """Tensors of its own that a backward may read."""
        return []


class Method:
    """See the module."""

    name: ClassVar[str] = ""
    symbol: ClassVar[str] = "v"  # of its extra input, in the names of placeholders
    kept: ClassVar[str] = "z"  # of what is kept in place of x, in reports
    gain: ClassVar[str] = ""  # where nothing is kept in place of x: what it is good for
    remedy: ClassVar[str] = "its sites"  # where a user says which weights
    compresses: ClassVar[bool] = True  # x itself: rows of a report say which weights read z
    moves: ClassVar[bool] = False  # what it asks for changes from step to step
    small: bool = False  # gradients may come in a small form of it
    forms: ClassVar[Sequence[bool | None]] = (None,)  # that an ask of a site may take

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for methods that rewrite a graph alike."""
        return (self.name,)

    def choose(self, model: nn.Module, found: Sequence[Weight]) -> Chosen:
        """The weights that it takes; `found` are the model's candidates."""
        raise NotImplementedError

    def select(self, found: Sequence[Weight]) -> set[str]:
        """The names that were asked for, whether or not they can be taken."""
        return {weight.name for weight in found}

    def why_not(self, weight: Weight) -> str | None:
        """The reason, known before any graph is, why a selected weight stays exact."""
        return why_exact(weight)

    def declines(self, x: Tensor) -> str | None:
        """The reason to leave an activation (N, D), of this shape and dtype, as it is."""
        return None

    def ask(self, position: int, site: Site, state: Any, form: bool | None = None) -> Ask:
        parameter = site.weight.parameter
        dtype = parameter.dtype
        return Ask(position, dtype, parameter.device, dtype, left=site.left)

    def returns_small(self, site: Site) -> bool:
        """Whether backward may be asked for a weight's gradient in a small form."""
        return False

    def without_port(self, ask: Ask) -> Ask | None:
        """The same for a graph whose gradients all come in full; None where it is no use then."""
        return ask

    def passes(self, task: Task, context: Context) -> list[Pass]:
        raise NotImplementedError

    def freed(self, gradient: WeightGradient, placed: Placed) -> Any:
        """Multiply-adds, times two, that the passes remove from a gradient's matmul."""
        return 0

    def whole(self, graph: Graph, weights: Sequence[int]) -> list[int]:
        """Those whose whole gradient has the small form, in a graph between two of its passes."""
        return []

    def observe(
        self, gm: GraphModule, asks: Sequence[Ask]
    ) -> tuple[GraphModule, int, list[int]] | None:
        """(a copy with more outputs, how many are its own, the weights that those are of)."""
        return None

    def state(self, model: weakref.ref[nn.Module]) -> State:
        return State()

    def small_bytes(self, site: Site) -> int:
        """Of a gradient in the small form."""
        return site.weight.parameter.nbytes


OWNERS: dict[str, str] = {}  # prefix of a saved state's keys -> how a user asks for what wrote them
METHODS: dict[str, Callable[[], Method]] = {}  # by the name that `activations=` takes


def method_of(activations: object) -> Method:
    """What `activations=` means. Raises TypeError or ValueError for anything else."""
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
    """Every ask of a graph."""
    for task in tasks:
        for placed in task.placed():
            yield task.method, placed
