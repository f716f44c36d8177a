"""VeLoRA: save one number per sub-token in place of a linear's input.   [approximate]

    before                                 after
    x --> linear --> y                     x --> linear --> y
    |                                      '---> compress(x, v) --> z
    :  (N, D) saved for backward                 :  (N, G) saved, D = G M
    '--> mm(dy^T, x) --> dW                      reconstruct(z, v) --> mm(dy^T, x^) --> dW

Identity: none; x^ = z (x) v is the projection of every sub-token of x onto the unit vector
v. scale * dy^T x^ equals scale * dW if every sub-token is parallel to v. dx and db do not
read x and are exact. Weights that read one tensor (q, k, v; gate, up) share one v and z.
Source: Miles et al. 2024, arXiv:2405.17991, algorithm 1; reference velora/velora.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import GraphModule, Node

from passes.base import Pass, StandsFor, arguments, base_of, call
from passes.joint.compress import chosen_groups, read_instead, rows
from passes.joint.find import WeightGradient
from passes.ops import velora_compress, velora_reconstruct

NAME = "velora"


def compress_saved_inputs(
    vectors: Mapping[int, int], weights: frozenset[int], scale: float = 1.0
) -> Pass:
    """Compress the input of each weight in `vectors`: argument of W -> argument of v.

    `weights`: every argument that is a parameter; a value computed only from them is no activation.
    """

    def rewrite(gm: GraphModule) -> None:
        placeholder = arguments(gm.graph)
        for group in chosen_groups(gm.graph, weights, vectors):
            leader = min(gradient.weight for gradient in group)
            _compress(group, placeholder[vectors[leader]], scale)

    key = (tuple(sorted(vectors.items())), weights, scale)
    identity = "dW = scale dy^T x_hat, x_hat = z (x) v, z[n,g] = <x[n, gM:gM+M], v>"
    name, changes = "compress_saved_inputs", frozenset(vectors)
    return Pass(name, rewrite, exact=False, key=key, identity=identity, changes=changes)


def _compress(group: list[WeightGradient], v: Node, scale: float) -> None:
    first = group[0]
    x = rows(first)  # (N, D)
    z = call(base_of(x), velora_compress, x, v)  # (N, G)
    z.meta["stands_for"] = StandsFor(NAME, first.storage_name, kept=True)
    for gradient in group:
        x_hat = call(gradient.matmul, velora_reconstruct, z, v, gradient.features)  # (N, D)
        read_instead(gradient, x_hat, scale)
