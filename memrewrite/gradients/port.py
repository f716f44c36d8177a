"""Ports: return the small gradient of a weight from a compiled backward.

A port is an input of zeros whose gradient is the small one: A (O, G) of VeLoRA, R (r, D) or
(O, r) of GaLore. `Port` makes it from the weight, outside the graph, and its backward turns A or
R into a ProjectedGrad, the gradient of the weight that autograd accumulates. So hooks on the
weight fire, `torch.autograd.grad` returns it, and a weight that is not reached gets None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from memrewrite.errors import UnsupportedError
from memrewrite.gradients.basis import Basis
from memrewrite.gradients.gradient import ProjectedGrad
from passes.ops import port_attach

_zeros: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class Port(torch.autograd.Function):
    """(weight (O, D), its basis, name) -> zeros of the shape of the coordinates.

    Backward returns the ProjectedGrad.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, basis: Basis, name: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.basis, ctx.shape, ctx.name = basis, weight.shape, name
        return zeros(weight, *basis.small(weight.shape))

    @staticmethod
    def backward(ctx: Any, a: Tensor | None) -> Any:
        if a is None:  # the graph returned the full gradient after all
            return None, None, None
        if torch.is_grad_enabled():
            raise UnsupportedError(
                f"the gradient of {ctx.name} {tuple(ctx.shape)} is to be differentiated "
                "(create_graph=True), which is not possible in coordinates; pass "
                "gradients='dense' to memrewrite.VeLoRA or GaLore, or leave the weight out of sites"
            )
        return ProjectedGrad(a, ctx.basis, ctx.shape), None, None


def zeros(like: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros that are never written, so that all ports of a device share one storage."""
    if type(like) not in (Tensor, nn.Parameter):  # a fake tensor
        return like.new_zeros(rows, columns)
    key = like.device, like.dtype
    known = _zeros.get(key)
    if known is None or known.numel() < rows * columns:
        known = _zeros[key] = torch.zeros(rows * columns, device=like.device, dtype=like.dtype)
    return known[: rows * columns].view(rows, columns)


def attach_ports(gm: GraphModule, ports: Sequence[Node]) -> None:
    """Make a trained output of Dynamo's graph depend on the ports."""
    output = gm.graph.output_node()
    y = trained_outputs(gm)[0]
    with gm.graph.inserting_before(output):
        attached = gm.graph.call_function(port_attach, (y, list(ports)))
    attached.meta["example_value"] = y.meta["example_value"]
    returned: Any = output.args[0]
    output.args = (tuple(attached if n is y else n for n in returned),)


def trained_outputs(gm: GraphModule) -> list[Node]:
    """The outputs of Dynamo's graph that require gradients; a scalar loss, if any, first."""
    returned: Any = gm.graph.output_node().args[0]
    found = [n for n in returned if isinstance(n, Node) and _is_trained(n)]
    return sorted(found, key=lambda n: int(n.meta["example_value"].ndim))


def _is_trained(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.requires_grad and value.is_floating_point()
