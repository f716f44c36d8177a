"""One captured graph, compiled once per set of asks, and called with its extra inputs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from memrewrite.compiler.absence import with_undefined_tangents
from memrewrite.compiler.backend import FP8_PASS, GUARDS_TRAINED, Engine, capture
from memrewrite.compiler.sizes import hint
from memrewrite.errors import warn
from memrewrite.gradients.basis import Basis
from memrewrite.gradients.port import Port, trained_outputs
from memrewrite.loss.chunk import Chunked, Lazy, chunk_loss
from memrewrite.loss.find import Head, find_head, has_loss
from memrewrite.loss.lazy import lazily
from memrewrite.methods.method import Ask, Bound, Method, State
from memrewrite.methods.request import extra_inputs, make_request
from memrewrite.parallel.wrapped import is_sharded, originals, rehearsed
from memrewrite.record.decision import IN_CHUNKS, GraphRecord
from memrewrite.record.logs import log_decisions
from memrewrite.session.calls import Calls
from memrewrite.session.choice import Choice, Part, choose
from passes.chunked_loss import rows_by_bytes, rows_of_chunk

_running: ContextVar[Binding | None] = ContextVar("memrewrite_running", default=None)
LEAST_BYTES = 2**24  # of logits that are worth chunks
Asked = list[tuple[Part, list[Ask]]]


@dataclass(eq=False)
class Variant:
    """A captured graph compiled for one set of asks."""

    compiled: Callable[..., Any]
    record: GraphRecord
    asked: Asked = field(default_factory=list)
    outputs: int | None = None  # number of original outputs, if extra ones follow
    observed: tuple[Part, list[int]] | None = None  # the method and weights of the extra ones
    chunked: Chunked | None = None
    read: dict[str, None] = field(default_factory=dict)  # file:line of what read lazy logits

    def __post_init__(self) -> None:
        groups = [g for i in self.record.inputs for g in i.compressed.values()]
        self.readers = {weight: group for group in groups for weight in group}  # leader first
        self.leader_of = {weight: group[0] for weight, group in self.readers.items()}


@dataclass
class Binding:
    """A variant bound to the weights that it is called with; layers may share a graph."""

    variant: Variant
    names: dict[int, str]  # argument position -> the weight's name
    parameters: list[tuple[int, weakref.ref[Tensor]]]
    bound: list[tuple[Part, Bound]]
    foreign: bool = False  # see `choice.Choice`

    def extra(self, args: Sequence[Any]) -> list[Tensor]:
        """The extra inputs of the compiled graph, ordered as by `methods.request.extra_inputs`."""
        found: list[Tensor] = []
        make: Any = Port.apply
        for part, bound in self.bound:
            bases = part.state.handed(bound)
            ported = [(a, b) for a, b in zip(bound.asks, bases, strict=False) if a.port is not None]
            found += [basis.tensor for basis in bases]
            found += [make(args[a.position], b, bound.names[a.position]) for a, b in ported]
        return found

    def basis_of(self, parameter: Tensor) -> Basis | None:
        """The basis of a parameter's next gradient, if it is small and already known."""
        at = next((i for i, known in self.parameters if known() is parameter), None)
        for part, bound in self.bound:
            for ask in bound.asks:
                if ask.position == at:
                    return part.state.known(bound, ask)
        return None

    def asks(self) -> Iterator[tuple[Part, Ask, Tensor]]:
        """Every ask, with its parameter."""
        for part, bound in self.bound:
            for ask in bound.asks:
                parameter = bound.parameter(ask.position)
                if parameter is not None:
                    yield part, ask, parameter


@dataclass(eq=False)
class Setting:
    """What all graphs of one model share."""

    model: weakref.ref[nn.Module]
    engine: Engine
    methods: Sequence[tuple[Method, State]]
    calls: Calls
    group: Callable[[], Any]  # the process group that trains the model together
    foresee: Callable[[], None]  # called before a graph is first compiled
    adopt: Callable[[], None]  # called before every call
    loss_chunks: int | None = 0  # 0: where it pays, as many as then; None: whole logits
    full: str | None = None  # why gradients stay full-size; None if they may be small


