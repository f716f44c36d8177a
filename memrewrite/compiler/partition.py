"""Rewrite one joint graph, partition it into forward and backward, and record the decisions.

Exact recompute comes first: backward may recompute whatever needs no other matmul, which
torch's default forbids for anything that feeds a backward matmul. Matmul outputs that the
default saves are recomputed within a share of the operations that folding and pushing save,
and, where the loss is in chunks, within a share of all.
A z is pinned (computed in forward and saved) where recomputing it would save more bytes than z.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from memrewrite.compiler import pipeline
from memrewrite.compiler.decisions import (
    inputs_of,
    kept_records,
    note_returned,
    note_small_forms,
    remember,
    settle,
)
from memrewrite.compiler.sizes import hint, symbols
from memrewrite.errors import MemrewriteWarning
from memrewrite.methods.method import iterate
from memrewrite.methods.request import Request
from memrewrite.record.decision import GraphRecord, RoundedRecord
from memrewrite.record.listing import listing
from passes import chunked_rows
from passes.base import Pass, copy_graph, stands_for, storage_root, tensor_bytes
from passes.emit import Decompositions
from passes.joint.compress import release
from passes.joint.find import WeightGradient, shared_inputs, weight_gradients
from passes.split.late import is_random, recompute_late
from passes.split.recompute import all_operations, choose_recomputes
from passes.split.rounded import Decision, round_saved
from passes.split.saved import Kept, exclusive_inputs, kept_for_backward
from passes.split.sums import keep_sums

log = logging.getLogger(__name__)

# Matmul-class operations that torch 2.13's `aggressive_recomputation` would recompute: its
# list of compute-intensive operations lacks them.
COSTLY = (
    "_scaled_dot_product",
    "_flash_attention",
    "_efficient_attention",
    "_cudnn_attention",
    "_grouped_mm",
    "flex_attention",
    "chunked_loss",
)

# Share of the saved operations that recomputing matmuls may spend; the rest shortens the step.
# docs/design.md has the measurement.
RECOMPUTE_SHARE = 1 / 4
# Share of all operations that a graph with its loss in chunks may spend on them too: without the
# logits, the layers' saved tensors are the peak.
SPARE_SHARE = 1 / 20

Split = tuple[GraphModule, GraphModule]  # forward, backward
Cut = Callable[[GraphModule, int], Split]  # (joint, number of forward outputs)


@dataclass
class Compile:
    """One compile in progress: the results of the rewrite that the partition reads."""

    record: GraphRecord | None = None
    plain: Graph | None = None  # the joint graph before any pass
    groups: list[list[WeightGradient]] = field(default_factory=list)
    freed: float = 0.0  # operations that folding and pushing saved
    spare: float = SPARE_SHARE
    table: Decompositions = field(default_factory=dict)  # with which AOTAutograd traces


def rewrite(gm: GraphModule, request: Request, todo: list[Pass], state: Compile) -> None:
    """Run the passes on an annotated joint graph; if one fails, warn and keep the exact graph."""
    found = weight_gradients(gm.graph, set(request.weights))
    narrow = {a.position for task in request.tasks if task.method.narrows for a in task.asks}
    # A loss in chunks saves no activation: only a method that makes dw narrower has a decision.
    groups = shared_inputs(g for g in found.gradients if not g.chunked or g.weight in narrow)
    state.groups = groups
    state.record = record = GraphRecord(refused=dict(found.refused))
    record.inputs = inputs_of(state.groups, request.tasks)
    record.symbols = symbols(gm.graph)
    state.plain = copy_graph(gm.graph)
    freed = _freed(found.gradients, request)
    try:
        record.show("joint", listing(gm.graph))

        def after(one: Pass, graph: Graph) -> None:
            record.show(one.name, listing(graph))
            note_small_forms(record, request.tasks, graph)

        record.passes = [step.to_json() for step in pipeline.run(gm, todo, after)]
        state.freed = freed
        note_returned(record, request.tasks, gm.graph)
    except Exception as error:
        log.exception("the rewrite was undone")
        record.failure = f"{type(error).__name__}: {error}"
        record.inputs, record.whole = inputs_of(state.groups, ()), {}
        warnings.warn(
            f"memrewrite could not rewrite a graph and keeps its exact gradients: {error}",
            MemrewriteWarning,
            stacklevel=2,
        )


def divide(
    gm: GraphModule, request: Request, outputs: int, state: Compile, default: Cut, exact_first: Cut
) -> Split:
    """Partition a joint graph into forward and backward; see the module's docstring.

    `default` is torch's partition, whose saved bytes are the "before" of the report;
    `exact_first` also allows exact recompute, unless the user has set an activation memory
    budget.
    """
    before, record, free = None, state.record, request.free
    if state.plain is not None:
        plain, rest = default(GraphModule(gm, state.plain), outputs)
        before = kept_for_backward(plain.graph, outputs, free)
        remember(record, "before", (plain.graph, rest.graph), outputs, free)
        budget = RECOMPUTE_SHARE * state.freed
        budget += state.spare * _spendable(gm.graph, before, outputs)
        _mark_recomputes(gm.graph, before, free, budget)
    _never_recompute_costly(gm.graph)
    forward, backward = _pinned_where_it_pays(gm, free, outputs, exact_first)
    _release(forward, backward)
    rounded = _keep_less(forward, backward, outputs, request, state.table)
    if record is not None and before is not None:
        after = kept_for_backward(forward.graph, outputs, free)
        settle(record, state.groups, before, after, backward.graph)
        record.rounded = [
            RoundedRecord(d.name, d.bits, d.reason, hint(d.before), hint(d.after)) for d in rounded
        ]
        record.kept = kept_records(forward.graph, backward.graph, outputs, free)
        remember(record, "after", (forward.graph, backward.graph), outputs, free)
        record.show("forward", listing(forward.graph))
        record.show("backward", listing(backward.graph))
    return forward, backward


def places_of(graph: Graph, arguments: Collection[int]) -> list[int]:
    """The positions of these arguments among the inputs of a joint graph, tangents excluded."""
    primals = [n for n in graph.find_nodes(op="placeholder") if not n.meta.get("tangent")]
    return [i for i, node in enumerate(primals) if node.meta.get("argument") in arguments]


def _release(*split: GraphModule) -> None:
    """Remove the `hold` nodes, which are needed only before the partition."""
    for gm in split:
        if release(gm.graph):
            gm.recompile()


def _keep_less(
    forward: GraphModule,
    backward: GraphModule,
    outputs: int,
    request: Request,
    table: Decompositions,
) -> list[Decision]:
    """Run the passes of `passes.split` on copies; if one fails, both graphs stay unchanged."""
    first, second = copy_graph(forward.graph), copy_graph(backward.graph)
    rounded: list[Decision] = []
    try:
        changed = keep_sums(first, second, outputs, hint)
        if request.rounding is not None:
            given = request.rounding, request.free, request.weights, table
            rounded = round_saved(first, second, outputs, *given)
        changed += [one.name for one in rounded if not one.reason]
        changed += recompute_late(second)
    except Exception as error:
        log.exception("a pass of passes.split failed; the partition stays unchanged")
        if request.rounding is not None:  # it was asked for
            message = f"memrewrite rounds nothing that this graph saves: {error}"
            warnings.warn(message, MemrewriteWarning, stacklevel=2)
        return []
    if changed:
        forward.graph, backward.graph = first, second
        forward.recompile()
        backward.recompile()
    return rounded


def _pinned_where_it_pays(gm: GraphModule, free: Collection[int], outputs: int, cut: Cut) -> Split:
    joint = copy_graph(gm.graph)
    first = cut(gm, outputs)
    zs = [n for n in first[1].graph.nodes if n.op == "call_function" and stands_for(n)]
    pins = {z.name for z in zs if _worth_pinning(first[1].graph, z, free)}
    if not pins:
        return first
    pinned = _pin(joint, pins, outputs)
    second = cut(GraphModule(gm, joint), outputs + pinned)
    _unpin(second[0], outputs, pinned)
    forwards = (first[0], second[0])
    sizes = [hint(kept_for_backward(gm.graph, outputs, free).bytes) for gm in forwards]
    return second if sizes[1] < sizes[0] else first


def _spendable(joint: Graph, kept: Kept, outputs: int) -> int:
    """Operations of a step whose loss is in chunks; 0 for any other.

    Also 0 where less is saved than gradients take: then the optimizer's step is the peak.
    """
    if not any(chunked_rows.calls(joint)):
        return 0
    returned: Any = joint.output_node().args[0]
    gradients = {storage_root(n) for n in returned[outputs:] if isinstance(n, Node)}
    if hint(kept.bytes) <= sum(hint(tensor_bytes(n)) for n in gradients):
        return 0
    return hint(all_operations(joint))


def _mark_recomputes(graph: Graph, kept: Kept, free: Collection[int], budget: float) -> None:
    """Mark matmul outputs to recompute, of those that the default partition saves."""
    chosen = choose_recomputes(
        kept,
        graph.nodes,
        budget,
        is_free=lambda n: n.meta.get("argument") in free,
        is_costly=lambda n: _is_costly(n) or is_random(n),
        hint=hint,
    )
    names = {node.name for node in chosen}
    for node in graph.nodes:
        if node.name in names:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def _never_recompute_costly(graph: Graph) -> None:
    for node in graph.nodes:
        if node.op == "call_function" and (_is_costly(node) or is_random(node)):
            node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)


def _is_costly(node: Node) -> bool:
    return any(part in str(node.target) for part in COSTLY)


def _worth_pinning(backward: Graph, z: Node, free: Collection[int]) -> bool:
    inputs = [n for n in exclusive_inputs(backward, z) if n.meta.get("argument") not in free]
    tensors = [n for n in inputs if isinstance(n.meta.get("val"), Tensor)]
    return sum(hint(tensor_bytes(n)) for n in tensors) > hint(tensor_bytes(z))


def _pin(joint: Graph, names: Collection[str], outputs: int) -> int:
    """Make each z an output of the forward, so that the partitioner must compute it there."""
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


def _freed(gradients: Sequence[WeightGradient], request: Request) -> int:
    """Operations that the methods save in the gradients of their weights."""
    asked = {placed.weight: (method, placed) for method, placed in iterate(request.tasks)}
    found = [(asked[g.weight], g) for g in gradients if g.weight in asked]
    return sum(hint(method.freed(g, placed)) for (method, placed), g in found)
