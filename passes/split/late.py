"""Recompute late what backward recomputes.  [exact]

    before                         after
    a = recompute(kept)            d = backward(dy)
    d = backward(dy)               a = recompute(kept)
    dx = mul(d, a)                 dx = mul(d, a)

Identity: none is needed; the same operations, in another order that the data allows.
A recomputation depends on no incoming gradient, so it could run at any time, and its result lives
from there to its reader. torch puts each in front of its reader when it splits a graph; an edit
after that (passes/sums.py) can take away the reader for whose sake it came so early: the input of
the first layer then lives through the backward of all others.
"""

from __future__ import annotations

import operator
from itertools import pairwise

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from passes.base import backward_nodes


def recompute_late(backward: Graph) -> list[str]:
    """Move each recomputation in front of its first reader; returns the names of those moved."""
    nodes = list(backward.nodes)
    if any(_writes(node) for node in nodes):
        return []  # what is read after a write must not be read before it
    place = {node: index for index, node in enumerate(nodes)}
    behind = backward_nodes(backward)
    turn = dict(place)
    for node in reversed(nodes):
        if node not in behind and node.users and _is_pure(node):
            turn[node] = min(turn[reader] for reader in node.users)
    ordered = sorted(nodes, key=lambda node: (turn[node], place[node]))
    for before, node in pairwise(ordered):
        before.append(node)
    return [node.name for index, node in enumerate(ordered) if index > place[node]]


def _writes(node: Node) -> bool:
    """True where an operation writes what it is handed, other than a value made for that."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _is_pure(node: Node) -> bool:
    known = isinstance(node.target, OpOverload) or node.target is operator.getitem
    return known and not is_random(node)


def is_random(node: Node) -> bool:
    """True where each run draws other numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
