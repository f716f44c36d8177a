"""VeLoRA in eager PyTorch, written from the paper's algorithm 1: the tests' oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def compress(x: Tensor, v: Tensor) -> Tensor:  # (N, D), (M,) -> (N, G)
    return F.pad(x, (0, -x.shape[-1] % len(v))).unflatten(-1, (-1, len(v))) @ v


def reconstruct(z: Tensor, v: Tensor, d: int) -> Tensor:  # (N, G), (M,) -> (N, D)
    return (z.unsqueeze(-1) * v).flatten(-2)[..., :d]


class Linear(torch.autograd.Function):
    """y = x W^T (or x W, transposed) whose weight gradient reads x^ in place of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, v: Tensor, scale: float, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(compress(x, v.to(x.dtype)), v, weight)
        ctx.scale, ctx.transposed, ctx.features = scale, transposed, x.shape[-1]
        return x @ weight if transposed else x @ weight.t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        z, v, weight = ctx.saved_tensors
        x_hat = reconstruct(z, v.to(z.dtype), ctx.features).flatten(0, -2)  # (N, D)
        dw = ctx.scale * dy.flatten(0, -2).t() @ x_hat  # (O, D)
        dx = dy @ (weight.t() if ctx.transposed else weight)
        return dx, dw.t() if ctx.transposed else dw, None, None, None


def unit_mean(xs: list[Tensor], size: int) -> Tensor:
    """The normalised mean of all sub-tokens of the given inputs, or ones / sqrt(M)."""
    padded = [F.pad(x.detach().double(), (0, -x.shape[-1] % size)) for x in xs]
    mean = torch.cat([p.reshape(-1, size) for p in padded]).mean(0)
    return mean / mean.norm() if mean.norm() > 0 else torch.ones(size).double() / size**0.5


class _Swap(torch.overrides.TorchFunctionMode):
    """Routes every linear over a chosen weight through `Linear`, or only records its inputs."""

    def __init__(self, vectors: Mapping[int, Tensor] | None, scale: float) -> None:
        super().__init__()
        self.vectors, self.scale = vectors, scale
        self.inputs: dict[int, list[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = _operands(func, args, kwargs)
        if operands is None:
            return func(*args, **kwargs)
        x, weight, bias, transposed = operands
        self.inputs.setdefault(id(weight), []).append(x)
        if self.vectors is None or id(weight) not in self.vectors:
            return func(*args, **kwargs)
        y = Linear.apply(x, weight, self.vectors[id(weight)], self.scale, transposed)
        return y if bias is None else y + bias


def _operands(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor, Any, bool] | None:
    if func in (F.linear, torch._C._nn.linear):
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return args[0], args[1], bias, False
    if func is torch.addmm:
        return args[1], args[2], args[0], True
    if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
        if isinstance(args[1], torch.nn.Parameter):
            return args[0], args[1], None, True
    return None


@contextmanager
def velora(vectors: Mapping[int, Tensor], scale: float = 1.0) -> Iterator[_Swap]:
    """Within it, linears over the weights with these ids train by the paper's gradient."""
    with _Swap(vectors, scale) as mode:
        yield mode


@contextmanager
def recording() -> Iterator[_Swap]:
    """Within it, `.inputs` collects what each weight (by id) is multiplied with."""
    with _Swap(None, 1.0) as mode:
        yield mode