class Graph:
    """One captured graph, called with the extra inputs of its methods after its arguments.

    Dynamo may use one graph for several layers: after a graph break the weights are only
    arguments. The weights of a call are therefore identified by its arguments, and each
    different selection has its own variant.
    """

    def __init__(self, setting: Setting, gm: GraphModule, inputs: Sequence[Any]) -> None:
        self.setting, self.gm = setting, gm
        self.training = torch.is_grad_enabled()
        self.dynamic = any(isinstance(i, torch.SymInt) for i in inputs)
        model = setting.model()
        self.sharded = model is not None and is_sharded(model)
        real = originals(model, inputs)
        self.positions = [i for i, v in enumerate(inputs) if isinstance(v, nn.Parameter)]
        buffers = set(model.buffers()) if model is not None else set()
        tensors = [(i, value) for i, value in enumerate(real) if isinstance(value, Tensor)]
        self.buffers = [i for i, value in tensors if value in buffers]
        self.variants: dict[Any, Variant] = {}
        self.choices: dict[Any, Choice] = {}  # by the parameters of a call
        self.bindings: dict[Any, Binding] = {}  # by the choice, and the asks of methods that `move`
        setting.foresee()
        self._bind(real)
        if self.dynamic and any(p.method.moves and p.sites for p in self._choice(real).parts):
            self._compile_every_form(real)

    def __call__(self, *args: Any) -> Any:
        if rehearsed():
            return self._rehearse(args)
        self.setting.adopt()
        binding = self._bind(args)
        for part, bound in binding.bound:
            if not bound.ready:
                part.state.prepare(bound, args)
        variant = binding.variant
        self.setting.calls.count(self.training, binding.foreign)
        token = _running.set(binding)
        try:
            results = variant.compiled(*args, *binding.extra(args))
        finally:
            _running.reset(token)
        if variant.outputs is not None and variant.observed is not None:
            self._follow(binding, results[variant.outputs :])
            results = results[: variant.outputs]
        lazy = variant.chunked and variant.chunked.lazy
        return _with_logits(lazy, variant.read, args, results, self.sharded) if lazy else results

    def _follow(self, binding: Binding, totals: Sequence[Tensor]) -> None:
        assert binding.variant.observed is not None
        observing, positions = binding.variant.observed
        for part, bound in binding.bound:
            if part.method is observing.method:
                part.state.follow(bound, positions, totals)

    def _rehearse(self, args: Sequence[Any]) -> Any:
        """Called by Dynamo with fake tensors during a compile, for the shapes of outputs.

        Inductor makes each compiled program return fake tensors at its first call: every variant
        must have had that call.
        """
        mine = self._bind(originals(self.setting.model(), args)).variant
        results = None
        for variant in (*self.variants.values(), mine):
            extra = extra_inputs(self._request(len(args), variant.asked))
            results = variant.compiled(*args, *(value for _, value in extra))
        return results[: mine.outputs]  # type: ignore[index]

    def forget(self) -> None:
        """Choose again at the next call, because an option has changed."""
        self.choices, self.bindings = {}, {}

    def _choice(self, args: Sequence[Any]) -> Choice:
        # By id, compared below: a key must not keep the tensors of functional_call alive.
        key = tuple(id(args[i]) for i in self.positions), self._trained(args)
        known = self.choices.get(key)
        if known is None or not all(p() is args[i] for i, p in known.parameters):
            self.bindings = {k: b for k, b in self.bindings.items() if k[0] is not known}
            small = bool(trained_outputs(self.gm)) and self.setting.full is None
            methods = self.setting.methods if self.training else ()
            chosen = choose(self.setting.model(), methods, self.positions, args, small)
            known = self.choices[key] = chosen
        return known

    def _bind(self, args: Sequence[Any]) -> Binding:
        choice = self._choice(args)
        asked = [(part, part.ask() if part.method.moves else part.asks) for part in choice.parts]
        key = (choice, *(ask for part, asks in asked if part.method.moves for ask in asks))
        if key not in self.bindings:
            variant = self._variant(args, asked)
            bound = [(part, self._bound(variant, choice, part, asks)) for part, asks in asked]
            binding = Binding(variant, choice.names, choice.parameters, bound, choice.foreign)
            self.bindings[key] = binding
            log_decisions(variant.record, choice.names)
        return self.bindings[key]

    def _bound(self, variant: Variant, choice: Choice, part: Part, asks: Sequence[Ask]) -> Bound:
        names = choice.names | {i: site.weight.name for i, site in part.sites.items()}
        parameters = dict(choice.parameters)
        return Bound(self.gm, asks, names, parameters, variant.readers, self.setting.group)

    def _variant(self, args: Sequence[Any], asked: Asked) -> Variant:
        wanted = self._wanted(args, asked)
        if wanted not in self.variants:
            self.variants[wanted] = self._compile(args, asked)
        return self.variants[wanted]

    def _wanted(self, args: Sequence[Any], asked: Asked) -> Any:
        return self._trained(args), *(tuple(asks) for _, asks in asked)

    def _trained(self, args: Sequence[Any]) -> tuple[bool, ...]:
        """requires_grad of each parameter: it selects a variant where Dynamo does not guard it."""
        return () if GUARDS_TRAINED else tuple([args[i].requires_grad for i in self.positions])

    def _compile_every_form(self, args: Sequence[Any]) -> None:
        """Compile all forms now: outside Dynamo a graph with dynamic shapes cannot be compiled."""
        choice, known = self._choice(args), dict(self.variants)
        self.variants = {}
        forms = max((part.method.forms for part in choice.parts), key=len)
        for form in forms:
            asked = [(p, p.ask(form) if p.method.moves else p.asks) for p in choice.parts]
            wanted = self._wanted(args, asked)
            known[wanted] = known.get(wanted) or self._compile(args, asked)
        self.variants = known

    def _request(self, arguments: int, asked: Asked) -> Any:
        methods = [(part.method, asks) for part, asks in asked]
        branches = self.setting.engine.branches
        return make_request(arguments, methods, self.positions, self.buffers, branches)

    def _compile(self, args: Sequence[Any], asked: Asked) -> Variant:
        if self.variants and self.dynamic:
            return self._uncompiled()
        chunked, outputs, observed = self._chunked(args, asked), None, None
        gm = chunked.gm
        for part, asks in asked:
            found = part.method.observe(gm, asks) if asks else None
            if found is not None:
                gm, outputs, positions = found
                observed = part, positions
        request = self._request(len(args), asked)
        compiled, record = capture(gm, args, request, self.setting.engine)
        known = {w for entry in record.inputs for w in (*entry.weights, *entry.exact_weights)}
        record.refused |= dict.fromkeys([w for w in chunked.head if w not in known], IN_CHUNKS)
        compiled = with_undefined_tangents(compiled, [*record.absent])
        return Variant(compiled, record, asked, outputs, observed, chunked)

    def _chunked(self, args: Sequence[Any], asked: Asked) -> Chunked:
        """The graph with its loss in chunks, if that is asked for and can be done."""
        chunks = self.setting.loss_chunks
        if chunks is None or not self.training:
            return Chunked(self.gm)
        head = find_head(self.gm.graph)
        others = ((part.method, asks) for part, asks in asked if not part.method.narrows)
        taken = {ask.position: method for method, asks in others for ask in asks}
        if not isinstance(head, str) and (by := [taken[w] for w in head.weights if w in taken]):
            head = f"{by[0].name} compresses the head's input; leave it out of {by[0].remedy}"
        if not isinstance(head, str) and not chunks:
            head = _too_small(head) or (_may_be_freed(head) if self.sharded else None) or head
        if isinstance(head, str):
            if not has_loss(self.gm.graph):  # it may only be one part of a model
                return Chunked(self.gm)
            told = f"the loss is not in chunks: {head}"
            if chunks:  # a number is a request
                warn(f"loss_chunks: {told}")
            return Chunked(self.gm, told=told)
        head.rounded = _rounds(self.setting.engine)
        trained = any(args[i].requires_grad for i in head.weights)
        found = chunk_loss(self.gm, head, chunks, trained)
        found.told = _sizes(head, chunks)
        return found

    def _uncompiled(self) -> Variant:
        """A variant that runs op by op: outside Dynamo a dynamic graph cannot be compiled."""
        reason = (
            "it shares a dynamic-shape graph with layers that are selected differently; "
            "select all layers of a kind alike, or pass dynamic=False"
        )
        warn(f"some layers run uncompiled, with exact gradients: {reason}")
        return Variant(self.gm, GraphRecord(failure=reason))


