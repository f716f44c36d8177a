"""What a pass is, and the graph functions that all passes use.

A pass edits one functional joint graph (forward and backward in one `fx.Graph`).
Before the first pass, the caller records in `meta` what passes need to know of the trace:

    placeholder.meta["argument"]    position of this input among the program's arguments
    placeholder.meta["tangent"]     True on tangents (the gradients of the program's outputs)
    placeholder.meta["output"]      of a tangent: the output it is the gradient of; else None
    output.meta["gradient_of"]      per output: the argument it is the gradient of, or None

Every pass keeps these invariants: the graph is functional; every node has a correct
`meta["val"]`; no output aliases what it did not alias before; a pass that matches
nothing changes nothing; a pass is idempotent.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from passes.ops import add_present

aten = torch.ops.aten
IN_PLACE = (
    torch.ops.higher_order.auto_functionalized
)  # (op, **operands): (result, what it wrote...)

OTHER_VALUES = {  # views that change values, or do not hold each value of the storage once
    aten.as_strided.default,
    aten._conj.default,
    aten._neg_view.default,
}
CONVERT = torch.ops.prims.convert_element_type.default  # what Inductor fuses
CASTS = {aten._to_copy.default, CONVERT}
PROVENANCE = (
    "nn_module_stack",
    "fwd_nn_module_stack",
    "seq_nr",
    "stack_trace",
    "partitioner_tag",
    "custom",
    "recompute",
    "ac_graph_id",
    "stands_for",  # a StandsFor
)


@dataclass(frozen=True)
class StandsFor:
    """The mark on every node of a compression: its method, and the activation it replaces.

    kept: True on a node that may be saved for backward, False on intermediate values.
    """

    method: str
    storage: str  # the name of the activation's node, its `base_of`
    kept: bool = False


@dataclass(frozen=True)
class Pass:
    """One named rewrite of a graph; equality compares all but rewrite and identity."""

    name: str
    rewrite: Callable[[GraphModule], None] = field(compare=False, repr=False)
    exact: bool  # True: the same function over the real numbers; False: gradients change
    key: tuple[Hashable, ...] = ()  # the configuration it was built with
    identity: str = field(default="", compare=False)  # why it is legal, in one line
    drops: bool = False  # an output may become None where another one replaces it
    changes: frozenset[int] | None = None  # arguments whose gradients may change; None: all


def copy_graph(graph: Graph) -> Graph:
    """A copy of a graph: the same node names, and a shallow copy of each node's `meta`."""
    copied, nodes = Graph(), dict[Node, Node]()
    result = copied.graph_copy(graph, nodes, return_output_node=True)
    assert isinstance(result, tuple)  # a traced graph always has an output
    values, old_output = result
    output = copied.output(values, type_expr=old_output.type)
    output.meta = dict(old_output.meta)
    copied._codegen = graph._codegen
    return copied


def arguments(graph: Graph) -> dict[int, Node]:
    """Argument position -> placeholder; tangents are not arguments."""
    return {
        node.meta["argument"]: node
        for node in graph.find_nodes(op="placeholder")
        if node.meta.get("argument") is not None
    }


def backward_nodes(graph: Graph) -> set[Node]:
    """Every node that depends on a tangent."""
    return reached_from(
        graph, (n for n in graph.find_nodes(op="placeholder") if n.meta.get("tangent"))
    )


def batch_nodes(graph: Graph, weights: Iterable[int]) -> set[Node]:
    """Every node that depends on an argument other than `weights`."""
    fixed = set(weights)
    return reached_from(
        graph, (n for position, n in arguments(graph).items() if position not in fixed)
    )


def reached_from(graph: Graph, start: Iterable[Node]) -> set[Node]:
    reached = set(start)
    for node in graph.nodes:
        if any(operand in reached for operand in node.all_input_nodes):
            reached.add(node)
    return reached


def operand(node: Node, index: int) -> Node:
    """`node.args[index]`, which must be a node."""
    value = node.args[index]
    assert isinstance(value, Node), f"{node.name} has {value!r} where a node was expected"
    return value


def is_alias(node: Node) -> bool:
    """True where the value shares its operand's storage: a view or a slice of it."""
    target = node.target
    return target is aten._unsafe_view.default or getattr(target, "is_view", False)


