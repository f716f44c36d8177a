"""Write the decisions for one graph into its record."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from memrewrite.compiler.liveness import memory_record
from memrewrite.compiler.sizes import hint, settled
from memrewrite.methods.method import Task
from memrewrite.record.decision import GraphRecord, InputRecord, KeptRecord
from passes.base import base_of, stands_for, storage_root, tensor_bytes
from passes.joint.absent import absent_gradients
from passes.joint.compress import value_of
from passes.joint.find import WeightGradient
from passes.provenance import module_of, operation_of
from passes.split.saved import Kept, readers

log = logging.getLogger(__name__)
Groups = Sequence[Sequence[WeightGradient]]


def inputs_of(groups: Groups, tasks: Sequence[Task]) -> list[InputRecord]:
    """One record per activation that weight gradients read; `settle` completes it."""
    records = []
    for group in groups:
        compressed: dict[str, list[int]] = {}
        declined: dict[int, str] = {}
        for task in tasks:
            asked = {ask.position for ask in task.asks}
            mine = sorted({g.weight for g in group if g.weight in asked})
            if not mine or not task.method.compresses:
                continue
            reason = task.method.declines(value_of(group[0]))
            if reason is None:
                compressed[task.method.name] = mine
            else:
                declined |= dict.fromkeys(mine, f"{task.method.name} leaves it exact: {reason}")
        taken = {weight for weights in compressed.values() for weight in weights}
        records.append(
            InputRecord(
                compressed=compressed,
                exact_weights=sorted({g.weight for g in group if g.weight not in taken}),
                features=group[0].features,
                bytes=hint(tensor_bytes(base_of(group[0].operand))),
                declined=declined,
            )
        )
    return records


def note_small_forms(record: GraphRecord, tasks: Sequence[Task], graph: Graph) -> None:
    """Record the weights whose whole gradient has a method's small form, between two passes."""
    for task in tasks:
        found = task.method.whole(graph, [ask.position for ask in task.asks])
        known = record.whole.setdefault(task.method.name, [])
        known += [weight for weight in found if weight not in known]


def note_returned(record: GraphRecord, tasks: Sequence[Task], graph: Graph) -> None:
    """Record the gradients that are returned small, and the tangents that may be undefined."""
    output = graph.output_node()
    returned: Any = output.args[0]
    absent = {w for w, n in zip(output.meta["gradient_of"], returned, strict=True) if n is None}
    for task in tasks:
        ported = [ask.position for ask in task.asks if ask.port is not None]
        record.returned[task.method.name] = [weight for weight in ported if weight in absent]
    left_out = absent_gradients(graph)
    record.absent = {n.meta["output"]: hint(tensor_bytes(n)) for n in left_out}


def settle(record: GraphRecord, groups: Groups, before: Kept, after: Kept, backward: Graph) -> None:
    """Record what the partition saves of each activation, or in its place, in bytes."""
    served = {g.matmul_name: g.weight for group in groups for g in group}
    marked = [(mark, node) for node in after.storages if (mark := stands_for(node)) is not None]
    for entry, group in zip(record.inputs, groups, strict=True):
        names = {g.storage_name for g in group}
        was, x = before.named(names), after.named(names)
        entry.before = hint(tensor_bytes(was)) if was else 0
        for mark, node in marked:
            if mark.storage in names:
                known = entry.small_bytes.get(mark.method, 0)
                entry.small_bytes[mark.method] = known + hint(tensor_bytes(node))
        entry.after = sum(entry.small_bytes.values()) + (hint(tensor_bytes(x)) if x else 0)
        entry.outcome = "kept" if x else "replaced" if entry.small_bytes else "recomputed"
        entry.outcome = "chunked" if group[0].chunked else entry.outcome
        mine = set(entry.compressed)
        entry.kept_by = _reader_names(backward, after.views[x], served, mine) if x else []
    record.kept_before, record.kept_after = hint(before.bytes), hint(after.bytes)
    record.formula_before = str(settled(before.bytes, record.symbols))
    record.formula_after = str(settled(after.bytes, record.symbols))


def _reader_names(
    backward: Graph, views: Sequence[Node], served: dict[str, int], methods: Collection[str]
) -> list[str]:
    """The readers of an activation in backward, excluding its compression."""
    weights: set[int] = set()
    operations: dict[str, None] = {}
    for node in readers(backward, views):
        mark = node.meta.get("stands_for")
        if node.name in served:
            weights.add(served[node.name])
        elif node.op == "call_function" and (mark is None or mark.method not in methods):
            operations[str(getattr(node.target, "overloadpacket", node.target))] = None
    named = [name.removeprefix("aten.") for name in operations]
    return [f"weight:{weight}" for weight in sorted(weights)] + named


def remember(
    record: GraphRecord | None,
    when: str,
    graphs: tuple[Graph, Graph],
    outputs: int,
    free: Collection[int],
) -> None:
    """Record the predicted bytes over time; a failure is logged, and training continues."""
    if record is None:
        return
    try:
        record.memory[when] = memory_record(*graphs, outputs, free, hint, record.symbols)
    except Exception:
        log.exception("no memory timeline %s the rewrite", when)


def kept_records(
    forward: Graph, backward: Graph, outputs: int, free: Collection[int]
) -> list[KeptRecord]:
    """One record per tensor that the forward saves for its backward."""
    returned: Any = forward.output_node().args[0]
    tensors = [n for n in returned[outputs:] if isinstance(n.meta.get("val"), Tensor)]
    first = {storage_root(node): node for node in reversed(tensors)}
    return [
        KeptRecord(
            name=node.name,
            module=module_of(base_of(node)) or module_of(node),
            operation=operation_of(base_of(node)),
            shape=[n if isinstance(n, int) else str(n) for n in node.meta["val"].shape],
            dtype=str(node.meta["val"].dtype),
            bytes=hint(tensor_bytes(storage_root(node)))
            if first[storage_root(node)] is node
            else 0,
            lives_anyway=storage_root(node).meta.get("argument") in free,
            compressed=stands_for(base_of(node)) is not None,
            used_by=list(dict.fromkeys(map(_read_as, readers(backward, [node])))),
        )
        for node in tensors
    ]


def _read_as(reader: Node) -> str:
    module = module_of(reader)
    return f"{operation_of(reader)} of {module}" if module else operation_of(reader)
