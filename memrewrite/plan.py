"""What one captured graph is asked to do, as plain data: part of the compile cache's key."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import passes
from passes.base import Pass


@dataclass(frozen=True)
class Plan:
    """Positions count the captured graph's arguments."""

    weights: tuple[int, ...]  # arguments that are parameters
    buffers: tuple[int, ...]  # arguments that are the model's buffers
    vectors: tuple[tuple[int, int], ...]  # selected weight -> its v
    scale: float
    ports: tuple[tuple[int, int], ...] = ()  # selected weight -> its port

    @property
    def free(self) -> frozenset[int]:
        """Arguments that live anyway: keeping them for backward costs nothing."""
        return frozenset({*self.weights, *self.buffers, *(v for _, v in self.vectors)})


PassesFor = Callable[[Plan], list[Pass]]


@dataclass(frozen=True)
class Weight:
    """A selected weight as one captured graph sees it."""

    position: int
    size: int  # M
    dtype: torch.dtype  # of v
    device: torch.device
    port: tuple[int, int] | None = None  # the shape of its small gradient, where it has a port


@functools.cache
def source_hash() -> str:
    """Of every file that decides what a graph becomes: yesterday's pass is another pass."""
    folders = (Path(passes.__file__).parent, Path(__file__).parent)
    files = sorted(p for folder in folders for p in folder.glob("*.py"))
    content = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(torch.__version__.encode() + content).hexdigest()
