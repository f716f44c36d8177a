"""The route through torch: the only file that knows Dynamo, AOTAutograd and Inductor.

`Backend` is what `torch.compile` calls once per captured graph. It never edits Dynamo's
graph (Dynamo reads it again): it copies it, appends one placeholder per selected weight
for its v, and hands the copy to Inductor with two hooks bound to this compile alone:

    joint_custom_pre_pass   the passes of `api.passes_for(plan)`
    custom_partitioner_fn   min-cut, exact recompute first, z pinned where it pays

On a warm AOTAutograd cache neither hook runs. What they decided is therefore written
beside torch's cache under the same inputs to the key, and read back; where it is
missing the graph is compiled once more without the cache.

Private torch APIs, by torch version: everything here was read and run on 2.13.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import operator
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

import passes
from memrewrite import pipeline
from memrewrite.errors import MemrewriteWarning
from memrewrite.record import GraphRecord, InputRecord
from passes.base import Pass, arguments, copy_graph, storage_of, tensor_bytes
from passes.find import WeightGradient, shared_inputs, weight_gradients
from passes.rerun import choose_reruns, freed_operations
from passes.saved import Kept, exclusive_inputs, kept_for_backward, readers

log = logging.getLogger(__name__)

# Matmul-class work that torch 2.13's `aggressive_recomputation` would run twice: its
# list of compute-intensive operations lacks them.
COSTLY = (
    "_scaled_dot_product",
    "_flash_attention",
    "_efficient_attention",
    "_cudnn_attention",
    "_grouped_mm",
    "flex_attention",
)

# Of the operations that the fold removes, this share may be spent on rerunning matmuls
# in backward, for fewer kept bytes; the rest is the user's time. docs/design.md has the
# measurement behind it.
RERUN_SHARE = 1 / 4


@dataclass(frozen=True)
class Plan:
    """What one captured graph is asked to do: plain data, part of the cache key."""

    weights: tuple[int, ...]  # arguments that are parameters
    buffers: tuple[int, ...]  # arguments that are the model's buffers
    vectors: tuple[tuple[int, int], ...]  # selected weight -> its v
    scale: float

    @property
    def free(self) -> set[int]:
        """Arguments that live anyway: saving them costs nothing."""
        return {*self.weights, *self.buffers, *(v for _, v in self.vectors)}


PassesFor = Callable[[Plan], list[Pass]]


# --- what the hooks tell the backend -----------------------------------------------


@dataclass
class _Compile:
    """One compile in progress; hooks write here because they must stay stateless."""

    record: GraphRecord | None = None
    plain: Graph | None = None  # the joint graph before any pass
    groups: list[list[WeightGradient]] = field(default_factory=list)
    freed: float = 0.0  # operations that the fold removed


_current: ContextVar[_Compile | None] = ContextVar("memrewrite_compile", default=None)


@contextlib.contextmanager
def _compiling() -> Iterator[_Compile]:
    state = _Compile()
    token = _current.set(state)
    try:
        yield state
    finally:
        _current.reset(token)


# --- the two hooks -------------------------------------------------------------------


@functools.cache
def source_hash() -> str:
    """Of every file that decides what a graph becomes: yesterday's pass is another pass."""
    folders = (Path(passes.__file__).parent, Path(__file__).parent)
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(p for folder in folders for p in folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class JointPasses(CustomGraphPass):
    """Inductor's joint_custom_pre_pass: annotate, remember the plain graph, rewrite."""

    def __init__(self, plan: Plan, passes_for: PassesFor) -> None:
        self.plan = plan
        self.passes_for = passes_for

    def uuid(self) -> Any:
        return ("memrewrite", source_hash(), self.plan)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JointPasses) and self.uuid() == other.uuid()

    def __hash__(self) -> int:
        return hash(self.uuid())

    def __call__(self, graph: Graph) -> None:
        rewrite_joint(graph.owning_module, self.plan, self.passes_for(self.plan))


class ExactFirstPartitioner(CustomPartitionerFn):
    """Inductor's custom_partitioner_fn: exact recompute first, z pinned where it pays."""

    def __init__(self, plan: Plan, inner: CustomPartitionerFn | None = None) -> None:
        self.plan = plan
        self.inner = inner

    def uuid(self) -> Any:
        return ("memrewrite", source_hash(), self.plan, self.inner and self.inner.uuid())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExactFirstPartitioner) and self.uuid() == other.uuid()

    def __hash__(self) -> int:
        return hash(self.uuid())

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[GraphModule, GraphModule]:
        return partition(gm, joint_inputs, self.plan, self.inner, **kwargs)


