"""Fake tensors, without storage: models of any size, on any machine."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree


def fake_mode(dynamic: bool) -> FakeTensorMode:
    """A context in which tensors are fake; their sizes may be symbolic."""
    return FakeTensorMode(shape_env=ShapeEnv() if dynamic else None, allow_non_fake_inputs=True)


def without_memory(
    mode: Any, model: nn.Module, args: Any, kwargs: Any
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Copies of model and inputs whose tensors are fake."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        device = "cpu" if tensor.device.type == "meta" else tensor.device
        with mode:
            empty = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )
        return empty.requires_grad_(tensor.requires_grad)

    for tensor in (*model.parameters(), *model.buffers()):
        copied = fake(tensor)
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied.detach(), requires_grad=tensor.requires_grad)
        made[id(tensor)] = copied
    with mode:
        twin = copy.deepcopy(model, dict(made))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    for leaf in leaves:
        if (
            isinstance(leaf, Tensor) and id(leaf) not in made
        ):  # a tensor that is given twice stays one
            made[id(leaf)] = fake(leaf)
    given, named = pytree.tree_unflatten([made.get(id(leaf), leaf) for leaf in leaves], spec)
    return twin, given, named
