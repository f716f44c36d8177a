"""Groups of numbers with one scale: x^ = s c, of b-bit codes c.   [approximate]

With n = 2^(b-1) - 1 and the largest |x| of a group: s = max / n rounded up to bfloat16, and c the
nearest of -n..n to x / s, or floor(x / s + u), whose mean is x / s. Numbers that are not finite
make their group not finite. Source: group-wise rounding as in ActNN (Chen et al. 2021,
arXiv:2104.14129).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from passes.noise import noise

CODES = {16: torch.int16, 8: torch.int8, 4: torch.uint8}  # two codes of 4 bits in a byte


@dataclass(frozen=True)
class Groups:
    """A format; order: the dimensions of its tensors in the order of memory, () for their own."""

    bits: int  # 16, 8 or 4
    size: int  # of a group: numbers that follow each other in memory, even
    random: bool = False
    order: tuple[int, ...] = ()
    signs: bool = False  # what is not 0 gets no code 0

    def write(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(codes (..., D b / 8 bytes), scales (..., D / g) bfloat16); D is filled up to g."""
        x = x.permute(self.order) if self.order else x
        wide = torch.promote_types(x.dtype, torch.float32)
        missing, top = -x.shape[-1] % self.size, 2 ** (self.bits - 1) - 1
        rows = (F.pad(x, (0, missing)) if missing else x).to(wide)
        rows = rows.reshape(*x.shape[:-1], -1, self.size)  # (..., D / g, g)
        largest = rows.abs().amax(-1)  # (..., D / g)
        scale = (largest * ((1 + 2**-8) / top)).to(torch.bfloat16)  # no less than max / top
        share = rows * (1 / scale.to(wide).clamp(min=1e-30)).unsqueeze(-1)
        code = (share + noise(rows)).floor() if self.random else share.round()
        code = code.clamp(-top, top)
        if self.signs:
            code = torch.where(code == 0, rows.sign(), code)
        if self.bits == 4:
            low, high = (code + top).to(torch.uint8).split(self.size // 2, -1)
            code = low | (high << 4)
        return code.flatten(-2).to(CODES[self.bits]), scale

    def bytes_of(self, width: int) -> int:
        """Bytes of a row of D = width numbers."""
        groups = -(-width // self.size)
        return groups * (self.size * self.bits // 8 + torch.bfloat16.itemsize)

    def read(self, codes: Tensor, scale: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """x^; width: D, of the last dimension in memory."""
        wide = torch.promote_types(dtype, torch.float32)
        rows = codes.reshape(*scale.shape, -1)
        if self.bits == 4:
            rows = torch.cat([rows & 15, rows >> 4], -1)
        code = rows.to(wide)
        code = code - (2 ** (self.bits - 1) - 1) if self.bits == 4 else code
        x = (code * scale.to(wide).unsqueeze(-1)).flatten(-2)
        x = (x if x.shape[-1] == width else x[..., :width].contiguous()).to(dtype)
        return x.permute([self.order.index(i) for i in range(x.ndim)]) if self.order else x


@dataclass(frozen=True)
class Packed:
    """Booleans, eight to a byte: exact. order: as in `Groups`."""

    order: tuple[int, ...] = ()

    def write(self, x: Tensor) -> Tensor:
        """(..., D / 8) uint8; D is filled up to 8."""
        x = x.permute(self.order) if self.order else x
        missing = -x.shape[-1] % 8
        bits = (F.pad(x, (0, missing)) if missing else x).to(torch.int32)
        bits = bits.reshape(*x.shape[:-1], -1, 8) << torch.arange(8, device=x.device)
        return bits.sum(-1).to(torch.uint8)

    def bytes_of(self, width: int) -> int:
        return -(-width // 8)

    def read(self, codes: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        places = torch.arange(8, device=codes.device)
        bits = (codes.to(torch.int32).unsqueeze(-1) >> places & 1).flatten(-2)
        x = (bits if bits.shape[-1] == width else bits[..., :width].contiguous()).to(dtype)
        return x.permute([self.order.index(i) for i in range(x.ndim)]) if self.order else x
