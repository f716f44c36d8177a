"""What one captured graph is asked to do, as plain data: part of the compile cache's key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from passes.base import Pass


@dataclass(frozen=True)
class Plan:
    """Positions count the captured graph's arguments."""

    weights: tuple[int, ...]  # arguments that are parameters
    buffers: tuple[int, ...]  # arguments that are the model's buffers
    vectors: tuple[tuple[int, int], ...]  # selected weight -> its v
    scale: float

    @property
    def free(self) -> frozenset[int]:
        """Arguments that live anyway: keeping them for backward costs nothing."""
        return frozenset({*self.weights, *self.buffers, *(v for _, v in self.vectors)})


PassesFor = Callable[[Plan], list[Pass]]
