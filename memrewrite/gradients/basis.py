"""The bases of small gradients: dense = the coordinates expanded by v or P."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.ops import project_back, reconstruct


@dataclass(frozen=True, eq=False)
class Vector:
    """VeLoRA's basis, v (M,) of length one: dense = (A (x) v)[:, :D] with A (O, G).

    left: of a transposed weight (D, O): dense = (A^T (x) v)[:, :D]^T with A (G, O).
    """

    v: Tensor
    left: bool = False

    def __str__(self) -> str:
        return f"v={tuple(self.v.shape)}"

    @property
    def tensor(self) -> Tensor:
        """The input of a compiled graph."""
        return self.v

    def small(self, shape: Sequence[int]) -> tuple[int, int]:
        """The shape of A for a gradient of `shape`."""
        return small_shape(shape, len(self.v), self.left)

    def dense(self, coordinates: Tensor, shape: Sequence[int]) -> Tensor:
        return spread(coordinates, self.v, shape, self.left)

    def isometric(self, coordinates: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor with the norm of the dense value, whose last sub-token may be shorter than M."""
        side = 0 if self.left else 1
        rest = shape[side] % len(self.v)
        if not rest:
            return coordinates
        weights = coordinates.new_ones(coordinates.shape[side])
        weights[-1] = self.v[:rest].norm()
        return coordinates * (weights[:, None] if self.left else weights)

    def same(self, other: object) -> bool:
        return isinstance(other, Vector) and self.left == other.left and equal(self.v, other.v)

    def to(self, device: torch.device) -> Vector:
        return self if self.v.device == device else Vector(self.v.to(device), self.left)


@dataclass(frozen=True, eq=False)
class Projector:
    """GaLore's basis, P of orthonormal columns: dense = R P^T with R (O, r), P (D, r).

    left: dense = P R with R (r, D), P (O, r).
    """

    p: Tensor
    left: bool

    def __str__(self) -> str:
        return f"p={tuple(self.p.shape)}"

    @property
    def tensor(self) -> Tensor:
        """The input of a compiled graph."""
        return self.p

    def small(self, shape: Sequence[int]) -> tuple[int, int]:
        """The shape of R for a gradient of `shape`."""
        rank = self.p.shape[1]
        return (rank, shape[1]) if self.left else (shape[0], rank)

    def dense(self, coordinates: Tensor, shape: Sequence[int]) -> Tensor:
        return project_back(coordinates, self.p.to(coordinates.dtype), self.left)

    def isometric(self, coordinates: Tensor, shape: Sequence[int]) -> Tensor:
        """The coordinates, whose norm is that of the dense value."""
        return coordinates

    def same(self, other: object) -> bool:
        return isinstance(other, Projector) and self.left == other.left and equal(self.p, other.p)

    def to(self, device: torch.device) -> Projector:
        return self if self.p.device == device else Projector(self.p.to(device), self.left)


@dataclass(frozen=True, eq=False)
class Sketch(Projector):
    """The basis of a sketch, of the other side, on the step of a refresh: see `sketch`.

    warm: number of leading columns from the last R; the others are random.
    """

    warm: int = 0


Basis = Vector | Projector


def small_shape(shape: Sequence[int], size: int, left: bool) -> tuple[int, int]:
    """The shape of the coordinates of a weight of `shape`, for sub-tokens of `size` channels."""
    groups = -(-shape[0 if left else 1] // size)
    return (groups, shape[1]) if left else (shape[0], groups)


def spread(small: Tensor, w: Tensor, shape: Sequence[int], left: bool) -> Tensor:
    """small (x) w, in the weight's shape."""
    if left:
        return reconstruct(small.t(), w, shape[0]).t()
    return reconstruct(small, w, shape[1])


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether values are equal; compared only for two tensors, as v and P are never overwritten."""
    return one is other or (one.shape == other.shape and torch.equal(one, other))
