"""Random numbers that repeat where their argument does."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(value: Tensor) -> Tensor:
    """A number in [0, 1) for each value, a hash of its bits: floor(x + noise(x)) has mean x.

    No generator: a run repeats, resumed or recomputed. The hash is of float32, whose low bits are
    random where values are computed; equal values have equal noise.
    """
    bits = value.to(torch.float32).view(torch.int32)
    bits = (bits ^ (bits >> 16)) * 0x45D9F3B
    return ((bits ^ (bits >> 16)) & 0xFFFF).to(value.dtype) * (1 / 65536)
