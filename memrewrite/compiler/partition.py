"""Rewrite one joint graph, split it, and write down what was decided.

Exact first: the split lets backward recompute whatever it can without another matmul,
which torch's default forbids for anything that feeds a backward matmul. Matmul outputs
that the default keeps are rerun within a share of the operations that the fold removed,
and a z is pinned as a forward value where rebuilding it would keep more than z has.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from memrewrite.compiler import pipeline
from memrewrite.compiler.liveness import memory_record, settled
from memrewrite.errors import MemrewriteWarning
from memrewrite.record.decision import GraphRecord, InputRecord, KeptRecord
from memrewrite.record.listing import listing
from memrewrite.record.request import Plan
from passes.base import Pass, arguments, copy_graph, memory_of, storage_of, tensor_bytes
from passes.joint.absent import absent_gradients
from passes.joint.find import WeightGradient, shared_inputs, weight_gradients
from passes.joint.port import factored_gradients
from passes.provenance import module_of, operation_of
from passes.split.late import is_random, recompute_late
from passes.split.rerun import choose_reruns, freed_operations, pushed_operations
from passes.split.saved import Kept, exclusive_inputs, kept_for_backward, readers
from passes.split.sums import keep_sums

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

# Of the operations that the fold removes, the share that may be spent on reruns; the
# rest is the user's time. docs/design.md has the measurement behind it.
RERUN_SHARE = 1 / 4

Halves = tuple[GraphModule, GraphModule]
Cut = Callable[[GraphModule, int], Halves]  # (joint, number of forward outputs)


@dataclass
class Compile:
    """One compile in progress: what the rewrite leaves for the split that follows it."""

    record: GraphRecord | None = None
    plain: Graph | None = None  # the joint graph before any pass
    groups: list[list[WeightGradient]] = field(default_factory=list)
    freed: float = 0.0  # operations that folding and pushing removed


def rewrite(gm: GraphModule, plan: Plan, todo: list[Pass], state: Compile) -> None:
    """Run the passes on an annotated joint graph; a failing rewrite leaves the exact graph."""
    found = weight_gradients(gm.graph, set(plan.weights))
    state.groups = shared_inputs(found.gradients)
    state.record = GraphRecord(refused=dict(found.refused))
    state.record.inputs = _inputs(state.groups, {weight for weight, _ in plan.vectors})
    state.record.symbols = _symbols(gm.graph)
    state.plain = copy_graph(gm.graph)
    freed = _freed(found.gradients, plan, gm.graph)
    try:
        record = state.record
        record.show("joint", listing(gm.graph))

        def after(one: Pass, graph: Graph) -> None:
            record.show(one.name, listing(graph))
            if one.name == "fold_reconstruction":
                record.factored = factored_gradients(graph, [w for w, _ in plan.vectors])

        record.passes = [step.to_json() for step in pipeline.run(gm, todo, after)]
        state.freed = freed
        record.ported = _absent(gm.graph, [ported.weight for ported in plan.ports])
        record.projected = _absent(gm.graph, [one.weight for one in plan.projections])
        left_out = absent_gradients(gm.graph)
        record.absent = {n.meta["output"]: hint(tensor_bytes(n)) for n in left_out}
    except Exception as error:
        log.exception("the rewrite was undone")
        state.record.failure = f"{type(error).__name__}: {error}"
        state.record.inputs, state.record.factored = _inputs(state.groups, set()), []
        warnings.warn(
            f"memrewrite could not rewrite a graph and keeps its exact gradients: {error}",
            MemrewriteWarning,
            stacklevel=2,
        )


def divide(
    gm: GraphModule, plan: Plan, outputs: int, state: Compile, default: Cut, exact_first: Cut
) -> Halves:
    """Split a joint graph into forward and backward; see the module's docstring.

    `default` is torch's own split, whose kept bytes are the "before" of the report;
    `exact_first` is the same with exact recompute allowed, and None of our additions
    where the user has set an activation memory budget of their own.
    """
    before = None
    if state.plain is not None:
        plain, rest = default(GraphModule(gm, state.plain), outputs)
        before = kept_for_backward(plain.graph, outputs, plan.free)
        _remember(state.record, "before", plain.graph, rest.graph, outputs, plan)
        _mark_reruns(gm.graph, before, plan, state.freed)
    _never_rerun_costly(gm.graph)
    forward, backward = _pinned_where_it_pays(gm, plan, outputs, exact_first)
    _keep_less(forward, backward, outputs)
    if state.record is not None and before is not None:
        after = kept_for_backward(forward.graph, outputs, plan.free)
        _settle(state.record, state.groups, before, after, backward.graph)
        state.record.kept = _kept(forward.graph, backward.graph, outputs, plan)
        _remember(state.record, "after", forward.graph, backward.graph, outputs, plan)
        state.record.show("forward", listing(forward.graph))
        state.record.show("backward", listing(backward.graph))
    return forward, backward


def _keep_less(forward: GraphModule, backward: GraphModule, outputs: int) -> None:
    """On copies: where it fails, the halves are what they were."""
    ahead, behind = copy_graph(forward.graph), copy_graph(backward.graph)
    try:
        changed = [*keep_sums(ahead, behind, outputs, hint), *recompute_late(behind)]
    except Exception:
        log.exception("running sums are not kept, nor recomputations put off")
        return
    if changed:
        forward.graph, backward.graph = ahead, behind
        forward.recompile()
        backward.recompile()


def _pinned_where_it_pays(gm: GraphModule, plan: Plan, outputs: int, cut: Cut) -> Halves:
    joint = copy_graph(gm.graph)
    first = cut(gm, outputs)
    zs = [n for n in first[1].graph.nodes if n.op == "call_function" and _is_small(n)]
    pins = {z.name for z in zs if _worth_pinning(first[1].graph, z, plan.free)}
    if not pins:
        return first
    pinned = _pin(joint, pins, outputs)
    second = cut(GraphModule(gm, joint), outputs + pinned)
    _unpin(second[0], outputs, pinned)
    sizes = [
        hint(kept_for_backward(half.graph, outputs, plan.free).bytes)
        for half in (first[0], second[0])
    ]
    return second if sizes[1] < sizes[0] else first


def _mark_reruns(graph: Graph, kept: Kept, plan: Plan, freed: float) -> None:
    """Choose among the matmul outputs that the default split keeps: no other needs a rerun."""
    chosen = choose_reruns(
        kept,
        graph.nodes,
        RERUN_SHARE * freed,
        is_free=lambda n: n.meta.get("argument") in plan.free,
        is_costly=lambda n: _is_costly(n) or is_random(n),
        hint=hint,
    )
    names = {node.name for node in chosen}
    for node in graph.nodes:
        if node.name in names:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def _never_rerun_costly(graph: Graph) -> None:
    for node in graph.nodes:
        if node.op == "call_function" and _is_costly(node):
            node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)


def _is_costly(node: Node) -> bool:
    return any(part in str(node.target) for part in COSTLY)


def _is_small(node: Node) -> bool:
    """A compressed or projected activation, which may be kept in its place."""
    return "velora_z" in node.meta or "galore" in node.meta


def _worth_pinning(backward: Graph, z: Node, free: Collection[int]) -> bool:
    inputs = [n for n in exclusive_inputs(backward, z) if n.meta.get("argument") not in free]
    tensors = [n for n in inputs if isinstance(n.meta.get("val"), Tensor)]
    return sum(hint(tensor_bytes(n)) for n in tensors) > hint(tensor_bytes(z))


def _pin(joint: Graph, names: Collection[str], outputs: int) -> int:
    """Make each z an output of the forward: the partitioner then must compute it there."""
    output = joint.output_node()
    values, descs = list(output.args[0]), list(output.meta.get("desc") or ())  # type: ignore[arg-type]
    zs = [n for n in joint.nodes if n.name in names]
    output.args = (tuple(values[:outputs] + zs + values[outputs:]),)
    if descs:
        output.meta["desc"] = descs[:outputs] + [None] * len(zs) + descs[outputs:]
    return len(zs)


def _unpin(forward: GraphModule, outputs: int, pinned: int) -> None:
    output = forward.graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    output.args = (tuple(values[:outputs] + values[outputs + pinned :]),)
    for key in ("desc", "output_stack_traces"):
        if key in output.meta:
            entries = list(output.meta[key])
            output.meta[key] = entries[:outputs] + entries[outputs + pinned :]
    forward.graph.lint()
    forward.recompile()


# --- what was decided --------------------------------------------------------------------


def hint(size: Any) -> int:
    """A size at the compile's own shapes; never installs a guard."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 0
    return int(size)


