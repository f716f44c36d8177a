"""Buffer liveness: the bytes of a forward or backward graph at each operation.  (reads only)

A code generator allocates fewer buffers than a graph has values. A library call (a matmul,
attention, a scatter) reads and writes buffers; the pointwise operations and reductions
between two calls are fused into kernels, and a value that is only used within one kernel
has no buffer. So a value has a buffer

    if a library call computes or reads it, or the graph returns it, or
    if it is read after a later library call and is too expensive to recompute: it reads
       more than four buffers (Inductor's threshold), or is a reduction.

Any other value is recomputed where it is read. A scatter that adds to a value which nothing
else reads writes into its buffer. A buffer is live from the operation that writes it to the
last one that reads it, directly or through values without a buffer. Sizes may be symbolic.
docs/results compares the predictions with measurements.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes import chunked_rows
from passes.base import adds_present, aten, is_alias, operand, tensor_bytes
from passes.base import storage_root as root_of_views
from passes.joint.tied import adds_rows

Kind = Literal["saved", "returned", "input", "incoming", "output", "temporary"]

CREATED = {  # without operands: computed where they are read
    aten.full.default,
    aten.arange.start_step,
    aten.arange.default,
    aten.scalar_tensor.default,
    aten.zeros.default,
    aten.ones.default,
    aten.empty.memory_format,
    torch.ops.prims.iota.default,
}
CALLS = (  # parts of names: library calls, and kernels that are not fused with others
    "mm",
    "scaled_dot_product",
    "attention",
    "convolution",
    "_linear",
    "embedding_dense_backward",
    "index_put",
    "scatter",
    "index_add",
    "sort",
    "topk",
    "cum",
    "_fft",
    "pool",
    "upsample",
    "linalg",
    "bernoulli",
    "chunked_loss",
)
REDUCTIONS = {"sum", "mean", "amax", "amin", "var", "var_mean", "prod", "any", "argmax", "argmin"}
REUSABLE = ("saved", "temporary")  # may be overwritten; the caller may hold the others
MANY_READS, MANY_OPERATIONS = 4, 30  # Inductor's realize_reads_, realize_opcount_threshold


@dataclass(frozen=True)
class Buffer:
    """One allocation: written at position `start` of the graph (input: -1), last read at `stop`."""

    node: Node
    kind: Kind
    start: int
    stop: int
    bytes: Any  # symbolic under dynamic shapes


@dataclass(frozen=True)
class Timeline:
    """The buffers of a forward or backward graph, in the order of its nodes."""

    nodes: tuple[Node, ...]
    buffers: tuple[Buffer, ...]

    def at(self, position: int) -> list[Buffer]:
        """The buffers that are live while the operation at `position` runs."""
        live = [b for b in self.buffers if b.start <= position <= b.stop]
        reused = _reused(live, position)
        return [b for b in live if b is not reused]

    def points(self, hint: Callable[[Any], int]) -> Iterator[tuple[int, int]]:
        """(position, live bytes) wherever a buffer starts; `hint` evaluates symbolic sizes."""
        starts: dict[int, list[Buffer]] = {}
        stops: dict[int, list[Buffer]] = {}
        for buffer in self.buffers:
            starts.setdefault(buffer.start, []).append(buffer)
            stops.setdefault(buffer.stop, []).append(buffer)
        size = {id(b): hint(b.bytes) for b in self.buffers}
        live = 0
        for position in sorted({-1, *starts, *stops}):
            live += sum(size[id(b)] for b in starts.get(position, ()))
            moved = _reused([*starts.get(position, ()), *stops.get(position, ())], position)
            if position in starts or position == -1:
                yield position, live - (size[id(moved)] if moved else 0)
            live -= sum(size[id(b)] for b in stops.get(position, ()))


def timeline(graph: Graph, outside: Mapping[Node, tuple[str, Kind]]) -> Timeline:
    """The buffers of a forward or backward graph.

    outside: placeholder -> (name of its storage, kind). An "input" is live throughout; "saved",
    "returned" (saved, and an output of the program too) and "incoming" (tangents) are freed
    after their last reader. Placeholders that it omits (parameters, state) are not counted.
    """
    nodes = tuple(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    values = _Values(graph)
    last = len(nodes) - 1
    readers = values.readers(position)
    buffers = []
    held: dict[str, tuple[Node, Kind, int]] = {}
    for place, (storage, kind) in outside.items():
        stop = last if kind == "input" else max(readers.get(place, [-1]))
        node, _, known = held.get(storage, (place, kind, -1))
        held[storage] = (node, kind, max(stop, known))
    for node, kind, stop in held.values():
        buffers.append(Buffer(node, kind, -1, stop, tensor_bytes(node)))
    calls = sorted(position[n] for n in nodes if is_call(n))
    for node in nodes:
        if node.op == "placeholder" or not values.has_buffer(node):
            continue
        made = position[values.maker(node)]
        stop = max(readers.get(node, [made]))
        kind = "output" if node in values.returned else "temporary"
        if kind == "temporary" and not is_call(values.maker(node)):
            if not values.read_by_call(node) and not _crosses(calls, made, stop):
                continue  # written and read within one kernel
        buffers.append(Buffer(node, kind, made, stop, tensor_bytes(node)))
    for node, workspace, _ in chunked_rows.calls(graph):
        at = position[node]
        buffers.append(Buffer(node, "temporary", at, at, workspace))
    return Timeline(nodes, tuple(buffers))


def is_call(node: Node) -> bool:
    """True for a library call, and for a kernel that is not fused with others."""
    if node.op != "call_function" or is_alias(node) or node.target is getitem:
        return False
    if node.target is aten.scatter.value and operand(node, 0).target in CREATED:
        return False  # a scatter of one number into a constant: Inductor fuses it as a comparison
    return adds_present(node) or any(part in _name(node) for part in CALLS)


def _begins(node: Node, user: Node) -> bool:
    """True for a constant that `user` scatters into: the result of `user` is the same buffer."""
    scatters = any(part in _name(user) for part in ("index_put", "scatter", "index_add"))
    return node.target in CREATED and scatters and user.args[0] is node


def storage_root(node: Node) -> Node:
    """The node that allocated the buffer of `node`, through views and scatters that add."""
    root = root_of_views(node)
    while adds_rows(root):
        into = operand(root, 0)
        while len(into.users) == 1 and is_alias(into):
            into = operand(into, 0)
        if len(into.users) > 1 or into.op != "call_function" or into.target in CREATED:
            break
        root = root_of_views(into)
    return root


def _name(node: Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", None) or getattr(node.target, "__name__", node.target))


def _crosses(calls: list[int], start: int, stop: int) -> bool:
    return bisect_right(calls, start) < bisect_left(calls, stop)


def _reused(live: list[Buffer], position: int) -> Buffer | None:
    """The buffer that a pointwise operation overwrites: of its result's size, last read here."""
    made = [b for b in live if b.start == position and b.node.op == "call_function"]
    if len(made) != 1 or is_call(made[0].node) or made[0].node.target is getitem:
        return None
    dying = (b for b in live if b.stop == position and b.start < position and b.kind in REUSABLE)
    return next((b for b in dying if str(b.bytes) == str(made[0].bytes)), None)