def _too_small(head: Head) -> str | None:
    """Why chunks do not pay, or None: one of them is alive at a time."""
    rows, vocabulary = map(hint, head.logits.shape)
    row = vocabulary * head.logits.dtype.itemsize
    if rows * row >= LEAST_BYTES and rows >= 2 * rows_by_bytes(row):
        return None
    return f"the logits take {rows * row / 1e6:.1f} MB, less than two chunks or 16 MiB"


def _rounds(engine: Engine) -> bool:
    """Whether torch's fp8 pass rounds what the forward saves: gradients must not be among it."""
    wanted = engine.option("post_grad_fusion_options")
    return engine.backend == "inductor" and FP8_PASS in wanted


def _may_be_freed(head: Head) -> str | None:
    """Why chunks do not pay in a model under fully_shard, or None."""
    if not head.made:
        return None
    return (
        "fully_shard frees the head's weight after backward, when the logits that the model "
        "returns may be read; if they never are, pass loss_chunks=8, or another number"
    )


def _sizes(head: Head, chunks: int) -> str:
    """`logits: 262.1 MB -> 32.8 MB in 8 chunks`."""
    rows, vocabulary = map(hint, head.logits.shape)
    itemsize = head.logits.dtype.itemsize
    mine = rows_of_chunk(rows, vocabulary, itemsize, chunks)
    size, small = (n * vocabulary * itemsize / 1e6 for n in (rows, mine))
    count = -(-rows // mine) if rows else 0
    return (
        f"logits: {size:.1f} MB -> {small:.1f} MB in {count} chunks of {mine} rows, exact"
        f"{', computed again in backward' if head.by_rows else ''}"
    )


def _with_logits(
    lazy: Lazy,
    read: dict[str, None],
    args: Sequence[Any],
    results: Sequence[Any],
    sharded: bool,
) -> list[Any]:
    """The results, with logits that are computed when they are read."""
    found = list(results)
    parts = [found[lazy.output], *(args[i] for i in lazy.inputs)]
    found[lazy.output] = lazily(lazy.make, parts, lazy.dtype, read.setdefault, sharded)
    return found


def running() -> Binding | None:
    """The binding of the graph that is being called, or None."""
    return _running.get()
