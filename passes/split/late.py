"""Recompute as late as the first reader allows.  [exact]

    before                         after
    a = recompute(saved)           d = backward(dy)
    d = backward(dy)               a = recompute(saved)
    dx = mul(d, a)                 dx = mul(d, a)

Identity: none is needed; the same operations in another topological order.
A recomputation depends on no tangent, so it may run at any time, and its result is live from
there to its last reader. torch places each before its first reader when it partitions; a later
edit (`passes.split.sums`) can remove that reader: the input of the first layer would then be
live through the backward of all others. Source: design.
"""

from __future__ import annotations

import operator
from itertools import pairwise

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from passes.base import backward_nodes


def recompute_late(backward: Graph) -> list[str]:
    """Move each recomputation right before its first reader; returns the names of the moved."""
    nodes = list(backward.nodes)
    if any(_writes(node) for node in nodes):
        return []  # a read must not cross a write
    place = {node: index for index, node in enumerate(nodes)}
    dependent = backward_nodes(backward)
    turn = dict(place)
    for node in reversed(nodes):
        if node not in dependent and node.users and _is_pure(node):
            turn[node] = min(turn[reader] for reader in node.users)
    ordered = sorted(nodes, key=lambda node: (turn[node], place[node]))
    for before, node in pairwise(ordered):
        before.append(node)
    return [node.name for index, node in enumerate(ordered) if index > place[node]]


def _writes(node: Node) -> bool:
    """True for an operation that writes to an operand."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _is_pure(node: Node) -> bool:
    known = isinstance(node.target, OpOverload) or node.target is operator.getitem
    return known and not is_random(node)


def is_random(node: Node) -> bool:
    """True for an operation that draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
