"""Choose matmul outputs to recompute in backward, within a budget of operations.  (reads only)

    before                                    after
    x --> mm(x, Wt) --> y, saved (N, O)       x --> mm(x, Wt) --> y, not saved
    backward reads y                          x (recomputed) --> mm(x, Wt) --> backward reads y

Identity: none is needed; backward may recompute any function of what is saved.
The budget is a share of what other passes save: folding saves 2 N O (D - G) operations per
compressed weight, pushing a projection of rank r 2 N (O D - r (O + D)) per projected weight. A
graph whose loss is in chunks may also spend a share of all of its operations.
Recomputing y = x W^T costs 2 N O D operations and frees its N O values, so the saved outputs
with the shortest inner dimension come first. Only outputs whose operands are saved, or can be
recomputed without another matmul, are chosen. The partitioner carries the choice out.
Source: the knapsack of torch's activation_memory_budget, with a budget of operations in place
of memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any

from torch.fx import Graph, Node

from passes import chunked_rows
from passes.base import aten, base_of, tensor_bytes
from passes.joint.find import WeightGradient
from passes.split.saved import Kept

MATMULS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2), aten.bmm.default: (0, 1)}


def freed_operations(gradient: WeightGradient, subtoken_size: int) -> Any:
    """Operations (a multiply-add is two) that folding this gradient saves."""
    groups = -(-gradient.features // subtoken_size)
    rows, out = _rows_and_outputs(gradient)
    return 2 * rows * out * (gradient.features - groups)


def pushed_operations(gradient: WeightGradient, rank: int) -> Any:
    """Operations that pushing a projection of this rank saves; 0 where it would add some."""
    features = gradient.features
    rows, out = _rows_and_outputs(gradient)
    return 2 * rows * max(0, out * features - rank * (out + features))


def _rows_and_outputs(gradient: WeightGradient) -> tuple[Any, int]:
    value, x = gradient.matmul.meta["val"], gradient.operand.meta["val"]
    return x.numel() // gradient.features, value.numel() // gradient.features


def operations(matmul: Node) -> Any:
    """Operations (a multiply-add is two) of one matmul node."""
    left = matmul.args[MATMULS[matmul.target][0]].meta["val"]  # type: ignore[index,union-attr]
    return 2 * matmul.meta["val"].numel() * left.shape[-1]


def all_operations(joint: Graph) -> Any:
    """Operations of all matmuls of a joint graph, including those of a loss in chunks."""
    matmuls = sum(operations(n) for n in joint.nodes if n.target in MATMULS)
    return matmuls + sum(operations for _, _, operations in chunked_rows.calls(joint))


def choose_recomputes(
    kept: Kept,
    everything: Iterable[Node],
    budget: float,
    is_free: Callable[[Node], bool],
    is_costly: Callable[[Node], bool],
    hint: Callable[[Any], int],
) -> list[Node]:
    """Saved matmul outputs to recompute, cheapest per byte first, within `budget` operations.

    A linear is recomputed in all layers of a kind or in none, and never where its output is
    saved in fewer than half of them.
    """
    names = {node.name for node in kept.storages}
    chosen: list[Node] = []
    layers = Counter(_role(n) for n in everything if n.target in MATMULS)
    offers = [
        node
        for node in kept.storages
        if node.target in MATMULS
        and "recompute" not in node.meta
        and all(_recomputable(n, names, is_free, is_costly) for n in node.all_input_nodes)
    ]
    size = {node: max(hint(tensor_bytes(node)), 1) for node in offers}
    offers.sort(key=lambda n: (hint(operations(n)) / size[n], -size[n]))
    roles: dict[Hashable, list[Node]] = {}
    for node in offers:
        roles.setdefault(_role(node), []).append(node)
    for role, nodes in roles.items():
        cost = sum(hint(operations(node)) for node in nodes)
        if cost <= budget and 2 * len(nodes) >= layers[role]:
            budget -= cost
            chosen += nodes
    return chosen


def _role(node: Node) -> Hashable:
    """Equal for the same linear of every layer.

    Layers are treated alike because layers that differ share no generated kernels: compile
    time would grow with the number of kinds.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = next(reversed(stack.values()))[0]
    return re.sub(r"\d+", "*", str(path)), str(node.meta["val"].shape)


def _recomputable(
    node: Node,
    kept: Collection[str],
    is_free: Callable[[Node], bool],
    is_costly: Callable[[Node], bool],
) -> bool:
    """Whether backward can compute this value from saved ones without a matmul."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen or base_of(current).name in kept or is_free(current):
            continue
        seen.add(current)
        if current.op == "placeholder" or is_costly(current) or current.target in MATMULS:
            return False
        stack += current.all_input_nodes
    return True
