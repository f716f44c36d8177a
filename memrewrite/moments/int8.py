"""Adam's moments in 8 bits each.   [approximate]

A moment is stored as rows of 256 numbers, a code for each and the row's largest value s:

    m = s (c / 127)^2, with the sign of m        v = s (c / 255)^4        P = s c / 127

Identity: none. The spacing of codes, 2 / c and 4 / c of a value, is finest where the values are
large. m, and GaLore's P, are rounded to the nearest code. v is not: a step of Adam decays it by
less than half a code, so that it could not shrink beside the largest of its row. Its code is
floor(c + u), whose mean is c, and u, a hash of the bits of v, repeats where a run does. A positive
v never becomes 0, as Adam divides by it.

Source: block-wise 8-bit state as in Dettmers et al. 2022, arXiv:2110.02861; maps and rounding:
measured, docs/design.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memrewrite.moments.moment import MOMENTS, Moment
from memrewrite.moments.update import wide
from passes.noise import noise

LEAST = 4096  # as in bitsandbytes
SIGNED = ("exp_avg", "projector")


class Int8(Moment):
    """exp_avg, exp_avg_sq (N, 256) uint8, and their scales (N, 1) float32, for N rows.

    Rows are of the flattened weight, the last one filled with zeros. A weight of fewer than
    `least` numbers keeps its moments as torch does.
    """

    name = "int8"
    parts = ("", "_scale")
    row = 256
    projectors = True

    def __init__(self, least: int = LEAST) -> None:
        self.least = least

    def declines(self, weight: Tensor) -> str | None:
        return None if weight.numel() >= self.least else f"it has fewer than {self.least} numbers"

    def zeros(self, like: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
        rows, zero = -(-like.numel() // self.row), 128 if name in SIGNED else 0
        code = torch.full((rows, self.row), zero, dtype=torch.uint8, device=like.device)
        return code, torch.zeros(rows, 1, dtype=wide(like.dtype), device=like.device)

    def write(self, value: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
        rows = _rows(value, self.row)  # (N, 256)
        if name == "projector":
            scale = rows.abs().amax(1, keepdim=True)  # (N, 1)
            code = 128 + (rows * (127 / scale.clamp(min=1e-30))).round()
        elif name == "exp_avg":
            size = rows.abs()
            scale = size.amax(1, keepdim=True)
            code = (size * (127**2 / scale.clamp(min=1e-30))).sqrt().round()
            code = torch.where(rows < 0, 128 - code, 128 + code)
        else:
            scale = rows.amax(1, keepdim=True)
            code = (rows.sqrt() * (255**2 / scale.clamp(min=1e-37).sqrt())).sqrt()
            code = (code + noise(rows)).floor()
            code = torch.where(rows > 0, code.clamp(1, 255), 0)
        return code.to(torch.uint8), scale

    def read(
        self,
        stored: tuple[Tensor, Tensor],
        *,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        code, scale = stored[0].to(dtype), stored[1]
        if name == "projector":
            rows = (code - 128) * (scale * (1 / 127))
        elif name == "exp_avg":
            code = code - 128
            rows = code * code.abs() * (scale * (1 / 127**2))
        else:
            square = code * code
            rows = square * square * (scale * (1 / 255**4))
        if len(shape) == 2 and shape[1] == self.row:
            return rows
        return rows.reshape(-1)[: math.prod(shape)].reshape(shape)


def _rows(value: Tensor, size: int) -> Tensor:
    """The numbers of a tensor as rows, the last one filled with zeros."""
    if value.ndim == 2 and value.shape[1] == size:
        return value
    flat = value.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


MOMENTS[Int8.name] = Int8
