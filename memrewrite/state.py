"""What outlives a step: one v per compressed input, and what each graph decided.

A session belongs to one compiled model and is forgotten with it. v is keyed by the
name of the weight that leads its input's group, never by graph: a model captured as
many graphs, or captured again for other shapes, keeps one v per weight. A v is never
written in place, because a backward may still hold the v of its forward.
"""

from __future__ import annotations

import math
import warnings
import weakref
import zlib
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from memrewrite import calibrate
from memrewrite.backend import Engine, capture
from memrewrite.errors import MemrewriteWarning
from memrewrite.logs import tell
from memrewrite.options import GaLore, VeLoRA
from memrewrite.plan import PassesFor, Weight
from memrewrite.ports import Port, trained_outputs
from memrewrite.record import GraphRecord
from memrewrite.selection import weights_of
from memrewrite.sites import Candidate, candidates, select

PREFIX = "velora.v."
_running: ContextVar[Binding | None] = ContextVar("memrewrite_running", default=None)


@dataclass(eq=False)
class Session:
    """One compiled model: its options, its vectors, its graphs. Also its torch backend."""

    model: weakref.ref[nn.Module]
    velora: VeLoRA | None
    engine: Engine
    passes_for: PassesFor
    request: dict[str, Any]
    galore: GaLore | None = None
    vectors: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)  # running means, not normalised
    unseen: set[str] = field(default_factory=set)  # v fell back to ones
    graphs: list[Graph] = field(default_factory=list)
    called: bool = False
    on_change: Callable[[Session, bool], None] | None = None
    scale_checked: bool = False  # whether lr_scale reaches every compressed weight
    unserved_steps: int = 0  # optimizer steps so far that knew nothing of this session

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one captured graph."""
        self.called = True
        graph = Graph(self, gm, inputs)  # raises where Dynamo wants to trace once more
        self.graphs.append(graph)
        self.changed()
        return graph

    def changed(self, complete: bool = False) -> None:
        """A graph was compiled, or (complete) the first optimizer update was."""
        if self.on_change is not None:
            self.on_change(self, complete)

    def selected(self, found: list[Candidate]) -> set[str]:
        return select(found, self.velora.sites) if self.velora else set()

    def ported(self) -> list[Tensor]:
        """The weights whose gradients come as coordinates, in the graphs compiled so far."""
        places = (
            (b, position)
            for graph in self.graphs
            for b in graph.bindings.values()
            for position in b.variant.record.ported
        )
        found = [dict(binding.parameters)[position]() for binding, position in places]
        return [parameter for parameter in found if parameter is not None]

    def state_dict(self) -> dict[str, Tensor]:
        """Every v, and the sums behind a running mean, as plain tensors."""
        state = {PREFIX + name: v.detach().clone() for name, v in self.vectors.items()}
        return state | {f"velora.sum.{n}": s.detach().clone() for n, s in self.sums.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace every v. Raises ValueError, changing nothing, for names or sizes that differ."""
        model = self.model()
        names = {c.name for c in candidates(model)} if model is not None else set()
        vectors: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        for key, tensor in state.items():
            for prefix, into in ((PREFIX, vectors), ("velora.sum.", sums)):
                if key.startswith(prefix):
                    self._check(key, tensor, key.removeprefix(prefix), names)
                    into[key.removeprefix(prefix)] = tensor.detach().clone()
                    break
            else:
                raise ValueError(f"{key!r} is no entry of a memrewrite state")
        self.vectors, self.sums, self.unseen = vectors, sums, set()
        for binding in (b for graph in self.graphs for b in graph.bindings.values()):
            binding.calibrated = False  # what the state lacks, the next batch tells

    def _check(self, key: str, tensor: Tensor, name: str, names: set[str]) -> None:
        if self.velora is None:
            raise ValueError(f"the state has {key!r}, but the model is compiled without velora")
        if name not in names:
            raise ValueError(f"the state has {key!r}, but the model has no weight of that name")
        if tuple(tensor.shape) != (self.velora.subtoken_size,):
            raise ValueError(
                f"{key!r} has shape {tuple(tensor.shape)}, but subtoken_size is "
                f"{self.velora.subtoken_size}; compile with the options of the saved run"
            )

    def vector(self, name: str, weight: Weight, total: Tensor | None = None) -> Tensor:
        """v of a group's leader, made on first use: (M,), unit norm."""
        v = self.vectors.get(name)
        if v is None:
            v = self._initial(name, weight, total)
        if v.device != weight.device or v.dtype != weight.dtype:
            v = v.to(weight.device, weight.dtype)
        self.vectors[name] = v
        return v

    def _initial(self, name: str, weight: Weight, total: Tensor | None) -> Tensor:
        assert self.velora is not None
        if self.velora.init == "random":
            seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            total = torch.randn(weight.size, generator=seed, dtype=torch.float64)
        elif self.velora.init != "ones" and total is None:
            self.unseen.add(name)
        return normalised(total, weight)

    def update_mean(self, name: str, weight: Weight, total: Tensor) -> None:
        """Add one batch to a running mean; the old v stays with the forwards that read it."""
        known = self.sums.get(name)
        total = total.to(torch.float64)
        self.sums[name] = total if known is None else known.to(total.device) + total
        self.vectors[name] = normalised(self.sums[name], weight)


