"""saved_tensors(model, *inputs): the tensors that a compiled forward saves for backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memrewrite.parallel.wrapped import inner
from memrewrite.record.decision import KeptRecord
from memrewrite.session.graph import Binding, running
from memrewrite.session.session import session_of
from memrewrite.sites.options import refuse_options

Kind = Literal["exact", "compressed", "parameter", "buffer", "input", "vector", "outside"]


@dataclass(frozen=True)
class SavedTensor:
    """One tensor that autograd saves between forward and backward.

    bytes: of its storage, at the first row that has it; 0 for further views of it.
    kind: "exact" or "compressed" (a z) for activations; "parameter", "buffer", "input" and
        "vector" (VeLoRA's v), which are live anyway; "outside" if saved by uncompiled code.
    used_by: the operations in backward that read it.
    """

    name: str
    module: str
    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    kind: Kind
    used_by: tuple[str, ...]

    @property
    def lives_anyway(self) -> bool:
        """Whether its storage is live even if backward does not read it."""
        return self.kind in ("parameter", "buffer", "input", "vector")


class SavedTensors(list[SavedTensor]):
    """The rows, printable as a table, the largest first, with their sum."""

    @property
    def bytes(self) -> int:
        """Total of activations, excluding what is live anyway."""
        return sum(row.bytes for row in self if not row.lives_anyway)

    def __str__(self) -> str:
        rows = [
            (
                row.bytes,
                row.kind,
                row.module,
                row.operation,
                "x".join(map(str, row.shape)),
                str(row.dtype).removeprefix("torch."),
                ", ".join(row.used_by),
            )
            for row in sorted(self, key=lambda row: -row.bytes)
            if not row.lives_anyway
        ]
        header = ("bytes", "kind", "module", "operation", "shape", "dtype", "read in backward by")
        anyway = sum(row.bytes for row in self if row.lives_anyway)
        return (
            f"{tabulate(rows, header, tablefmt='simple', intfmt=',')}\n\n"
            f"{self.bytes:,} bytes of activations; parameters, buffers, inputs and vectors that "
            f"backward reads as well: {anyway:,}"
        )


def saved_tensors(model: nn.Module, *args: Any, **kwargs: Any) -> SavedTensors:
    """Run one forward of a compiled model and list the tensors that it saves for backward.

    The bytes are those that `torch.autograd.graph.saved_tensors_hooks` counts, each storage
    once. Compiles the model if needed. Restores RNG state and buffers. Raises ValueError for a
    model that memrewrite did not compile, and where gradients are disabled.
    """
    session_of(model)
    refuse_options(model, kwargs, "saved_tensors")
    model = inner(model)  # a forward of the DDP would expect a backward
    if not torch.is_grad_enabled():
        raise ValueError("gradients are turned off, so nothing is saved; leave torch.no_grad()")
    given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    packed: list[tuple[Tensor, Binding | None]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append((tensor, running()))
        return tensor

    with _side_effects_undone(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = model(*args, **kwargs)
    rows = SavedTensors(_rows(model, given, packed))
    del result  # alive until here, so that no freed address was used again
    return rows


@contextmanager
def _side_effects_undone(model: nn.Module) -> Iterator[None]:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng():
        yield
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


def _rows(
    model: nn.Module, given: Sequence[Tensor], packed: Sequence[tuple[Tensor, Binding | None]]
) -> Iterator[SavedTensor]:
    session = session_of(model)
    vectors = [tensor for _, state in session.kept for tensor in state.held()]
    known: dict[int, Kind] = {_memory(t): "vector" for t in vectors}
    known |= {_memory(t): "input" for t in given}
    known |= {_memory(t): "buffer" for t in model.buffers()}
    known |= {_memory(t): "parameter" for t in model.parameters()}
    names = {_memory(p): name for name, p in (*model.named_buffers(), *model.named_parameters())}
    counted: set[int] = set()
    for tensor, entry in _described(packed):
        memory, size = _memory(tensor), tensor.untyped_storage().nbytes()
        kind = known.get(memory) or ("outside" if entry is None else None)
        if kind is None:
            kind = "compressed" if entry is not None and entry.compressed else "exact"
        yield SavedTensor(
            names.get(memory) or (entry.name if entry else ""),
            entry.module if entry else "",
            entry.operation if entry else "",
            tuple(tensor.shape),
            tensor.dtype,
            0 if memory in counted else size,
            kind,
            tuple(entry.used_by) if entry else (),
        )
        counted.add(memory)


def _described(
    packed: Sequence[tuple[Tensor, Binding | None]],
) -> Iterator[tuple[Tensor, KeptRecord | None]]:
    """Each packed tensor with its record: autograd packs in the order of the graph's outputs."""
    waiting: dict[int, list[KeptRecord]] = {}
    for tensor, binding in packed:
        if binding is None:
            yield tensor, None
            continue
        left = waiting.get(id(binding))
        if not left:
            left = waiting[id(binding)] = list(binding.variant.record.kept)
        fits = (i for i, entry in enumerate(left) if entry.fits(tensor))
        found = next(fits, None)
        yield tensor, left.pop(found) if found is not None else None


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
