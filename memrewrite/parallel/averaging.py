"""The mean over ranks of gradients, in the form that they come in.

Ranks first agree on a form for each weight, in one small all-reduce of integers:

    none     it is None on every rank, and stays None
    small    A (or R) on some ranks, None on the others, who add zeros of that shape
    dense    somewhere it is dense, so it is made dense everywhere: a sum needs one shape

A small gradient is coordinates in a basis, so a sum of them means nothing unless every rank
has the same basis. A number that depends on all of it travels with the forms; ranks that
differ raise.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memrewrite.errors import UnsupportedError
from memrewrite.gradients.basis import Basis
from memrewrite.gradients.gradient import ProjectedGrad

dist = torch.distributed
CHUNK = 25 * 2**20  # bytes that are copied together, and sent as one
ABSENT = -(2**62)  # below every mark: loses any maximum
USED, DENSE, MARK, MINUS_MARK = range(4)  # what a rank tells of a weight; the maximum counts

BasisOf = Callable[[nn.Parameter], Basis | None]


@dataclass
class Sent:
    """Bytes of gradients handed to all_reduce on this rank, and what full ones would take."""

    small: int = 0
    dense: int = 0
    full: int = 0


@dataclass
class Averager:
    """The weights of one model, in an order that is the same on every rank."""

    weights: Sequence[tuple[str, nn.Parameter]]
    sent: Sent = field(default_factory=Sent)
    marks: dict[int, tuple[Any, int]] = field(default_factory=dict)  # (basis's tensor, mark)

    @torch.no_grad()
    def average(self, group: Any, basis_of: BasisOf) -> None:
        """Replace each gradient by its mean over `group`. Raises UnsupportedError."""
        if dist.get_world_size(group) == 1:
            return
        tensors: list[Tensor] = []
        forms = self._agreed(group, basis_of)
        for (_, weight), (used, dense, *_) in zip(self.weights, forms, strict=True):
            if used:
                tensors.append(_full(weight) if dense else _small(weight, basis_of))
                self.sent.full += weight.nbytes
                if dense:
                    self.sent.dense += tensors[-1].nbytes
                else:
                    self.sent.small += tensors[-1].nbytes
        mean(tensors, group)

    def _agreed(self, group: Any, basis_of: BasisOf) -> list[list[int]]:
        told = [self._told(i, weight, basis_of) for i, (_, weight) in enumerate(self.weights)]
        device = torch.device("cpu") if _takes_cpu(group) else self.weights[0][1].device
        forms = torch.tensor(told, device=device)
        dist.all_reduce(forms, dist.ReduceOp.MAX, group)
        agreed: list[list[int]] = forms.tolist()
        for (name, weight), (used, dense, mark, minus) in zip(self.weights, agreed, strict=True):
            if used and not dense and mark != -minus:
                raise UnsupportedError(
                    f"the gradient of {name} {tuple(weight.shape)} comes in another basis on "
                    "another rank, so that a mean of coordinates means nothing: load the same "
                    "checkpoint on every rank (the optimizer's state, and "
                    "memrewrite.load_state_dict), or compile with gradients='dense'"
                )
        return agreed

    def _told(self, place: int, weight: nn.Parameter, basis_of: BasisOf) -> list[int]:
        grad: Any = weight.grad
        small = isinstance(grad, ProjectedGrad) and not grad.is_dense
        basis = grad.basis if small else None if grad is not None else basis_of(weight)
        if basis is None:
            return [int(grad is not None), 1, ABSENT, ABSENT]
        mark = self._mark(place, basis)
        return [int(small), 0, mark, -mark]

    def _mark(self, place: int, basis: Basis) -> int:
        """The same for equal bases alone, as good as; neither v nor P is written in place."""
        tensor = basis.tensor
        known = self.marks.get(place)
        if known is None or known[0]() is not tensor:
            ramp = torch.arange(1, tensor.numel() + 1, device=tensor.device, dtype=torch.float64)
            number = float(torch.dot(tensor.detach().double().reshape(-1), ramp.sqrt()))
            bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
            known = self.marks[place] = weakref.ref(tensor), bits % 2**61
        return known[1]


def _full(weight: nn.Parameter) -> Tensor:
    grad: Any = weight.grad
    if grad is None:
        weight.grad = torch.zeros_like(weight)
    elif isinstance(grad, ProjectedGrad):
        weight.grad = grad.to_dense()
    assert weight.grad is not None
    return weight.grad


def _small(weight: nn.Parameter, basis_of: BasisOf) -> Tensor:
    """The coordinates, to be written in place."""
    grad: Any = weight.grad
    if grad is None:
        basis = basis_of(weight)
        assert basis is not None  # this rank has told its mark
        zeros = weight.new_zeros(basis.small(weight.shape))
        grad = weight.grad = ProjectedGrad(zeros, basis, weight.shape)
    elif len(grad.held()) > 1:  # somebody holds a view of its dense value
        grad = weight.grad = grad.clone()
    assert isinstance(grad.coordinates, Tensor)
    return grad.coordinates


def mean(tensors: Sequence[Tensor], group: Any) -> None:
    """Replace each tensor by its mean over the ranks of a group."""
    for chunk in _chunks(tensors):
        flat = torch.cat([t.reshape(-1) for t in chunk])
        flat /= dist.get_world_size(group)  # before the sum, as DDP does: half floats overflow
        dist.all_reduce(flat, group=group)
        parts = torch.split(flat, [t.numel() for t in chunk])
        for tensor, part in zip(chunk, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))


def _chunks(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Of one dtype and device each, about CHUNK bytes."""
    chunks: list[list[Tensor]] = []
    latest: dict[Any, tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        key = tensor.dtype, tensor.device
        chunk, size = latest.get(key, ([], CHUNK))
        if size + tensor.nbytes > CHUNK:
            chunk, size = [], 0
            chunks.append(chunk)
        chunk.append(tensor)
        latest[key] = chunk, size + tensor.nbytes
    return chunks


def _takes_cpu(group: Any) -> bool:
    """Whether integers may travel without waiting for a device."""
    return "cpu:" in str(dist.get_backend_config(group))
