"""The request for one captured graph, as plain data: part of the compile cache's key."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import passes
from memrewrite.methods.method import Ask, Method, Task
from passes.split.tolerance import Rounding


@dataclass(frozen=True)
class Request:
    """What to do with one captured graph; positions count its arguments."""

    weights: tuple[int, ...]  # positions of parameters
    buffers: tuple[int, ...]  # positions of the model's buffers
    tasks: tuple[Task, ...] = ()
    rounding: Rounding | None = None
    may_be_absent: bool = True  # tangents may be undefined; a CUDA graph cannot branch on it

    @property
    def free(self) -> frozenset[int]:
        """Arguments that are live throughout, so that saving them for backward costs nothing."""
        placed = (p for task in self.tasks for p in task.placed())
        bases = {p.basis for p in placed if p.basis is not None}
        return frozenset({*self.weights, *self.buffers, *bases})


def make_request(
    arguments: int,
    asked: Sequence[tuple[Method, Sequence[Ask]]],
    parameters: Sequence[int],
    buffers: Sequence[int],
    may_be_absent: bool = True,
) -> Request:
    """The request for a graph with this many arguments; extra inputs follow, method by method."""
    tasks: list[Task] = []
    for method, asks in asked:
        if asks:
            tasks.append(Task(method, method.key, tuple(asks), arguments))
            arguments += tasks[-1].inputs
    rounding = next((m.rounding for m, _ in asked if m.rounding is not None), None)
    return Request(tuple(parameters), tuple(buffers), tuple(tasks), rounding, may_be_absent)


def extra_inputs(request: Request) -> list[tuple[str, Tensor]]:
    """(name, example) of each extra input of the compiled graph; ports require gradients."""
    found: list[tuple[str, Tensor]] = []
    for task in request.tasks:
        symbol = task.method.symbol
        for ask in task.asks:
            if ask.basis is not None:
                empty = torch.empty(ask.basis, dtype=ask.dtype, device=ask.device)
                found.append((f"memrewrite_{symbol}_{ask.position}", empty))
        for ask in task.asks:
            if ask.port is not None:
                port = torch.zeros(ask.port, dtype=ask.port_dtype, device=ask.device)
                found.append((f"memrewrite_port_{ask.position}", port.requires_grad_()))
    return found


# The folders whose files decide how a captured graph is rewritten. The others (inspect, predict,
# bench, optim, parallel, ...) act on it only through a request, which is in the key.
DECIDING = ("calibration", "compiler", "gradients", "loss", "methods", "record", "session", "sites")


def deciding_files() -> list[Path]:
    """Every source file that the compile cache's key depends on."""
    root = Path(__file__).parent.parent
    folders = [Path(passes.__file__).parent, *(root / room for room in DECIDING)]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


@functools.cache
def source_hash() -> str:
    """A digest of `deciding_files`, so that an edited pass invalidates the cache."""
    content = b"".join(path.read_bytes() for path in deciding_files())
    return hashlib.sha256(torch.__version__.encode() + content).hexdigest()
