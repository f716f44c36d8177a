"""One captured graph, compiled once for each way of calling it, and what it is called with."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from memrewrite.calibration import observe
from memrewrite.compiler.absence import told_of_absence
from memrewrite.compiler.backend import GUARDS_TRAINED, capture
from memrewrite.errors import warn
from memrewrite.gradients.basis import Basis, Vector
from memrewrite.gradients.port import Port, extra_inputs, trained_outputs
from memrewrite.optim.resume import recall_bases, recall_vector, states_of
from memrewrite.parallel.data_parallel import adopt, foresee, originals, rehearsed
from memrewrite.record.decision import GraphRecord
from memrewrite.record.logs import tell
from memrewrite.record.request import ProjectedWeight, Weight, make_plan
from memrewrite.session.selection import Choice, choose

if TYPE_CHECKING:
    from memrewrite.session.session import Session

_running: ContextVar[Binding | None] = ContextVar("memrewrite_running", default=None)


@dataclass
class Variant:
    """A captured graph compiled for one set of selected arguments."""

    compiled: Callable[..., Any]
    record: GraphRecord
    selected: Sequence[Weight] = ()
    projected: Sequence[ProjectedWeight] = ()
    outputs: int | None = None  # own outputs, where running means follow them
    observed: Sequence[Weight] = ()

    def __post_init__(self) -> None:
        groups = [i for i in self.record.inputs if i.leader is not None]
        self.leaders = [w for w in self.selected if w.position in {i.leader for i in groups}]
        self.leader_of = {w: i.leader for i in groups for w in i.weights}
        self.group_of = {w: i.weights for i in groups for w in i.weights}  # the leader first


@dataclass
class Binding:
    """A variant called with particular weights. Layers of one shape may share a graph."""

    variant: Variant
    names: dict[int, str]  # argument position -> candidate name
    parameters: list[tuple[int, weakref.ref[Tensor]]]
    projected: dict[int, str]  # argument position -> name of its basis
    foreign: bool = False  # see `selection.Choice`
    calibrated: bool = False
    calls: int = 0  # before it was
    unread: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """readers: of each selected weight, the names of all that read its input."""
        groups = self.variant.group_of
        self.readers: dict[int, tuple[str, ...]] = {
            w.position: tuple(self.names[p] for p in groups.get(w.position, [w.position]))
            for w in self.variant.selected
        }

    def extra(self, session: Session, args: Sequence[Any]) -> list[Tensor]:
        """What the compiled graph takes behind its own arguments: see `ports.extra_inputs`."""
        selected, read = self.variant.selected, self.variant.group_of
        vectors = [
            session.vector(self.readers[w.position], w) if w.position in read else self._unread(w)
            for w in selected
        ]
        make: Any = Port.apply
        ports = [
            make(args[w.position], Vector(v, w.left), self.names[w.position])
            for w, v in zip(selected, vectors, strict=True)
            if w.port is not None
        ]
        placed = [(w.position, self.projected[w.position]) for w in self.variant.projected]
        bases = [session.bases[name] for _, name in placed]
        more = [make(args[i], b, name) for (i, name), b in zip(placed, bases, strict=True)]
        return [*vectors, *ports, *(basis.p for basis in bases), *more]

    def _unread(self, weight: Weight) -> Tensor:
        """In place of the v of a weight that this graph has no small gradient of."""
        if weight.position not in self.unread:
            self.unread[weight.position] = torch.ones(
                weight.size, dtype=weight.dtype, device=weight.device
            )
        return self.unread[weight.position]

    def basis_of(self, session: Session, parameter: Tensor) -> Basis | None:
        """In which a parameter's gradient comes next, where it comes small and that is known."""
        at = next((i for i, known in self.parameters if known() is parameter), None)
        if at in self.projected:
            return session.bases.get(self.projected[at])
        weight = next((w for w in self.variant.selected if w.position == at), None)
        if weight is None or weight.port is None:
            return None
        readers = self.readers[weight.position]
        if session.vectors.keys().isdisjoint(readers):
            return None
        return Vector(session.vector(readers, weight), weight.left)


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
        model = session.model()
        real = originals(model, inputs)
        self.positions = [i for i, v in enumerate(inputs) if isinstance(v, nn.Parameter)]
        buffers = {id(b) for b in model.buffers()} if model is not None else set()
        self.buffers = [i for i, value in enumerate(real) if id(value) in buffers]
        self.variants: dict[Any, Variant] = {}
        self.choices: dict[Any, Choice] = {}  # by the parameters of a call
        self.bindings: dict[Any, Binding] = {}  # by the parameters, and what is projected
        foresee(session)
        self._bind(real)
        if self.dynamic and self._choice(real).sites:
            self._compile_both(real)

    def __call__(self, *args: Any) -> Any:
        if rehearsed():
            return self._rehearse(args)
        adopt(self.session)
        binding = self._bind(args)
        if not binding.calibrated:
            self._calibrate(binding, args)
        variant = binding.variant
        if binding.foreign:
            self.session.foreign = True
        else:
            self.session.ran += self.training
        token = _running.set(binding)
        try:
            results = variant.compiled(*args, *binding.extra(self.session, args))
        finally:
            _running.reset(token)
        if variant.outputs is None:
            return results
        self._update_means(binding, results[variant.outputs :])
        return results[: variant.outputs]

    def _rehearse(self, args: Sequence[Any]) -> Any:
        """Called while Dynamo compiles, with tensors without memory, for the shapes of outputs.

        Inductor's programs are made to return such tensors once: none may be left to do so.
        """
        bound = self._bind(originals(self.session.model(), args)).variant
        results = None
        for variant in (*self.variants.values(), bound):
            extra = extra_inputs(variant.selected, variant.projected, args)
            results = variant.compiled(*args, *(value for _, value in extra))
        return results[: bound.outputs]  # type: ignore[index]

    def forget(self) -> None:
        """Choose anew at the next call: an option has changed."""
        self.choices, self.bindings = {}, {}

    def _choice(self, args: Sequence[Any]) -> Choice:
        key = tuple(id(args[i]) for i in self.positions), self._trained(args)
        known = self.choices.get(key)
        if known is None or not all(p() is args[i] for i, p in known.parameters):
            self.bindings = {k: b for k, b in self.bindings.items() if k[0] is not known}
            known = self.choices[key] = choose(self.session, self.positions, args)
            recall_bases(self.session, [site for _, site in known.sites])
            if not self.training:
                known.selected, known.sites = [], []
            if not trained_outputs(self.gm) or self.session.full is not None:
                known.selected = [replace(weight, port=None) for weight in known.selected]
                known.sites = []
        return known

    def _bind(self, args: Sequence[Any]) -> Binding:
        choice = self._choice(args)
        projected = [self.session.projected(i, site) for i, site in choice.sites]
        key = (choice, *projected)
        if key not in self.bindings:
            variant = self._variant(args, choice, projected)
            places = {position: site.candidate.name for position, site in choice.sites}
            facts = choice.names, choice.parameters, places, choice.foreign
            self.bindings[key] = Binding(variant, *facts)
            tell(variant.record, choice.names)
        return self.bindings[key]

    def _variant(
        self, args: Sequence[Any], choice: Choice, projected: list[ProjectedWeight]
    ) -> Variant:
        wanted = self._wanted(args, choice, projected)
        if wanted not in self.variants:
            self.variants[wanted] = self._compile(args, choice.selected, projected)
        return self.variants[wanted]

    def _wanted(self, args: Sequence[Any], choice: Choice, projected: list[ProjectedWeight]) -> Any:
        return self._trained(args), tuple(w.position for w in choice.selected), *projected

    def _trained(self, args: Sequence[Any]) -> tuple[bool, ...]:
        """Which parameters are: where Dynamo does not guard it, each answer has its own variant."""
        return () if GUARDS_TRAINED else tuple([args[i].requires_grad for i in self.positions])

    def _compile_both(self, args: Sequence[Any]) -> None:
        """For a refresh and between two: outside Dynamo a dynamic graph cannot be compiled."""
        choice, known = self._choice(args), dict(self.variants)
        self.variants = {}
        for usual in (True, False):
            projected = [self.session.projected(i, s, s.left is usual) for i, s in choice.sites]
            wanted = self._wanted(args, choice, projected)
            known[wanted] = known.get(wanted) or self._compile(args, choice.selected, projected)
        self.variants = known

    def _compile(
        self, args: Sequence[Any], selected: list[Weight], projected: list[ProjectedWeight]
    ) -> Variant:
        velora = self.session.velora
        if self.variants and self.dynamic:
            return self._uncompiled()
        outputs, gm = None, self.gm
        observed: list[Weight] = []
        if selected and velora and velora.init == "running_mean":
            gm, outputs, observed = observe.observe_inputs(gm, selected)
        scale = velora.scale if velora else 1.0
        absent = self.session.engine.branches
        positions = self.positions, self.buffers
        plan = make_plan(len(args), selected, projected, *positions, scale, absent)
        extra = extra_inputs(selected, projected, args)
        session = self.session
        compiled, record = capture(gm, args, plan, extra, session.passes_for, session.engine)
        compiled = told_of_absence(compiled, [*record.absent])
        return Variant(compiled, record, selected, projected, outputs, observed)

    def _uncompiled(self) -> Variant:
        """Outside Dynamo a dynamic graph cannot be compiled again: run it, exactly."""
        reason = (
            "it shares a dynamic-shape graph with layers that are selected differently; "
            "select all layers of a kind alike, or pass dynamic=False"
        )
        warn(f"some layers run uncompiled, with exact gradients: {reason}")
        return Variant(self.gm, GraphRecord(failure=reason))

    def _calibrate(self, binding: Binding, args: Sequence[Any]) -> None:
        session, velora = self.session, self.session.velora
        inputs = [(w, binding.readers[w.position]) for w in binding.variant.leaders]
        missing = [(w, names) for w, names in inputs if session.vectors.keys().isdisjoint(names)]
        if not binding.calls:
            missing = self._not_recalled(binding, missing)
        binding.calibrated = not missing or velora is None or velora.init in ("ones", "random")
        if binding.calibrated:
            return
        binding.calls += 1
        if session.means.is_due(binding.calls, [names[0] for _, names in missing]):
            found = observe.subtoken_sums(self.gm, args, {w.position: w.size for w, _ in missing})
            session.first_means(missing, found)

    def _not_recalled(
        self, binding: Binding, inputs: list[tuple[Weight, tuple[str, ...]]]
    ) -> list[tuple[Weight, tuple[str, ...]]]:
        """Take v from what optimizers hold of the weights that read an input; the others."""
        groups, parameters = binding.variant.group_of, dict(binding.parameters)
        readers = {i: parameters[i]() for w, _ in inputs for i in groups[w.position]}
        states = states_of(p for p in readers.values() if p is not None) if inputs else {}
        rest = []
        for weight, names in inputs:
            positions = groups[weight.position]
            held = [states[id(readers[i])] for i in positions if id(readers[i]) in states]
            if not recall_vector(self.session, names, weight, held):
                rest.append((weight, names))
        return rest

    def _update_means(self, binding: Binding, totals: Sequence[Tensor]) -> None:
        """Add what this call's linears read to the running means."""
        variant = binding.variant
        leaders = {w.position: w for w in variant.leaders}
        means: dict[int, Tensor] = {}
        for weight, total in zip(variant.observed, totals, strict=True):
            i = weight.position
            if i in leaders:
                means[i] = means[i] + total if i in means else total
        inputs = [(leaders[i], binding.readers[i], total) for i, total in means.items()]
        self.session.update_means(inputs)


def running() -> Binding | None:
    """The compiled graph that is being called, if one is."""
    return _running.get()
