"""The mean of gradients over ranks, of small gradients in coordinates.

Ranks first agree on a form for each weight, in one small all-reduce of integers:

    none     it is None on every rank, and stays None
    small    A (or R) on some ranks, None on the others, who add zeros of that shape
    dense    it is dense on some rank, so it is made dense on all: a sum needs one shape

A sum of coordinates is only valid if every rank has the same basis. A fingerprint of the basis
is reduced with the forms; if ranks differ, all raise UnsupportedError.
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
CHUNK = 25 * 2**20  # bytes per all-reduce
ABSENT = -(2**62)  # less than every mark, so it never is the maximum
USED, DENSE, MARK, MINUS_MARK = range(4)  # columns per weight, reduced by maximum

BasisOf = Callable[[nn.Parameter], Basis | None]


@dataclass
class Sent:
    """Bytes of gradients that this rank has all-reduced, and the bytes of full ones."""

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
        mine = [self._form(i, weight, basis_of) for i, (_, weight) in enumerate(self.weights)]
        device = torch.device("cpu") if _takes_cpu(group) else self.weights[0][1].device
        forms = torch.tensor(mine, device=device)
        dist.all_reduce(forms, dist.ReduceOp.MAX, group)
        agreed: list[list[int]] = forms.tolist()
        for (name, weight), (used, dense, mark, minus) in zip(self.weights, agreed, strict=True):
            if used and not dense and mark != -minus:
                raise UnsupportedError(
                    f"the gradient of {name} {tuple(weight.shape)} comes in another basis on "
                    "another rank, so that a mean of coordinates is not valid: load the same "
                    "checkpoint on every rank (the optimizer's state, and "
                    "memrewrite.load_state_dict), or compile with gradients='dense'"
                )
        return agreed

    def _form(self, place: int, weight: nn.Parameter, basis_of: BasisOf) -> list[int]:
        grad: Any = weight.grad
        small = isinstance(grad, ProjectedGrad) and not grad.is_dense
        basis = grad.basis if small else None if grad is not None else basis_of(weight)
        if basis is None:
            return [int(grad is not None), 1, ABSENT, ABSENT]
        mark = self._mark(place, basis)
        return [int(small), 0, mark, -mark]

    def _mark(self, place: int, basis: Basis) -> int:
        """A fingerprint of a basis; cached by tensor, as v and P are never overwritten."""
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
    """The coordinates, which may be written in place."""
    grad: Any = weight.grad
    if grad is None:
        basis = basis_of(weight)
        assert basis is not None  # some rank has it, and this rank has the same
        zeros = weight.new_zeros(basis.small(weight.shape))
        grad = weight.grad = ProjectedGrad(zeros, basis, weight.shape)
    elif len(grad.held()) > 1:  # a view of its dense value exists
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
    """Lists of tensors of one dtype and device, about CHUNK bytes each."""
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
    """Whether a group can reduce CPU tensors, which synchronises no device."""
    return "cpu:" in str(dist.get_backend_config(group))
