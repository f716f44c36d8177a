"""Run passes: snapshot, rewrite, eliminate dead code, check, recompile, time."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from passes import chunked_loss
from passes.base import Pass, aten, copy_graph, operand
from passes.joint.find import is_chunked
from passes.ops import port_attach


@dataclass(frozen=True)
class Step:
    """What one pass did to a graph."""

    name: str
    exact: bool
    seconds: float
    inserted: int
    removed: int
    identity: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run(
    gm: GraphModule, passes: Sequence[Pass], after: Callable[[Pass, Graph], None] | None = None
) -> list[Step]:
    """Run the passes in order; on any error restore the graph and raise.

    `after` is called with the graph after each pass.
    """
    if not passes:
        return []
    before = copy_graph(gm.graph)
    try:
        steps = []
        for one in passes:
            steps.append(_run_one(gm, one))
            if after is not None:
                after(one, gm.graph)
        gm.recompile()
        return steps
    except Exception:
        gm.graph = before
        raise


def _run_one(gm: GraphModule, one: Pass) -> Step:
    start, old, outputs = time.perf_counter(), {n.name for n in gm.graph.nodes}, _outputs(gm.graph)
    before = None if one.changes is None else _computed(gm.graph)
    one.rewrite(gm)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    _check(gm.graph, old, outputs, one)
    if before is not None:
        _check_others(before, _computed(gm.graph), gm.graph, one)
    new = {n.name for n in gm.graph.nodes}
    elapsed = time.perf_counter() - start
    return Step(one.name, one.exact, elapsed, len(new - old), len(old - new), one.identity)


def _outputs(graph: Graph) -> list[tuple[Any, Any] | None]:
    returned: Any = graph.output_node().args[0] or ()
    return [
        (str(n.meta["val"].shape), n.meta["val"].dtype)  # as text: comparing would guard
        if isinstance(n, Node) and hasattr(n.meta.get("val"), "dtype")
        else None
        for n in returned
    ]


def _check(graph: Graph, old: set[str], outputs: list[tuple[Any, Any] | None], one: Pass) -> None:
    found = _outputs(graph)
    if one.drops:
        found = [old if new is None else new for new, old in zip(found, outputs, strict=True)]
    if found != outputs:
        raise AssertionError(f"pass {one.name} changed the shape or dtype of an output")
    for node in graph.nodes:
        if node.name not in old and "val" not in node.meta:
            raise AssertionError(f"pass {one.name} left {node.name} without a value")


def _computed(graph: Graph) -> list[Any]:
    """Per output, a hash of the operations that compute it; clone and attach count as none.

    Of the results of a chunked loss, dw alone depends on x and p.
    """
    known: dict[Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = hash(node.name)
        elif node.target in (aten.clone.default, port_attach):
            known[node] = known[operand(node, 0)]
        elif node.target is operator.getitem and operand(node, 0).target is chunked_loss.op:
            alone = {} if is_chunked(node) else {"x": None, "p": None}
            read: Any = chunked_loss.arguments_with(operand(node, 0), **alone)
            known[node] = hash((node.args[1], str(map_arg(read, lambda n: known[n]))))
        else:
            read = map_arg((node.args, node.kwargs), lambda n: known[n])
            known[node] = hash((str(node.target), str(read)))
    returned: Any = graph.output_node().args[0] or ()
    return [known[n] if isinstance(n, Node) else n for n in returned]


def _check_others(before: list[Any], after: list[Any], graph: Graph, one: Pass) -> None:
    """Raise AssertionError where an output changed that is no gradient in `one.changes`."""
    gradient_of = graph.output_node().meta["gradient_of"]
    for old, new, weight in zip(before, after, gradient_of, strict=True):
        if old != new and (weight is None or weight not in (one.changes or ())):
            what = "an output" if weight is None else f"the gradient of argument {weight}"
            raise AssertionError(f"pass {one.name} changed {what}, which was to stay exact")
