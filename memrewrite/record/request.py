"""What one captured graph is asked to do, as plain data: part of the compile cache's key."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import passes
from passes.base import Pass
from passes.joint.port import Ported
from passes.joint.push import Projected


@dataclass(frozen=True)
class Plan:
    """Positions count the captured graph's arguments."""

    weights: tuple[int, ...]  # arguments that are parameters
    buffers: tuple[int, ...]  # arguments that are the model's buffers
    vectors: tuple[tuple[int, int], ...]  # selected weight -> its v
    scale: float
    ports: tuple[Ported, ...] = ()
    projections: tuple[Projected, ...] = ()
    may_be_absent: bool = True  # incoming gradients; a recorded CUDA graph cannot branch on it

    @property
    def free(self) -> frozenset[int]:
        """Arguments that live anyway: keeping them for backward costs nothing."""
        bases = {v for _, v in self.vectors} | {one.projector for one in self.projections}
        return frozenset({*self.weights, *self.buffers, *bases})


PassesFor = Callable[[Plan], list[Pass]]


@dataclass(frozen=True)
class Weight:
    """A selected weight as one captured graph sees it."""

    position: int
    size: int  # M
    dtype: torch.dtype  # of v
    device: torch.device
    port: tuple[int, int] | None = None  # the shape of its small gradient, where it has a port
    left: bool = False  # W is (D, O)


@dataclass(frozen=True)
class ProjectedWeight:
    """A weight whose gradient is returned in the coordinates of a projector."""

    position: int
    basis: tuple[int, int]  # the shape of P
    left: bool
    port: tuple[int, int]  # the shape of R
    dtype: torch.dtype  # of both
    device: torch.device


def make_plan(
    arguments: int,
    selected: Sequence[Weight],
    projected: Sequence[ProjectedWeight],
    parameters: Sequence[int],
    buffers: Sequence[int],
    scale: float,
    may_be_absent: bool = True,
) -> Plan:
    """The plan of a graph that takes, behind its arguments, v, ports, P, and ports of those."""
    ported = [w for w in selected if w.port is not None]
    at = arguments + len(selected)
    bases = at + len(ported)
    ends = bases + len(projected)
    return Plan(
        weights=tuple(parameters),
        buffers=tuple(buffers),
        vectors=tuple((w.position, arguments + i) for i, w in enumerate(selected)),
        scale=scale,
        ports=tuple(Ported(w.position, at + i, w.left) for i, w in enumerate(ported)),
        projections=tuple(
            Projected(w.position, ends + i, bases + i, w.left) for i, w in enumerate(projected)
        ),
        may_be_absent=may_be_absent,
    )


# The rooms whose files decide what a captured graph becomes. Left out on purpose: what shows
# (inspect), predicts, measures (bench) or steps (optim, parallel); a plan says what those ask for.
DECIDING = ("calibration", "compiler", "gradients", "methods", "record", "session", "sites")


def deciding_files() -> list[Path]:
    """Every source file that the compile cache's key depends on."""
    root = Path(__file__).parent.parent
    folders = [Path(passes.__file__).parent, *(root / room for room in DECIDING)]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


@functools.cache
def source_hash() -> str:
    """Of every file that decides what a graph becomes: yesterday's pass is another pass."""
    content = b"".join(path.read_bytes() for path in deciding_files())
    return hashlib.sha256(torch.__version__.encode() + content).hexdigest()
