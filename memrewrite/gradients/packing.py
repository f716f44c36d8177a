"""Vectors in an optimizer's state, stored losslessly in the dtype of the weight.

`Optimizer.load_state_dict` casts every tensor to the dtype of its weight. A v (M,) that this
dtype cannot represent is stored as several rows that it can.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

VECTOR = "vector"  # v of a factored state
CALIBRATED = "calibrated_vector"  # v of a compressed weight whose moments are full-size
SUM = "calibrated_sum"  # the sum of the running mean of such a weight
BITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}


def pack(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (M,) in `dtype` without loss: x itself, or (1 + n, M).

    Row 0 is a binary exponent e; the others are pieces, each of as many bits as `dtype` has:
    x = 2^e (piece_1 + 2^-b piece_2 + 2^-2b piece_3 ...).
    """
    bits, step = BITS[x.dtype], BITS[dtype]
    if bits <= step:
        return x
    exponent = (
        math.frexp(float(x.abs().max()))[1] - 15
    )  # float16 has a wider range above 1 than below
    rows, rest = [torch.full_like(x, exponent)], x * 2.0**-exponent
    for _ in range(-(-bits // step)):
        rows.append(rest.to(dtype).to(x.dtype))
        rest = (rest - rows[-1]) * 2.0**step
    return torch.stack(rows).to(dtype)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The argument x (M,) of `pack`, in `dtype`."""
    if packed.ndim == 1:
        return packed.to(dtype)
    exponent, pieces, step = int(packed[0, 0]), packed[1:].to(dtype), BITS[packed.dtype]
    total = torch.zeros_like(pieces[0])
    for place in reversed(range(len(pieces))):  # smallest first: every partial sum is exact
        total = total + pieces[place] * 2.0 ** (-step * place)
    return total * 2.0**exponent


def packed_bytes(size: int, dtype: torch.dtype) -> int:
    """Bytes of a packed float32 v (M,) in the state of a weight of `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = 1 if BITS[wide] <= BITS[dtype] else 1 - (-BITS[wide] // BITS[dtype])
    return rows * size * dtype.itemsize if rows > 1 else size * wide.itemsize
