"""The weights of a model, each identified by its name and its module.

The name is that of the module for the `weight` of a linear, Conv1D, embedding or convolution,
and that of the parameter for any other one of two dimensions or more (nn.MultiheadAttention's
packed projection, a hand-written `x @ self.w`, a stack of experts). It is used everywhere; a
captured graph resolves it once to an argument position (`session.graph`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

Kind = Literal["linear", "conv1d", "raw", "stack", "embedding", "convolution"]
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
ONE_DIMENSIONAL = (nn.Conv1d, nn.ConvTranspose1d)


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter of two dimensions or more, under one of its names."""

    name: str
    kind: Kind
    module: nn.Module
    parameter: nn.Parameter

    @property
    def features(self) -> int:
        """D, the input features; for a raw weight, its longer dimension."""
        shape = self.parameter.shape
        return {"linear": shape[-1], "conv1d": shape[0]}.get(self.kind, max(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    @property
    def attribute(self) -> str:
        """The parameter's name within its module."""
        return self.name.rpartition(".")[2] if self.kind in ("raw", "stack") else "weight"


@dataclass(frozen=True, eq=False)
class Site:
    """A weight that a method applies to.

    left: the first of its two dimensions is the reduced one: D of a weight (D, O) under VeLoRA,
        O of a weight (O, D) whose projector multiplies from the left.
    rank: r of a projection.
    """

    weight: Weight
    left: bool = False
    rank: int = 0


def candidates(model: nn.Module) -> list[Weight]:
    """The weights that matmuls may read, in the model's order; a shared one under each name."""
    return [
        weight
        for path, module in model.named_modules()
        if not isinstance(module, EMBEDDINGS)
        for weight in _of_module(path or type(module).__name__, module)
        if _is_candidate(weight)
    ]


def matrices(model: nn.Module) -> Iterator[Weight]:
    """Each parameter of two dimensions or more once, under its first name."""
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for weight in _of_module(path or type(module).__name__, module):
            if weight.parameter not in seen:
                seen.add(weight.parameter)
                yield weight


def by_parameter(weights: list[Weight]) -> dict[nn.Parameter, list[Weight]]:
    """Parameter (by identity) -> its weights, one per name."""
    found: dict[nn.Parameter, list[Weight]] = {}
    for weight in weights:
        found.setdefault(weight.parameter, []).append(weight)
    return found


def _of_module(path: str, module: nn.Module) -> Iterator[Weight]:
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if parameter.ndim < 2:
            continue
        kind = _kind_of_weight(module) if name == "weight" else None
        if kind is not None:
            yield Weight(path, kind, module, parameter)
        else:
            packed: Kind = "raw" if parameter.ndim == 2 else "stack"
            yield Weight(f"{path}.{name}", packed, module, parameter)


def _kind_of_weight(module: nn.Module) -> Kind | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if type(module).__name__ == "Conv1D":
        return "conv1d"
    if isinstance(module, EMBEDDINGS):
        return "embedding"
    return "convolution" if isinstance(module, CONVOLUTIONS) else None


def _is_candidate(weight: Weight) -> bool:
    if weight.kind != "stack":
        return weight.kind in ("linear", "conv1d", "raw")
    alike = weight.parameter.ndim == 3 and min(weight.shape) > 1
    return alike and not isinstance(weight.module, ONE_DIMENSIONAL)
