"""One compiled model: its options, the state of its methods, its graphs.

A session is freed with its model. Dynamo calls it as a backend, once per captured graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.fx import GraphModule

from memrewrite.compiler.backend import Engine
from memrewrite.errors import warn
from memrewrite.gradients.basis import Basis
from memrewrite.loss.default import forget_names, name_losses
from memrewrite.methods.bases import Bases
from memrewrite.methods.method import OWNERS, Ask, Method, State
from memrewrite.methods.vectors import Vectors
from memrewrite.parallel.data_parallel import adopt, foresee, group_of
from memrewrite.parallel.wrapped import inner
from memrewrite.session.calls import Calls
from memrewrite.session.choice import Part, weights_with_small_gradients
from memrewrite.session.graph import Binding, Graph, Setting, Variant
from memrewrite.sites.options import GaLore, VeLoRA

S = TypeVar("S", bound=State)


@dataclass(eq=False)
class Session:
    """One compiled model, and its backend for torch.compile."""

    model: weakref.ref[nn.Module]
    engine: Engine
    methods: Sequence[Method]
    request: dict[str, Any]  # the arguments of `compile`
    velora: VeLoRA | None = None
    galore: GaLore | None = None
    moments: Any = (
        None  # a moments.moment.Moment, for weights with neither small gradients nor coordinates
    )
    graphs: list[Graph] = field(default_factory=list)
    calls: Calls = field(default_factory=Calls)
    on_change: Callable[[Session, bool], None] | None = None
    scale_checked: bool = False  # whether lr_scale reaches every compressed weight
    whole: frozenset[str] = frozenset()  # weights that GaLore projects, which must not be sharded
    unserved_steps: int = 0  # optimizer steps so far that had no parameter of this session
    sought: bool = False  # whether `seek` has run

    named: list[weakref.ref[nn.Module]] = field(default_factory=list)  # see loss.default

    def __post_init__(self) -> None:
        model = self.model()
        self.named = [weakref.ref(m) for m in name_losses(model)] if model is not None else []
        kept = [(method, method.state(self.model)) for method in self.methods]
        self.setting = Setting(
            self.model,
            self.engine,
            kept,
            self.calls,
            group=lambda: group_of(self),
            foresee=lambda: foresee(self),
            adopt=lambda: adopt(self, live_sessions),
        )

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one captured graph."""
        self.calls.called = True
        try:
            graph = Graph(self.setting, gm, inputs)  # may raise to make Dynamo trace again
        except Exception as error:
            self.calls.failure = f"{type(error).__name__}: {error}"
            raise
        self.calls.failure = ""
        self.graphs.append(graph)
        self.changed()
        return graph

    def unname(self) -> None:
        """Take back the names of losses."""
        forget_names(module for mine in self.named if (module := mine()) is not None)

    def changed(self, complete: bool = False) -> None:
        """Call `on_change`: a graph was compiled, or (complete) the first optimizer update was."""
        if self.on_change is not None:
            self.on_change(self, complete)

    # --- what methods keep -------------------------------------------------------------------

    @property
    def kept(self) -> Sequence[tuple[Method, State]]:
        """Each method with its state for this model."""
        return self.setting.methods

    def state_of(self, kind: type[S]) -> S | None:
        """The state of this class that a method keeps of this model, or None."""
        return next((state for _, state in self.kept if isinstance(state, kind)), None)

    @property
    def vectors(self) -> Vectors | None:
        return self.state_of(Vectors)

    @property
    def bases(self) -> Bases | None:
        return self.state_of(Bases)

    def state_dict(self) -> dict[str, Tensor]:
        """The states of all methods, as plain tensors."""
        return {k: v for _, state in self.kept for k, v in state.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the states. Raises ValueError, changing nothing, for other names or shapes."""
        left, found = dict(state), []
        for _, mine in self.kept:
            own = {k: left.pop(k) for k in list(left) if mine.prefix and k.startswith(mine.prefix)}
            found.append((mine, mine.read(own)))
        for key in left:
            raise ValueError(_unknown(key))
        for mine, read in found:
            mine.take(read)
        for binding in self.bindings():
            for _, bound in binding.bound:
                bound.ready, bound.calls = False, 0  # `prepare` runs again at the next call

    # --- small gradients --------------------------------------------------------------------------

    @property
    def full(self) -> str | None:
        """Why gradients stay full-size; None if they may be small."""
        return self.setting.full

    def keep_full(self, reason: str) -> None:
        """Return only full gradients of this model from now on; warns once."""
        if self.full is not None:
            return
        if any(method.small for method in self.methods):
            warn(
                f"the gradients and Adam state of {type(self.model()).__name__} stay full-size: "
                f"{reason}. The step is the same; gradients='dense' in memrewrite.VeLoRA and "
                "GaLore silences this warning"
            )
        self.setting.full = reason
        for graph in self.graphs:  # already compiled
            graph.forget()

    def small_weights(self) -> list[nn.Parameter]:
        """Weights whose gradients may be returned small, as far as no graph is needed to know."""
        if self.full is not None:
            return []
        return list(weights_with_small_gradients(self.model(), self.kept))

    def basis_of(self, parameter: Tensor) -> Basis | None:
        """The basis of a parameter's next gradient, if it is small and already known."""
        found = (binding.basis_of(parameter) for binding in self.bindings())
        return next((basis for basis in found if basis is not None), None)

    def seek(self) -> None:
        """Before an optimizer's step, once: warn of what is asked for and no graph has."""
        graphs = [graph for graph in self.graphs if graph.training]
        if graphs and not self.sought:
            self.sought = True
            variants = [variant for graph in graphs for variant in graph.variants.values()]
            self._seek_loss(variants)
            self._seek_rounding(variants)

    def _seek_loss(self, variants: Sequence[Variant]) -> None:
        tried = [variant.chunked for variant in variants]
        chunks = self.setting.loss_chunks
        if chunks and not any(chunked is not None and chunked.told for chunked in tried):
            warn(
                f"loss_chunks={chunks}: the forward of {type(self.model()).__name__} computes no "
                "cross entropy, so its logits stay whole: compute the loss in it (pass labels), "
                "or leave loss_chunks out"
            )

    def _seek_rounding(self, variants: Sequence[Variant]) -> None:
        asked = next((m for m in self.methods if m.rounding is not None), None)
        records = [variant.record for variant in variants if not variant.record.inference]
        rounded = [one for record in records for one in record.rounded]
        if asked is None or not records or any(one.bits is not None for one in rounded):
            return
        reasons = dict.fromkeys(one.reason for one in rounded)
        why = "; ".join(reasons) or "none of floats is large enough (16384 numbers)"
        warn(f"activations={asked.name!r} rounds no saved tensor: {why}")

    def bindings(self) -> Iterator[Binding]:
        """Every compiled variant, bound to the weights that it is called with."""
        for graph in self.graphs:
            yield from graph.bindings.values()

    def returned(self, state: type[State] = State) -> dict[Tensor, tuple[Part, Ask]]:
        """The weights whose gradients are returned small by a method with this class of state."""
        return {
            parameter: (part, ask)
            for binding in self.bindings()
            for part, ask, parameter in binding.asks()
            if isinstance(part.state, state)
            and ask.position in binding.variant.record.returned.get(part.method.name, ())
        }

    def factored(self) -> set[str]:
        """The names of the weights whose gradients have a small form, returned small or not."""
        return {
            binding.names[position]
            for binding in self.bindings()
            for positions in binding.variant.record.whole.values()
            for position in positions
        }

    @property
    def step_scale(self) -> float:
        """Factor on the optimizer's step of the `factored` weights."""
        return self.velora.step_scale if self.velora else 1.0


def _unknown(key: str) -> str:
    for prefix, owner in OWNERS.items():
        if key.startswith(prefix):
            return f"the state has {key!r}, but the model is compiled without {owner}"
    return f"{key!r} is not an entry of a memrewrite state"


_sessions: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


def session_of(model: nn.Module) -> Session:
    """The session of a compiled model. Raises ValueError for any other."""
    session = known_session(model)
    if session is None:
        raise ValueError(
            f"this {type(model).__name__} is not compiled by memrewrite (a deepcopy is not "
            "either); call memrewrite.compile(model) first"
        )
    return session


def parts_of(model: nn.Module) -> list[tuple[str, Session]]:
    """(path, session) of each compiled module inside one that is not compiled.

    Raises ValueError where there are none.
    """
    inside = [(path, _sessions.get(module)) for path, module in model.named_modules()]
    found = [(path, session) for path, session in inside if session is not None]
    if not found:
        session_of(model)
    return found


def known_session(model: nn.Module) -> Session | None:
    """The session of a model, or of the model that its DDP wraps; None if not compiled."""
    return _sessions.get(inner(model))


def live_sessions() -> list[Session]:
    """The sessions of all models that are compiled now."""
    return list(_sessions.values())