def annotate(graph: Graph) -> bool:
    """Write the facts of `passes.base` into meta. False for a graph with no backward."""
    (output,) = graph.find_nodes(op="output")
    tangents = False
    for node in graph.find_nodes(op="placeholder"):
        desc = node.meta.get("desc")
        node.meta["argument"] = getattr(desc, "idx", None) if _is(desc, "PlainAOTInput") else None
        node.meta["tangent"] = _is(desc, "TangentAOTInput")
        tangents |= node.meta["tangent"]
    descs = output.meta.get("desc") or [None] * len(output.args[0])
    output.meta["gradient_of"] = [
        getattr(desc.grad_of, "idx", None) if _is(desc, "GradAOTOutput") else None for desc in descs
    ]
    return tangents


def _is(desc: object, name: str) -> bool:
    return type(desc).__name__ == name


def rewrite_joint(gm: GraphModule, plan: Plan, todo: list[Pass]) -> None:
    """Run the passes on a joint graph; a failing rewrite leaves the exact graph."""
    state = _current.get() or _Compile()
    state.record = GraphRecord()
    if not annotate(gm.graph):
        state.record.inference = True
        return
    found = weight_gradients(gm.graph, set(plan.weights))
    state.groups = shared_inputs(found.gradients)
    state.record.refused = dict(found.refused)
    state.record.inputs = _inputs(state.groups, {weight for weight, _ in plan.vectors})
    state.plain = copy_graph(gm.graph)
    freed = _freed(found.gradients, dict(plan.vectors), gm.graph)
    try:
        state.record.passes = [step.to_json() for step in pipeline.run(gm, todo)]
        state.freed = freed
    except Exception as error:
        log.exception("memrewrite: the rewrite was undone")
        state.record.failure = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"memrewrite could not rewrite a graph and keeps its exact gradients: {error}",
            MemrewriteWarning,
            stacklevel=2,
        )


def _freed(
    gradients: Sequence[WeightGradient], vectors: dict[int, int], graph: Graph
) -> float:
    places = arguments(graph)
    return sum(
        _hint(freed_operations(g, places[vectors[g.weight]].meta["val"].shape[0]))
        for g in gradients
        if g.weight in vectors
    )


def partition(
    gm: GraphModule,
    joint_inputs: Sequence[object],
    plan: Plan,
    inner: Callable[..., Any] | None,
    *,
    num_fwd_outputs: int,
    **kwargs: Any,
) -> tuple[GraphModule, GraphModule]:
    """Split a joint graph, keeping fewer bytes than the default, by exact recompute."""
    state = _current.get()

    def cut(joint: GraphModule, num_fwd_outputs: int) -> tuple[GraphModule, GraphModule]:
        use = inner or min_cut_rematerialization_partition
        return use(joint, joint_inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)  # type: ignore[no-any-return]

    before = None
    if state and state.plain is not None:
        plain, _ = cut(GraphModule(gm, state.plain), num_fwd_outputs=num_fwd_outputs)
        before = kept_for_backward(plain.graph, num_fwd_outputs, plan.free)
    with _exact_first():
        _never_rerun_costly(gm.graph)
        freed = state.freed if state else 0.0
        forward, backward = _cut(gm, plan, cut, num_fwd_outputs, freed)
    if state and state.record and before is not None:
        after = kept_for_backward(forward.graph, num_fwd_outputs, plan.free)
        _settle(state.record, state.groups, before, after, backward.graph)
    return forward, backward


def _exact_first() -> contextlib.AbstractContextManager[Any]:
    """Functorch settings for one partition. A budget that the user set is left to act."""
    if functorch_config.activation_memory_budget != 1.0:
        return contextlib.nullcontext()
    patched: Any = functorch_config.patch(aggressive_recomputation=True)
    return patched  # type: ignore[no-any-return]


def _never_rerun_costly(graph: Graph) -> None:
    for node in graph.nodes:
        if node.op == "call_function" and any(name in str(node.target) for name in COSTLY):
            node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)


