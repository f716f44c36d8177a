"""Sharded weights: gather them for an update, and write each rank's shard.

A projector, and the update by it, need the whole gradient. So gradient and weight are gathered,
one weight at a time, every rank computes the same update, and writes its shard. Moments and
projector, which are small, are replicated.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, which fully_shard makes of a parameter."""
    return hasattr(tensor, "placements")


def can_be_gathered(parameter: Tensor) -> bool:
    """Whether every placement of a DTensor is a plain shard or a replica."""
    placements: Any = parameter.placements  # type: ignore[attr-defined]
    return all(type(one).__name__ in ("Shard", "Replicate") for one in placements)


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, on every rank; any other tensor itself."""
    whole: Any = tensor
    return whole.full_tensor() if is_sharded(tensor) else whole  # type: ignore[no-any-return]


def keep_shard(parameter: nn.Parameter, whole: Tensor) -> None:
    """Write this rank's shard of `whole`, which is the same on every rank."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        own: Any = parameter.detach()
        own.copy_(distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None))