def normalised(total: Tensor | None, weight: Weight) -> Tensor:
    """total / |total|; ones / sqrt(M) where that says nothing (zero, or not finite)."""
    if total is not None:
        norm = total.norm()
        if bool(torch.isfinite(norm)) and float(norm) > 0:
            unit: Tensor = total / norm
            return unit.to(weight.device, weight.dtype)
    ones = torch.ones(weight.size, dtype=weight.dtype, device=weight.device)
    return ones / math.sqrt(weight.size)


@dataclass
class Variant:
    """A captured graph compiled for one set of selected arguments."""

    compiled: Callable[..., Any]
    record: GraphRecord
    selected: list[Weight]
    outputs: int | None  # own outputs, where running means follow them
    observed: list[Weight]

    def __post_init__(self) -> None:
        groups = [i for i in self.record.inputs if i.leader is not None]
        self.leaders = [w for w in self.selected if w.position in {i.leader for i in groups}]
        self.leader_of = {w: i.leader for i in groups for w in i.weights}


@dataclass
class Binding:
    """A variant called with particular weights. Layers of one shape may share a graph."""

    variant: Variant
    names: dict[int, str]  # argument position -> candidate name
    parameters: list[tuple[int, weakref.ref[Tensor]]]
    calibrated: bool = False

    def serves(self, args: Sequence[Any]) -> bool:
        return all(reference() is args[i] for i, reference in self.parameters)

    def extra(self, session: Session, args: Sequence[Any]) -> list[Tensor]:
        """What the compiled graph takes behind its own arguments: every v, then every port."""
        leader_of, selected = self.variant.leader_of, self.variant.selected
        names = [self.names[leader_of.get(w.position) or w.position] for w in selected]
        vectors = [session.vector(n, w) for n, w in zip(names, selected, strict=True)]
        make: Any = Port.apply
        ports = [
            make(args[w.position], v, self.names[w.position])
            for w, v in zip(selected, vectors, strict=True)
            if w.port is not None
        ]
        return vectors + ports