def _cut(
    gm: GraphModule, plan: Plan, cut: Callable[..., Any], outputs: int, freed: float
) -> tuple[GraphModule, GraphModule]:
    """Let min-cut choose, then improve on its choice once, if that keeps fewer bytes.

    Two improvements: a z is pinned where rebuilding it keeps more bytes than z has, and
    matmuls are rerun within a share of the operations that the fold freed.
    """
    joint = copy_graph(gm.graph)
    forward, backward = cut(gm, num_fwd_outputs=outputs)
    kept = kept_for_backward(forward.graph, outputs, plan.free)
    pins = {z.name for z in _zs(backward.graph) if _worth_pinning(backward.graph, z, plan.free)}
    reruns = {n.name for n in _reruns(kept, plan, freed)}
    if not pins and not reruns:
        return forward, backward
    for node in joint.nodes:
        if node.name in reruns:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    zs = _pin(joint, pins, outputs)
    again = cut(GraphModule(gm, joint), num_fwd_outputs=outputs + zs)
    _unpin(again[0], outputs, zs)
    kept_again = kept_for_backward(again[0].graph, outputs, plan.free)
    return again if _hint(kept_again.bytes) < _hint(kept.bytes) else (forward, backward)


def _reruns(kept: Kept, plan: Plan, freed: float) -> list[Node]:
    if not freed or functorch_config.activation_memory_budget != 1.0:
        return []
    return choose_reruns(
        kept,
        RERUN_SHARE * freed,
        is_free=lambda n: n.meta.get("argument") in plan.free,
        is_costly=_is_costly,
        hint=_hint,
    )


def _is_costly(node: Node) -> bool:
    name = str(node.target)
    return "rand" in name or any(part in name for part in COSTLY)


def _zs(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if "velora" in n.meta and n.op == "call_function"]


def _worth_pinning(backward: Graph, z: Node, free: Collection[int]) -> bool:
    inputs = [n for n in exclusive_inputs(backward, z) if n.meta.get("argument") not in free]
    rebuilt_from = sum(_hint(tensor_bytes(n)) for n in inputs if _is_tensor(n))
    return bool(rebuilt_from > _hint(tensor_bytes(z)))


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _pin(joint: Graph, names: Collection[str], outputs: int) -> int:
    """Make each z an output of the forward: the partitioner then must compute it there."""
    (output,) = joint.find_nodes(op="output")
    values, descs = list(output.args[0]), list(output.meta.get("desc") or ())
    zs = [n for n in joint.nodes if n.name in names]
    output.args = (tuple(values[:outputs] + zs + values[outputs:]),)
    if descs:
        output.meta["desc"] = descs[:outputs] + [None] * len(zs) + descs[outputs:]
    return len(zs)


def _unpin(forward: GraphModule, outputs: int, zs: int) -> None:
    output = forward.graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    output.args = (tuple(values[:outputs] + values[outputs + zs :]),)
    for key in ("desc", "output_stack_traces"):
        if key in output.meta:
            entries = list(output.meta[key])
            output.meta[key] = entries[:outputs] + entries[outputs + zs :]
    forward.graph.lint()
    forward.recompile()


# --- the record ------------------------------------------------------------------------


def _inputs(groups: list[list[WeightGradient]], selected: set[int]) -> list[InputRecord]:
    """One record per saved activation, with its weights; fates are settled later."""
    records = []
    for group in groups:
        chosen = sorted({g.weight for g in group if g.weight in selected})
        exact = sorted({g.weight for g in group if g.weight not in selected})
        x = storage_of(group[0].operand)
        records.append(
            InputRecord(
                weights=chosen,
                exact_weights=exact,
                leader=chosen[0] if chosen else None,
                features=group[0].features,
                bytes=_hint(tensor_bytes(x)),
                z_bytes=0,
                before=0,
                after=0,
                fate="rebuilt",
            )
        )
    return records


def _settle(
    record: GraphRecord,
    groups: list[list[WeightGradient]],
    before: Kept,
    after: Kept,
    backward: Graph,
) -> None:
    served = {g.matmul_name: g.weight for group in groups for g in group}
    zs = {z.meta["velora"]: z for z in after.storages if "velora" in z.meta}
    for entry, group in zip(record.inputs, groups, strict=True):
        names = {g.storage_name for g in group}
        kept_x, z = after.named(names), next((zs[n] for n in names if n in zs), None)
        was = before.named(names)
        entry.before = _hint(tensor_bytes(was)) if was else 0
        if kept_x:
            entry.fate, entry.after = "kept alive", _hint(tensor_bytes(kept_x))
            entry.kept_by = _reader_names(backward, after.handed[kept_x], served)
        elif z:
            entry.fate, entry.after = "z saved", _hint(tensor_bytes(z))
        if z:
            entry.z_bytes = _hint(tensor_bytes(z))
    record.kept_before, record.kept_after = _hint(before.bytes), _hint(after.bytes)
    record.formula_before, record.formula_after = str(before.bytes), str(after.bytes)


