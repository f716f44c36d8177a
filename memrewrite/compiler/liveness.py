"""Predicted bytes over time of forward and backward, and the buffers that are live at the peak.

Counts activations, temporaries and the gradients that backward returns; excludes parameters,
buffers, optimizer state and v, which are always live. Derived from the two partitioned graphs
by `passes.split.live`, before any code is generated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from memrewrite.compiler.sizes import settled
from memrewrite.record.decision import Culprit, GraphRecord, MemoryRecord
from memrewrite.sites.eligible import is_head
from passes.base import storage_root
from passes.joint.absent import absent_gradients
from passes.provenance import module_of, operation_of
from passes.split.live import Buffer, Kind, Timeline, timeline

NUMBER = re.compile(r"\d+")
LOGITS = "the loss and the logits"
CULPRITS = 12  # named at the peak
Hint = Callable[[Any], int]


def memory_record(
    forward: Graph,
    backward: Graph,
    outputs: int,
    free: Collection[int],
    hint: Hint,
    known: Collection[str] = (),
) -> MemoryRecord:
    """The timelines of both graphs; arguments in `free` (parameters, state) are not counted.

    known: the symbols of formulas. Any other symbolic size takes its value at the compile.
    """
    first = timeline(forward, _placeholders(forward, free))
    second = timeline(backward, _handed(forward, backward, outputs, free))
    record = MemoryRecord(
        forward=_points(first, hint),
        backward=_points(second, hint),
        forward_peaks=_peaks(first, hint, known),
        backward_peaks=_peaks(second, hint, known),
        gradients=sum(hint(b.bytes) for b in second.buffers if b.kind == "output"),
    )
    graphs = {"forward": record.forward, "backward": record.backward}
    for graph, points in graphs.items():
        for index, (_, size) in enumerate(points):
            if size > record.peak_bytes:
                record.peak_bytes, record.peak_half, record.peak_index = size, graph, index
    of_peak = first if record.peak_half == "forward" else second
    live = _live_at_peak(of_peak, hint)
    made = {node.name: node for node in forward.nodes}
    record.culprits = [_culprit(b, made, backward, hint) for b in live[:CULPRITS]]
    shares: dict[str, int] = {}
    for buffer in live:
        module = NUMBER.sub("*", module_of(_origin(buffer, made)))
        shares[module] = shares.get(module, 0) + hint(buffer.bytes)
    record.composition = sorted(shares.items(), key=lambda share: -share[1])
    return record


def _placeholders(forward: Graph, free: Collection[int]) -> dict[Node, tuple[str, Kind]]:
    return {
        node: (node.name, "input")
        for node in forward.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), Tensor) and node.meta.get("argument") not in free
    }


def _handed(
    forward: Graph, backward: Graph, outputs: int, free: Collection[int]
) -> dict[Node, tuple[str, Kind]]:
    """Placeholder of backward -> (its storage, by the forward's name; its kind)."""
    returned: Any = forward.output_node().args[0]
    roots = {n.name: storage_root(n) for n in returned[outputs:] if isinstance(n, Node)}
    given = {storage_root(n) for n in returned[:outputs] if isinstance(n, Node)}
    handed: dict[Node, tuple[str, Kind]] = {}
    absent = absent_gradients(backward)
    for node in backward.find_nodes(op="placeholder"):
        if not isinstance(node.meta.get("val"), Tensor):
            continue
        root = roots.get(node.name)
        if node in absent:
            continue
        if root is None:
            handed[node] = (node.name, "incoming")
        elif root.op != "placeholder":
            handed[node] = (root.name, "returned" if root in given else "saved")
        elif root.meta.get("argument") not in free:
            handed[node] = (root.name, "input")
    return handed


def _points(of: Timeline, hint: Hint) -> list[tuple[str, int]]:
    return [(_label(of, position), size) for position, size in of.points(hint)]


def _label(of: Timeline, position: int) -> str:
    if position < 0:
        return "start"
    node = of.nodes[position]
    module = module_of(node)
    return f"{operation_of(node)} of {module}" if module else operation_of(node)


def _peaks(of: Timeline, hint: Hint, known: Collection[str]) -> list[str]:
    """Formulas of which the largest is the peak: under static shapes, one number.

    Excludes formulas that another one dominates in every term.
    """
    points = sorted(of.points(hint), key=lambda point: -point[1])
    if not points:
        return ["0"]
    sizes = {b.node: settled(b.bytes, known) for b in of.buffers}
    if all(isinstance(size, int) for size in sizes.values()):
        return [str(points[0][1])]
    terms = {node: _terms(size) for node, size in sizes.items()}
    kept: list[dict[str, int]] = []
    for position, _ in points:
        total: dict[str, int] = {}
        for buffer in of.at(position):
            for monomial, factor in terms[buffer.node].items():
                total[monomial] = total.get(monomial, 0) + factor
        if not any(_holds(other, total) for other in kept):
            kept = [other for other in kept if not _holds(total, other)] + [total]
    return [" + ".join(f"{c}*({m})" for m, c in total.items()) or "0" for total in kept]


def _terms(size: Any) -> dict[str, int]:
    """A size as monomials with coefficients: 4*s0*s1 + 8 is {"s0*s1": 4, "1": 8}."""
    if isinstance(size, int):
        return {"1": size}
    expanded = size.as_coefficients_dict()
    return {str(monomial): int(factor) for monomial, factor in expanded.items()}


def _holds(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(one.get(monomial, 0) >= factor for monomial, factor in other.items())


def _live_at_peak(of: Timeline, hint: Hint) -> list[Buffer]:
    points = list(of.points(hint))
    position = max(points, key=lambda point: point[1])[0] if points else -1
    return sorted(of.at(position), key=lambda b: -hint(b.bytes))


def _origin(buffer: Buffer, made: dict[str, Node]) -> Node:
    """The node that allocated a buffer: the forward's, for one that is saved."""
    node = buffer.node
    return storage_root(made.get(node.name, node)) if node.op == "placeholder" else node


def _culprit(buffer: Buffer, made: dict[str, Node], backward: Graph, hint: Hint) -> Culprit:
    origin = _origin(buffer, made)
    gradients = set(map(storage_root, backward.output_node().all_input_nodes))
    is_gradient = buffer.kind == "output" and buffer.node in gradients
    return Culprit(
        name=buffer.node.name,
        module=module_of(origin),
        operation=operation_of(origin),
        bytes=hint(buffer.bytes),
        kind="gradient" if is_gradient else "saved" if buffer.kind == "returned" else buffer.kind,
    )


def dominates(records: Iterable[GraphRecord]) -> str:
    """A sentence on the modules that own the predicted activation peak; "" where none is known."""
    memory = [r.memory["after"] for r in records if "after" in r.memory]
    top = max(memory, key=lambda m: m.peak_bytes, default=None)
    if top is None or not top.peak_bytes:
        return ""
    sizes: dict[str, int] = {}
    for name, size in top.composition:
        named = LOGITS if not name or is_head(name) else name
        sizes[named] = sizes.get(named, 0) + size
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:4]
    shares = [f"{name} {size / top.peak_bytes:.0%}" for name, size in largest]
    return (
        f"predicted activation peak: {top.peak_bytes:,} bytes, in {top.peak_half}; "
        f"it is owned by {', '.join(shares)}"
    )