class _Values:
    """Which nodes have a buffer, and which buffers are read through nodes that have none."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.returned = {storage_root(n) for n in graph.output_node().all_input_nodes}
        self._reads: dict[Node, frozenset[Node]] = {}  # of nodes without a buffer
        self._operations: dict[Node, int] = {}
        self._buffers: set[Node] = set()
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr", "call_function") and _tensor(node):
                self._settle(node)

    def maker(self, node: Node) -> Node:
        """The operation that writes the buffer of `node`."""
        return operand(node, 0) if node.target is getitem else node

    def has_buffer(self, node: Node) -> bool:
        return node in self._buffers

    def read_by_call(self, node: Node) -> bool:
        stack, seen = [node], set[Node]()
        while stack:
            for user in stack.pop().users:
                if is_call(user) and not _begins(node, user):
                    return True
                if (
                    user not in seen
                    and storage_root(user) is storage_root(node)
                    and user is not node
                ):
                    seen.add(user)
                    stack.append(user)
        return False

    def _settle(self, node: Node) -> None:
        if is_alias(node) or storage_root(node) is not node:
            return
        if node.op != "call_function":
            self._buffers.add(node)
            return
        operands = [storage_root(n) for n in self.maker(node).all_input_nodes]
        reads = frozenset(r for n in operands for r in self._read(n))
        self._reads[node] = reads
        self._operations[node] = 1 + sum(
            self._operations.get(n, 0) for n in operands if n not in self._buffers
        )
        if self._is_kept(node, reads):
            self._buffers.add(node)

    def _is_kept(self, node: Node, reads: frozenset[Node]) -> bool:
        if node in self.returned or is_call(self.maker(node)) or self.read_by_call(node):
            return True
        if node.target in CREATED:
            return False
        if _name(self.maker(node)) in REDUCTIONS:
            return True
        dear = len(reads) > MANY_READS or self._operations[node] > MANY_OPERATIONS
        return dear and len(node.users) > 1

    def _read(self, node: Node) -> frozenset[Node]:
        if node in self._buffers:
            return frozenset((node,))
        return self._reads.get(node, frozenset())

    def readers(self, position: Mapping[Node, int]) -> dict[Node, list[int]]:
        """Buffer -> positions of the operations that read it."""
        readers: dict[Node, list[int]] = {}
        for node in self.graph.nodes:
            if node.op == "output":
                roots = {storage_root(n) for n in node.all_input_nodes}
            elif is_call(node) or (node in self._buffers and node.op == "call_function"):
                roots = {storage_root(n) for n in self.maker(node).all_input_nodes}
            else:
                continue
            where = position[self.maker(node) if node.op == "call_function" else node]
            for root in roots:
                for read in self._read(root):
                    readers.setdefault(read, []).append(where)
        return readers


def _tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