def _reader_names(
    backward: Graph, handed: Sequence[Node], served: dict[str, int]
) -> list[str]:
    seen: dict[str, None] = {}
    for node in readers(backward, handed):
        if node.name in served:
            seen[f"weight:{served[node.name]}"] = None
        elif "velora" not in node.meta and node.op == "call_function":
            seen[str(node.target).removeprefix("aten.").rpartition(".")[0] or str(node.target)] = None
    return list(seen)


def _hint(size: Any) -> int:
    """A size in bytes at the compile's own shapes; never installs a guard."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 0
    return int(size)


# --- one captured graph ----------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A selected weight as one captured graph sees it."""

    position: int
    size: int  # M
    dtype: torch.dtype  # of v
    device: torch.device


def capture(
    gm: GraphModule,
    inputs: Sequence[Any],
    selected: Sequence[Weight],
    parameters: Sequence[int],
    buffers: Sequence[int],
    scale: float,
    passes_for: PassesFor,
    engine: Engine,
) -> tuple[Callable[..., Any], GraphRecord]:
    """Compile a copy of Dynamo's graph that takes one v per selected weight, at the end."""
    copied = copy_module(gm)
    vectors = [_add_vector(copied, weight) for weight in selected]
    first = len(inputs)
    plan = Plan(
        weights=tuple(parameters),
        buffers=tuple(buffers),
        vectors=tuple((w.position, first + i) for i, w in enumerate(selected)),
        scale=scale,
    )
    copied.recompile()
    key = _record_key(copied, inputs, plan, engine)
    again = copy_module(copied)
    with _compiling() as state:
        compiled = engine.compile(copied, [*inputs, *vectors], plan, passes_for)
    if state.record is not None:
        _store(key, state.record)
        return compiled, state.record
    stored = _load(key)
    if stored is not None:
        return compiled, stored
    with _compiling() as state, inductor_config.patch(force_disable_caches=True):
        compiled = engine.compile(again, [*inputs, *vectors], plan, passes_for)
    record = state.record or GraphRecord(inference=True)
    _store(key, record)
    return compiled, record


def copy_module(gm: GraphModule) -> GraphModule:
    """A copy of a Dynamo graph that AOTAutograd accepts as Dynamo's own."""
    copied = GraphModule(gm, copy_graph(gm.graph))
    copied.meta.update(gm.meta)
    for old, new in zip(
        gm.graph.find_nodes(op="placeholder"),
        copied.graph.find_nodes(op="placeholder"),
        strict=True,
    ):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return copied


def _add_vector(gm: GraphModule, weight: Weight) -> Tensor:
    last = gm.graph.find_nodes(op="placeholder")[-1]
    fake: Tensor = torch.empty(weight.size, dtype=weight.dtype, device=weight.device)
    if torch._guards.TracingContext.try_get() is not None:  # called by Dynamo
        fake = _fake_mode(gm).from_tensor(fake, static_shapes=True)
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(f"memrewrite_v_{weight.position}")
    node.meta["example_value"] = fake
    node._dynamo_source = ConstantSource(node.name)  # type: ignore[attr-defined]
    return fake


def _fake_mode(gm: GraphModule) -> Any:
    return next(
        node.meta["example_value"].fake_mode
        for node in gm.graph.find_nodes(op="placeholder")
        if hasattr(node.meta.get("example_value"), "fake_mode")
    )


