"""Spend part of the time that the fold freed on rerunning matmuls in backward.  [exact]

    before                                    after
    x --> mm(x, Wt) --> y, kept (N, O)        x --> mm(x, Wt) --> y, not kept
    backward reads y                          x (rebuilt) --> mm(x, Wt) --> backward reads y

Identity: none is needed; a function of what backward has anyway may be computed there.
Folding removes 2 N O (D - G) operations per compressed weight, and pushing a projection of rank r
2 N (O D - r (O + D)) per projected one. Rerunning y = x W^T costs
2 N O D and frees its N O numbers, so the kept outputs with the shortest inner dimension
go first, as long as the budget lasts. Only outputs whose operands backward can rebuild
without another matmul, or has, are chosen. Reads the graph only; the choice is carried
out by the partitioner. Source: the knapsack of torch's activation_memory_budget, with
the freed operations as the budget in place of a memory target.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any

from torch.fx import Node

from passes.base import aten, storage_of, tensor_bytes
from passes.joint.find import WeightGradient
from passes.split.saved import Kept

MATMULS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2), aten.bmm.default: (0, 1)}


def freed_operations(gradient: WeightGradient, subtoken_size: int) -> Any:
    """Multiply-adds, times two, that folding this gradient removes."""
    groups = -(-gradient.features // subtoken_size)
    rows, out = _rows_and_outputs(gradient)
    return 2 * rows * out * (gradient.features - groups)


def pushed_operations(gradient: WeightGradient, rank: int) -> Any:
    """Those that projecting an operand to this rank removes; none where it adds some."""
    features = gradient.features
    rows, out = _rows_and_outputs(gradient)
    return 2 * rows * max(0, out * features - rank * (out + features))


def _rows_and_outputs(gradient: WeightGradient) -> tuple[Any, int]:
    value, x = gradient.matmul.meta["val"], gradient.operand.meta["val"]
    return x.numel() // gradient.features, value.numel() // gradient.features


def operations(matmul: Node) -> Any:
    """Multiply-adds, times two, of one matmul node."""
    left = matmul.args[MATMULS[matmul.target][0]].meta["val"]  # type: ignore[index,union-attr]
    return 2 * matmul.meta["val"].numel() * left.shape[-1]


def choose_reruns(
    kept: Kept,
    everything: Iterable[Node],
    budget: float,
    is_free: Callable[[Node], bool],
    is_costly: Callable[[Node], bool],
    hint: Callable[[Any], int],
) -> list[Node]:
    """Kept matmul outputs to rerun, cheapest per byte first, within `budget` operations.

    A linear is rerun in all layers of its kind or in none: never where the split keeps
    its output in fewer than half of them.
    """
    names = {node.name for node in kept.storages}
    chosen: list[Node] = []
    layers = Counter(_role(n) for n in everything if n.target in MATMULS)
    offers = [
        node
        for node in kept.storages
        if node.target in MATMULS
        and "recompute" not in node.meta
        and all(_rebuildable(n, names, is_free, is_costly) for n in node.all_input_nodes)
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
    """The same for the same linear of every layer.

    Layers are treated alike, all or none: layers that differ share no generated kernels,
    and compile time would grow with the number of kinds.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = next(reversed(stack.values()))[0]
    return re.sub(r"\d+", "*", str(path)), str(node.meta["val"].shape)


def _rebuildable(
    node: Node,
    kept: Collection[str],
    is_free: Callable[[Node], bool],
    is_costly: Callable[[Node], bool],
) -> bool:
    """Whether backward can have this value from what it keeps, with no matmul on the way."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen or storage_of(current).name in kept or is_free(current):
            continue
        seen.add(current)
        if current.op == "placeholder" or is_costly(current) or current.target in MATMULS:
            return False
        stack += current.all_input_nodes
    return True