def is_view(node: Node) -> bool:
    """True for a view that holds every value of its operand exactly once."""
    if not is_alias(node) or node.target in OTHER_VALUES:
        return False
    value, source = node.meta.get("val"), operand(node, 0).meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(source, torch.Tensor):
        return False
    return value.dtype == source.dtype and str(value.numel()) == str(source.numel())


def base_of(node: Node) -> Node:
    """`node` without its views, as long as each holds every value exactly once."""
    while is_view(node):
        node = operand(node, 0)
    return node


def stands_for(node: Node) -> StandsFor | None:
    """The mark of a node that may be saved for backward in place of an activation, or None."""
    mark: StandsFor | None = node.meta.get("stands_for")
    return mark if mark is not None and mark.kept else None


def storage_root(node: Node) -> Node:
    """The node that allocated the storage of `node`, through views, slices and writes in place."""
    while True:
        source = operand(node, 0) if node.target is getitem else node
        if is_alias(node) or is_alias(source):
            node = operand(node, 0)
        elif source is not node and adds_present(source):
            node = source.kwargs["g"]  # type: ignore[assignment]
        else:
            return node


def adds_present(node: Node) -> bool:
    """True for g <- g + t, which is skipped where the storage of t is empty."""
    return node.target is IN_PLACE and node.args[0] is add_present


def is_transpose(node: Node) -> bool:
    """True for the transpose of a matrix."""
    return node.target is aten.t.default or (
        node.target is aten.permute.default and list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
    )


def value_key(node: Node) -> Hashable:
    """Equal for nodes that hold equal values: one base under the same views and casts.

    Legal because storage, shape, strides and offset determine a view. Needed because q, k and v
    each have their own view of one input until common subexpressions are eliminated.
    """
    base, value = base_of(node), node.meta["val"]
    geometry = (str(value.shape), str(value.stride()), str(value.storage_offset()))
    if base.target in CASTS:
        return (value_key(operand(base, 0)), str(value.dtype), geometry)
    return (base, geometry)


def call(like: Node, target: Any, *args: Any, shaped: Callable[..., Any] | None = None) -> Node:
    """A new node right after its last operand, with the provenance of `like`.

    `shaped` computes the fake value in place of `target`, where that would guard a dynamic size.
    """
    graph = like.graph
    operands: list[Node] = []
    torch.fx.node.map_arg(args, operands.append)
    after = max(operands)
    while after.op == "placeholder" and after.next.op == "placeholder":
        after = after.next
    with graph.inserting_after(after):
        node = graph.call_function(target, args)
    values = [n.meta["val"] for n in operands]
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), nullcontext())
    with mode, torch.no_grad():
        infer = shaped or target
        node.meta["val"] = infer(*torch.fx.node.map_arg(args, lambda n: n.meta["val"]))
    _inherit(node, like)
    return node


def insert(before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new node right before another one: for graphs with writes, whose order matters."""
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    values = [n.meta["val"] for n in node.all_input_nodes]
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), nullcontext())
    with mode, torch.no_grad():
        read = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*read[0], **read[1])
    _inherit(node, before)
    return node


def _inherit(node: Node, like: Node) -> None:
    node.meta.update({key: like.meta[key] for key in PROVENANCE if key in like.meta})
    if "stands_for" in node.meta:
        node.meta["stands_for"] = replace(node.meta["stands_for"], kept=False)


def widened(before: Node, node: Node) -> Node:
    """`node` in float32 if it is bfloat16 or float16, as torch's fused optimizers compute."""
    low = node.meta["val"].dtype in (torch.bfloat16, torch.float16)
    return insert(before, CONVERT, node, torch.float32) if low else node


def size(like: Node, node: Node, dim: int) -> int | Node:
    """A size as an operand: an int, or a `sym_size` node under dynamic shapes.

    Never -1: inferring a dynamic size would guard it, and recompile for every other size.
    """
    known = fixed(node.meta["val"].shape[dim])
    return call(like, aten.sym_size.int, node, dim) if known is None else known


def fixed(length: int | torch.SymInt) -> int | None:
    """A static size, or None for a dynamic one; installs no guard."""
    return length if isinstance(length, int) else length.node.maybe_as_int()


def tensor_bytes(node: Node) -> Any:
    """Bytes of a node's value; symbolic under dynamic shapes."""
    value = node.meta["val"]
    return value.numel() * value.element_size()