class Engine:
    """What turns the copied graph into code: Inductor, or the rewritten graphs as they are."""

    def __init__(self, backend: str, mode: str | None, options: Any, dynamic: bool | None) -> None:
        self.backend = backend
        self.config: dict[str, Any] = {}
        if backend == "inductor":
            checked = torch._TorchCompileInductorWrapper(mode, options, dynamic)
            self.config = dict(checked.config)

    def compile(
        self, gm: GraphModule, inputs: Sequence[Any], plan: Plan, passes_for: PassesFor
    ) -> Callable[..., Any]:
        if self.backend == "aot_eager":
            return _compile_eager(gm, inputs, plan, passes_for)
        from torch._inductor.compile_fx import compile_fx

        own = JointPasses(plan, passes_for)
        theirs = self.config.get("joint_custom_pre_pass", inductor_config.joint_custom_pre_pass)
        inner = self.config.get("custom_partitioner_fn", inductor_config.custom_partitioner_fn)
        chain = own if theirs is None else [own, *_as_list(theirs)]
        patches = {
            **self.config,
            "joint_custom_pre_pass": chain,
            "custom_partitioner_fn": ExactFirstPartitioner(plan, inner),
        }
        return compile_fx(gm, inputs, config_patches=patches)  # type: ignore[no-any-return]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _compile_eager(
    gm: GraphModule, inputs: Sequence[Any], plan: Plan, passes_for: PassesFor
) -> Callable[..., Any]:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.compilers import nop
    from torch._inductor.decomposition import select_decomp_table

    def joint(gm: GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        rewrite_joint(gm, plan, passes_for(plan))
        return partition(gm, joint_inputs, plan, None, **kwargs)

    backend = aot_autograd(
        fw_compiler=nop,
        bw_compiler=nop,
        partition_fn=joint,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    return backend(gm, inputs)  # type: ignore[no-any-return]


# --- records beside the compile cache ---------------------------------------------------


def _record_key(gm: GraphModule, inputs: Sequence[Any], plan: Plan, engine: Engine) -> str:
    described = [
        (str(i.shape), str(i.dtype), str(i.stride()), i.device.type, i.requires_grad)
        if isinstance(i, Tensor)
        else str(i)
        for i in inputs
    ]
    facts = (
        gm.code,
        described,
        plan,
        source_hash(),
        engine.backend,
        sorted((k, str(v)) for k, v in engine.config.items()),
        functorch_config.get_hash(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _record_path(key: str) -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "memrewrite" / f"{key}.json"


def _store(key: str, record: GraphRecord) -> None:
    path = _record_path(key)
    with contextlib.suppress(OSError):  # a read-only cache costs a compile, never a training run
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{id(record)}.tmp")
        temporary.write_text(json.dumps(record.to_json()))
        temporary.replace(path)


def _load(key: str) -> GraphRecord | None:
    try:
        return GraphRecord.from_json(json.loads(_record_path(key).read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None


# --- running means: a graph that also returns what its linears read ------------------------


LINEARS: dict[Any, tuple[int, int]] = {  # Dynamo's calls -> positions of x and of the weight
    torch.nn.functional.linear: (0, 1),
    torch._C._nn.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.mm: (0, 1),
    torch.matmul: (0, 1),
    operator.matmul: (0, 1),
    "matmul": (0, 1),
    "mm": (0, 1),
}


def observe_inputs(
    gm: GraphModule, selected: Sequence[Weight]
) -> tuple[GraphModule, int, list[Weight]]:
    """A copy that appends, per visible linear, the sum of its input's sub-tokens: (M,).

    Returns the copy, the number of its own outputs, and whose sum each new output is.
    """
    from memrewrite.calibrate import subtoken_sum

    copied = copy_module(gm)
    places = copied.graph.find_nodes(op="placeholder")
    by_node = {places[w.position]: w for w in selected}
    output = copied.graph.output_node()
    own = tuple(output.args[0])  # type: ignore[arg-type]
    observed, sums = [], []
    for node in list(copied.graph.nodes):
        x, weight = _linear_operands(node, by_node)
        if x is not None and weight is not None:
            with copied.graph.inserting_before(output):
                sums.append(
                    copied.graph.call_function(subtoken_sum, (x, weight.size, weight.dtype))
                )
            observed.append(weight)
    output.args = ((*own, *sums),)
    copied.recompile()
    return copied, len(own), observed


def _linear_operands(
    node: Node, weights: dict[Node, Weight]
) -> tuple[Node | None, Weight | None]:
    if node.op not in ("call_function", "call_method") or node.target not in LINEARS:
        return None, None
    at_x, at_weight = LINEARS[node.target]
    if len(node.args) <= at_weight:
        return None, None
    x, weight = node.args[at_x], node.args[at_weight]
    while isinstance(weight, Node) and weight not in weights and weight.op == "call_method":
        weight = weight.args[0]  # .t(), .transpose(0, 1), .to(dtype)
    return (x, weights[weight]) if isinstance(x, Node) and weight in weights else (None, None)
