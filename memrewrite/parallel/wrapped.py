"""Models inside DistributedDataParallel and fully_shard, and the arguments of their graphs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from memrewrite.sites.sharded import is_sharded as is_dtensor

PARTS = (
    *("_active_ddp_module", "_build_params_for_reducer", "_build_debug_param_to_name_mapping"),
    *("_ddp_init_helper", "_post_forward", "_remove_autograd_hooks"),
)
KNOWN = all(hasattr(DDP, part) for part in PARTS)


def active() -> Any:
    """The DDP whose forward is running, or None."""
    return DDP._active_ddp_module if KNOWN else None


def inner(model: Any) -> Any:
    """The model inside a DDP, which names, sites and state refer to; any other model itself."""
    while isinstance(model, DDP):
        model = model.module
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether fully_shard manages parameters of a model."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # None if not used
    kind = getattr(fsdp, "FSDPModule", ())
    if any(isinstance(module, kind) for module in model.modules()):
        return True
    return any(map(is_dtensor, model.parameters()))


def rehearsed() -> bool:
    """Whether DDPOptimizer calls a graph, during a compile that splits it."""
    return active() is not None and torch._guards.TracingContext.try_get() is not None


def originals(model: nn.Module | None, inputs: Sequence[Any]) -> Sequence[Any]:
    """Inputs with the real parameters and buffers, where DDPOptimizer compiles with fake ones."""
    modes = (value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    mode = next(modes, None) if active() is not None else None
    if mode is None or model is None:
        return inputs
    real: dict[Any, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        copy = mode.fake_tensor_converter._get_memo(tensor)
        if copy is not None:
            real[copy] = tensor
    return [real.get(v, v) if isinstance(v, Tensor) else v for v in inputs]
