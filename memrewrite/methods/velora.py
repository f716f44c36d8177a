"""VeLoRA: one number per sub-token of M channels in place of a linear's input.  [approximate]

    z[n, g] = <x[n, gM : gM+M], v>       x^ = z (x) v       dW = scale dy^T x^ = (dy^T z) (x) v

Folding makes the weight gradient's matmul M times narrower, and backward returns A = dy^T z in
place of dW where dW has no other term. See `passes.joint.velora`, `fold` and `port`.
Source: Miles et al. 2024, arXiv:2405.17991.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from memrewrite.calibration import observe
from memrewrite.gradients.basis import small_shape
from memrewrite.gradients.packing import packed_bytes
from memrewrite.methods.method import Ask, Chosen, Context, Method, Placed, Task
from memrewrite.methods.vectors import Vectors
from memrewrite.sites.options import VeLoRA
from memrewrite.sites.select import select, why_exact
from memrewrite.sites.weights import Site, Weight
from passes.base import Pass
from passes.joint.find import WeightGradient
from passes.joint.fold import fold_reconstruction
from passes.joint.port import Ported, factored_gradients, return_coordinates
from passes.joint.velora import compress_saved_inputs
from passes.split.recompute import freed_operations


@dataclass(frozen=True)
class SubTokens(Method):
    """The method of memrewrite.VeLoRA."""

    options: VeLoRA
    name = "velora"
    symbol = "v"
    kept = "z"
    gain = "the folded matmul saves time"
    factors = True
    remedy = "memrewrite.VeLoRA(sites=[...])"

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.name, self.options.scale)

    @property
    def small(self) -> bool:  # type: ignore[override]
        return not self.options.full_gradients

    @property
    def narrows(self) -> bool:  # type: ignore[override]
        return self.options.init != "running_mean"  # which reads the head's input in Dynamo's graph

    def select(self, found: Sequence[Weight]) -> set[str]:
        return select(list(found), self.options.sites)

    def why_not(self, weight: Weight) -> str | None:
        size = self.options.subtoken_size
        if (reason := why_exact(weight)) is not None:
            return reason
        if size == 1:
            return "too small to gain anything: one number per channel"
        if weight.features < size:
            return (
                f"too small to gain anything: {weight.features} input features, "
                f"sub-token size {size}"
            )
        return None

    def choose(self, model: nn.Module, found: Sequence[Weight]) -> Chosen:
        chosen = self.select(found)
        taken: Chosen = {}
        for weight in found:
            if weight.name in chosen and self.why_not(weight) is None:
                taken.setdefault(weight.parameter, Site(weight, weight.kind == "conv1d"))
        return taken

    def ask(self, position: int, site: Site, state: Any, form: bool | None = None) -> Ask:
        like, size = site.weight.parameter, (self.options.subtoken_size,)
        port = self.small_gradient(site.weight)
        return Ask(position, wide(like.dtype), like.device, like.dtype, size, port, site.left)

    def returns_small(self, site: Site) -> bool:
        return self.small_gradient(site.weight) is not None

    def without_port(self, ask: Ask) -> Ask | None:
        return replace(ask, port=None)

    def small_gradient(self, weight: Weight) -> tuple[int, int] | None:
        """The shape of a selected weight's small gradient; None for the full gradient."""
        parameter = weight.parameter
        wrapper = hasattr(parameter, "__tensor_flatten__")  # a DTensor, a quantised weight
        if self.options.full_gradients or weight.kind not in ("linear", "conv1d") or wrapper:
            return None
        return small_shape(parameter.shape, self.options.subtoken_size, weight.kind == "conv1d")

    def passes(self, task: Task, context: Context) -> list[Pass]:
        placed = task.placed()
        vectors = {p.weight: p.basis for p in placed if p.basis is not None}
        ports = [Ported(p.weight, p.port, p.ask.left) for p in placed if p.port is not None]
        return [
            compress_saved_inputs(vectors, context.weights, self.options.scale),
            fold_reconstruction(),
            *([return_coordinates(tuple(ports))] if ports else []),
        ]

    def freed(self, gradient: WeightGradient, placed: Placed) -> Any:
        return freed_operations(gradient, self.options.subtoken_size)

    def whole(self, graph: Graph, weights: Sequence[int]) -> list[int]:
        return factored_gradients(graph, weights)

    def observe(
        self, gm: GraphModule, asks: Sequence[Ask]
    ) -> tuple[GraphModule, int, list[int]] | None:
        if self.options.init != "running_mean":
            return None
        sizes = {ask.position: self.options.subtoken_size for ask in asks}
        return observe.observe_inputs(gm, sizes)

    def state(self, model: weakref.ref[nn.Module]) -> Vectors:
        return Vectors(model, self.options)

    def small_bytes(self, site: Site) -> int:
        shape = self.small_gradient(site.weight)
        parameter = site.weight.parameter
        return math.prod(shape) * parameter.element_size() if shape else parameter.nbytes

    def basis_bytes(self, site: Site) -> int:
        return packed_bytes(self.options.subtoken_size, site.weight.parameter.dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of v for a weight of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
