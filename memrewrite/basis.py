"""What the coordinates of a small gradient are coordinates of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.ops import reconstruct


@dataclass(frozen=True, eq=False)
class Vector:
    """The basis I (x) v: dense = (A (x) v)[:, :D] with A (O, G), v (M,) of length one."""

    v: Tensor

    def dense(self, coordinates: Tensor, shape: Sequence[int]) -> Tensor:
        return reconstruct(coordinates, self.v, shape[1])

    def isometric(self, coordinates: Tensor, shape: Sequence[int]) -> Tensor:
        """Numbers with the norm of the dense value: the last sub-token may be cut short."""
        left = shape[1] % len(self.v)
        if not left:
            return coordinates
        weights = coordinates.new_ones(coordinates.shape[1])
        weights[-1] = self.v[:left].norm()
        return coordinates * weights

    def same(self, other: object) -> bool:
        return isinstance(other, Vector) and (
            self.v is other.v or (self.v.shape == other.v.shape and torch.equal(self.v, other.v))
        )

    def to(self, device: torch.device) -> Vector:
        return self if self.v.device == device else Vector(self.v.to(device))