class Graph:
    """One captured graph, called with v appended to its arguments.

    Dynamo may serve several layers by one graph: after a graph break the weights are
    mere arguments of it. Which weights a call is for is therefore read off its
    arguments, and a call whose selection differs gets a variant of its own.
    """

    def __init__(self, session: Session, gm: GraphModule, inputs: Sequence[Any]) -> None:
        self.session, self.gm = session, gm
        self.training = torch.is_grad_enabled()
        self.dynamic = any(isinstance(i, torch.SymInt) for i in inputs)
        self.positions = [i for i, v in enumerate(inputs) if isinstance(v, nn.Parameter)]
        model = session.model()
        buffers = {id(b) for b in model.buffers()} if model is not None else set()
        self.buffers = [i for i, value in enumerate(inputs) if id(value) in buffers]
        self.variants: dict[tuple[int, ...], Variant] = {}
        self.bindings: dict[tuple[int, ...], Binding] = {}
        self._bind(inputs)

    def __call__(self, *args: Any) -> Any:
        key = tuple(id(args[i]) for i in self.positions)
        binding = self.bindings.get(key)
        if binding is None or not binding.serves(args):
            binding = self._bind(args)
        if not binding.calibrated:
            self._calibrate(binding, args)
        variant = binding.variant
        token = _running.set(binding)
        try:
            results = variant.compiled(*args, *binding.extra(self.session, args))
        finally:
            _running.reset(token)
        if variant.outputs is None:
            return results
        leaders = {w.position for w in variant.leaders}
        for weight, total in zip(variant.observed, results[variant.outputs :], strict=True):
            if weight.position in leaders:
                self.session.update_mean(binding.names[weight.position], weight, total)
        return results[: variant.outputs]

    def _bind(self, args: Sequence[Any]) -> Binding:
        names, selected = weights_of(self.session, self.positions, args)
        selected = selected if self.training else []
        if not trained_outputs(self.gm):
            selected = [replace(weight, port=None) for weight in selected]
        wanted = tuple(w.position for w in selected)
        if wanted not in self.variants:
            self.variants[wanted] = self._compile(args, selected)
        parameters: list[Any] = [(i, weakref.ref(args[i])) for i in self.positions]
        binding = Binding(self.variants[wanted], names, parameters)
        tell(binding.variant.record, names)
        self.bindings[tuple(id(args[i]) for i in self.positions)] = binding
        return binding

    def _compile(self, args: Sequence[Any], selected: list[Weight]) -> Variant:
        velora = self.session.velora
        if self.variants and self.dynamic:
            return self._uncompiled()
        outputs, gm = None, self.gm
        observed: list[Weight] = []
        if selected and velora and velora.init == "running_mean":
            gm, outputs, observed = calibrate.observe_inputs(gm, selected)
        compiled, record = capture(
            gm,
            args,
            selected,
            self.positions,
            self.buffers,
            velora.scale if velora else 1.0,
            self.session.passes_for,
            self.session.engine,
        )
        return Variant(compiled, record, selected, outputs, observed)

    def _uncompiled(self) -> Variant:
        """Outside Dynamo a dynamic graph cannot be compiled again: run it, exactly."""
        reason = (
            "it shares a dynamic-shape graph with layers that are selected differently; "
            "select all layers of a kind alike, or pass dynamic=False"
        )
        warn(f"some layers run uncompiled, with exact gradients: {reason}")
        return Variant(self.gm, GraphRecord(failure=reason), [], None, [])

    def _calibrate(self, binding: Binding, args: Sequence[Any]) -> None:
        session, binding.calibrated = self.session, True
        missing = [
            w for w in binding.variant.leaders if binding.names[w.position] not in session.vectors
        ]
        if not missing or session.velora is None:
            return
        totals: dict[int, Tensor] = {}
        if session.velora.init in ("batch_mean", "running_mean"):
            totals = calibrate.subtoken_sums(self.gm, args, {w.position: w.size for w in missing})
            _equalise([totals[w.position] for w in missing if w.position in totals])
        for weight in missing:
            session.vector(binding.names[weight.position], weight, totals.get(weight.position))


def _equalise(totals: list[Tensor]) -> None:
    """Add up the sums of all ranks: ranks with different v would average unlike gradients."""
    dist = torch.distributed
    if totals and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for total in totals:
            dist.all_reduce(total)


_sessions: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


def session_of(model: nn.Module) -> Session:
    """The session of a compiled model. Raises ValueError for any other."""
    session = _sessions.get(model)
    if session is None:
        raise ValueError(
            f"this {type(model).__name__} is not compiled by memrewrite (a deepcopy is not "
            "either); call memrewrite.compile(model) first"
        )
    return session


def known_session(model: nn.Module) -> Session | None:
    """The session of a model, if memrewrite compiled it."""
    return _sessions.get(model)


def running() -> Binding | None:
    """The compiled graph that is being called, if one is."""
    return _running.get()


def live_sessions() -> list[Session]:
    """The sessions of all models that are compiled now."""
    return list(_sessions.values())


def warn(message: str) -> None:
    warnings.warn(message, MemrewriteWarning, stacklevel=3)