def _freed(gradients: Sequence[WeightGradient], plan: Plan, graph: Graph) -> int:
    places = arguments(graph)
    sizes = {w: places[v].meta["val"].shape[0] for w, v in plan.vectors}
    ranks = {p.weight: places[p.projector].meta["val"].shape[1] for p in plan.projections}
    folded = [freed_operations(g, sizes[g.weight]) for g in gradients if g.weight in sizes]
    pushed = [pushed_operations(g, ranks[g.weight]) for g in gradients if g.weight in ranks]
    return sum(map(hint, [*folded, *pushed]))


def _absent(graph: Graph, weights: list[int]) -> list[int]:
    """Those whose gradient is returned as coordinates, and not as their own."""
    output = graph.output_node()
    returned: Any = output.args[0]
    absent = {w for w, n in zip(output.meta["gradient_of"], returned, strict=True) if n is None}
    return [weight for weight in weights if weight in absent]


def _symbols(graph: Graph) -> dict[str, str]:
    """Each dynamic size with the first "argument.dimension" that it is of."""
    symbols: dict[str, str] = {}
    for position, node in sorted(arguments(graph).items()):
        for dim, length in enumerate(getattr(node.meta.get("val"), "shape", ())):
            if isinstance(length, torch.SymInt):
                symbols.setdefault(str(length), f"{position}.{dim}")
    return symbols


