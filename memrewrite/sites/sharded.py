"""Weights of which each rank keeps a part: whole for an update, and back.

A projector needs the whole gradient, and so does the update that it makes of it. So the
gradient and the weight are gathered, one weight at a time, every rank takes the same update,
and keeps its own part. Moments and projector, which are small, are the same on every rank.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """True for a DTensor, such as fully_shard makes of a parameter."""
    return hasattr(tensor, "placements")


def can_be_gathered(parameter: Tensor) -> bool:
    """Whether a DTensor is split or copied along its dimensions, and nothing else."""
    placements: Any = parameter.placements  # type: ignore[attr-defined]
    return all(type(one).__name__ in ("Shard", "Replicate") for one in placements)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank; of another one itself."""
    whole: Any = tensor
    return whole.full_tensor() if is_sharded(tensor) else whole  # type: ignore[no-any-return]


def keep_shard(parameter: nn.Parameter, whole: Tensor) -> None:
    """Write this rank's part of an updated weight (the same on every rank) into it."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        own: Any = parameter.detach()
        own.copy_(distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None))
