"""Adam over coordinates: the update of a weight whose gradient is A (x) v.

State of such a weight, plain tensors in `optimizer.state[p]`:

    step ()   exp_avg, exp_avg_sq (O, G)   [max_exp_avg_sq (O, G)]   vector (M,)

with G = D / M rounded up; moments of a weight (D, O) are (G, O).

The values are those of torch's Adam on the full gradient (`passes.update.factor`). Where the next
update cannot be factored (a dense gradient, another v, an L2 decay), the state is expanded to
equal full-size moments, and torch's Adam continues. The vector, stored in the format of
`packing.pack`, is only compared: updates read the v of their gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from memrewrite.gradients.basis import Vector, small_shape, spread
from memrewrite.gradients.gradient import ProjectedGrad
from memrewrite.gradients.packing import VECTOR, pack, unpack
from memrewrite.moments.optimizers import ADAMW, Flags, Row
from memrewrite.moments.update import EXAMPLE, W, add_input, rows_of, wide
from passes.base import Pass
from passes.lower import lower_ir_ops
from passes.update.factor import SQUARE, V, factor_updates

MOMENTS = {"exp_avg": V, "exp_avg_sq": SQUARE, "max_exp_avg_sq": SQUARE}
FULL_SIZE = "its optimizer state is full-size already"


@dataclass(frozen=True)
class FactoredKind:
    """Everything that identifies a factored update; see `moments.update.Kind`.

    Where M divides D, W is viewed as rows of M channels: all such weights share one update
    with a dynamic number of rows, and `shape` is an example.
    """

    shape: tuple[int, int]  # of W: (O, D), or rows of (M,); (D, O) if left
    dynamic: bool
    dtype: torch.dtype
    device: torch.device
    size: int  # M
    amsgrad: bool
    maximize: bool
    decays: bool
    decoupled: bool = True
    left: bool = False

    @property
    def flags(self) -> Flags:
        return Flags(self.amsgrad, self.maximize, self.decays, self.decoupled)

    @property
    def row(self) -> Row:
        return ADAMW

    def zeros(self, weight: Tensor) -> dict[str, Tensor]:
        """The moments, (O, G); the vector comes from a gradient, see `initialise`."""
        shape = small_shape(weight.shape, self.size, self.left)
        how: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        return {name: torch.zeros(shape, **how) for name in self.row.moments_of(self.flags)}

    def rewrite(self, gm: GraphModule) -> list[Pass]:
        """The factoring passes; v (M,) becomes an input after `step`."""
        at = add_input(gm, "vector", (self.size,), wide(self.dtype))
        held = {1: V}  # argument positions: 1 is the gradient, the moments follow
        held |= {2 + i: MOMENTS[n] for i, n in enumerate(self.row.moments_of(self.flags))}
        factor = factor_updates(W, at, held, self.left)
        return [*self.row.inputs, *self.row.lowering, factor, lower_ir_ops()]


def kind_of(parameter: nn.Parameter, basis: Vector, group: dict[str, Any]) -> FactoredKind:
    """The kind of update of a parameter in its group."""
    flags = group["amsgrad"], group["maximize"], group["weight_decay"] != 0
    rows, columns, size = *parameter.shape, len(basis.v)
    dynamic = columns % size == 0 and parameter.is_contiguous() and not basis.left
    shape = (EXAMPLE, size) if dynamic else (rows, columns)
    described = shape, dynamic, parameter.dtype, parameter.device, size, *flags
    return FactoredKind(*described, left=basis.left)


def obstacle(parameter: nn.Parameter, group: dict[str, Any], state: dict[str, Any]) -> str | None:
    """Why the next update of a parameter cannot be factored, ignoring its v; None if it can."""
    gradient = parameter.grad
    if not isinstance(gradient, ProjectedGrad) or gradient.is_dense:
        return "its gradient is dense"
    if not isinstance(gradient.basis, Vector):
        return "its gradient is a projection"
    if group["weight_decay"] != 0 and not group["decoupled_weight_decay"]:
        return "an L2 decay is no multiple of v: use AdamW, or weight_decay=0"
    if group["differentiable"]:
        return "differentiable=True needs the full update"
    if state and VECTOR not in state:
        return FULL_SIZE
    return None


def initialise(kind: FactoredKind, gradient: ProjectedGrad, capturable: bool) -> dict[str, Any]:
    """The state before the first step."""
    assert gradient.coordinates is not None
    device = kind.device if capturable else torch.device("cpu")
    v = pack(_vector(gradient).detach(), gradient.dtype).clone()
    return {"step": torch.zeros((), device=device), **kind.zeros(gradient), VECTOR: v}


def moments(kind: FactoredKind) -> list[str]:
    """Names of the moments in the state."""
    return kind.row.moments_of(kind.flags)


def agrees(state: dict[str, Any], v: Tensor) -> bool:
    """Whether the moments of a factored state are along v (M,)."""
    held: Tensor = state[VECTOR]
    if (
        held.ndim == 1 and held.dtype != v.dtype
    ):  # saved before vectors were packed, then cast by load_state_dict
        return torch.equal(held, v.to(held.dtype))
    return torch.equal(unpack(held, v.dtype), v)


def is_untouched(state: dict[str, Any]) -> bool:
    """Whether every moment is zero, and so along any v."""
    return not any(bool(state[name].any()) for name in MOMENTS if name in state)


def turn(state: dict[str, Any], parameter: nn.Parameter) -> None:
    """Replace the v of a state whose moments are zero by that of the gradient."""
    gradient: Any = parameter.grad
    state[VECTOR] = pack(_vector(gradient).detach(), gradient.dtype).clone()


def inputs(parameter: nn.Parameter, state: dict[str, Any], kind: FactoredKind) -> list[Tensor]:
    """The inputs of a compiled update: W, A, m, s, (the maximum of s,) v."""
    gradient = parameter.grad
    assert isinstance(gradient, ProjectedGrad) and gradient.coordinates is not None
    small = [gradient.coordinates.contiguous(), *(state[name] for name in moments(kind))]
    weight = parameter.detach()
    if kind.dynamic:
        weight, small = rows_of(weight, kind.size), [rows_of(t, 1) for t in small]
    return [weight, *small, _vector(gradient)]


def _vector(gradient: ProjectedGrad) -> Tensor:
    assert isinstance(gradient.basis, Vector)  # `obstacle` has checked it
    return gradient.basis.v


def spread_state(state: dict[str, Any], parameter: nn.Parameter, group: dict[str, Any]) -> None:
    """Replace factored state by the equal full-size state."""
    v = unpack(state.pop(VECTOR), wide(parameter.dtype))
    for name, basis in MOMENTS.items():
        if name in state:
            w = v * v if basis == SQUARE else v
            left = state[name].shape[0] != parameter.shape[0]  # alike only where M is 1, v too
            state[name] = spread(state[name], w, parameter.shape, left)
    if group["fused"] or group["capturable"]:
        state["step"] = state["step"].to(parameter.device)