def _inputs(groups: list[list[WeightGradient]], selected: set[int]) -> list[InputRecord]:
    """One record per saved activation, with its weights; the split settles its fate."""
    records = []
    for group in groups:
        chosen = sorted({g.weight for g in group if g.weight in selected})
        records.append(
            InputRecord(
                weights=chosen,
                exact_weights=sorted({g.weight for g in group if g.weight not in selected}),
                leader=chosen[0] if chosen else None,
                features=group[0].features,
                bytes=hint(tensor_bytes(storage_of(group[0].operand))),
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
    zs = {z.meta["velora"]: z for z in after.storages if "velora_z" in z.meta}
    for entry, group in zip(record.inputs, groups, strict=True):
        names = {g.storage_name for g in group}
        was, x = before.named(names), after.named(names)
        z = next((zs[n] for n in names if n in zs), None)
        entry.before = hint(tensor_bytes(was)) if was else 0
        entry.z_bytes = hint(tensor_bytes(z)) if z else 0
        ps = [p for p in after.storages if p.meta.get("galore") in names]
        entry.p_bytes = sum(hint(tensor_bytes(p)) for p in ps)
        entry.after = entry.z_bytes + entry.p_bytes + (hint(tensor_bytes(x)) if x else 0)
        small = "z saved" if z else "x P saved" if ps else "rebuilt"
        entry.fate = "kept alive" if x else small
        entry.kept_by = _reader_names(backward, after.handed[x], served) if x else []
    record.kept_before, record.kept_after = hint(before.bytes), hint(after.bytes)
    record.formula_before = str(settled(before.bytes, record.symbols))
    record.formula_after = str(settled(after.bytes, record.symbols))


def _remember(
    record: GraphRecord | None, when: str, forward: Graph, backward: Graph, outputs: int, plan: Plan
) -> None:
    """Bytes over time. A prediction: where it fails the training goes on without it."""
    if record is None:
        return
    try:
        known = record.symbols
        record.memory[when] = memory_record(forward, backward, outputs, plan.free, hint, known)
    except Exception:
        log.exception("no memory timeline %s the rewrite", when)


def _kept(forward: Graph, backward: Graph, outputs: int, plan: Plan) -> list[KeptRecord]:
    returned: Any = forward.output_node().args[0]
    tensors = [n for n in returned[outputs:] if isinstance(n.meta.get("val"), Tensor)]
    first = {memory_of(node): node for node in reversed(tensors)}
    return [
        KeptRecord(
            name=node.name,
            module=module_of(storage_of(node)) or module_of(node),
            operation=operation_of(storage_of(node)),
            shape=[n if isinstance(n, int) else str(n) for n in node.meta["val"].shape],
            dtype=str(node.meta["val"].dtype),
            bytes=hint(tensor_bytes(memory_of(node))) if first[memory_of(node)] is node else 0,
            lives_anyway=memory_of(node).meta.get("argument") in plan.free,
            compressed=_is_small(storage_of(node)),
            used_by=list(dict.fromkeys(map(_read_as, readers(backward, [node])))),
        )
        for node in tensors
    ]


def _read_as(reader: Node) -> str:
    module = module_of(reader)
    return f"{operation_of(reader)} of {module}" if module else operation_of(reader)


def _reader_names(backward: Graph, handed: Sequence[Node], served: dict[str, int]) -> list[str]:
    weights: set[int] = set()
    operations: dict[str, None] = {}
    for node in readers(backward, handed):
        if node.name in served:
            weights.add(served[node.name])
        elif node.op == "call_function" and "velora" not in node.meta:
            operations[str(getattr(node.target, "overloadpacket", node.target))] = None
    named = [name.removeprefix("aten.") for name in operations]
    return [f"weight:{weight}" for weight in sorted(weights)] + named
