"""LazyLogits: logits that are computed when something reads their values.

A chunked loss never has them whole, but the model still returns them. This tensor has their
shape, dtype and device, and holds what they are made of: the head's input, its weight and its
bias. Metadata, `detach` and casts cost nothing; any other operation computes the logits once, with
their autograd history, and works on those. What an optimizer's step would change of it is kept
before the step: see `memrewrite.loss.kept`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memrewrite.loss.kept import Copies, copied, follow

_T: Any = Tensor  # its properties are descriptors, which annotations do not know
FREE = {
    _T.shape.__get__,
    _T.dtype.__get__,
    _T.device.__get__,
    _T.layout.__get__,
    _T.ndim.__get__,
    _T.requires_grad.__get__,
    _T.grad_fn.__get__,
    _T.is_leaf.__get__,
    _T.is_cuda.__get__,
    _T.is_sparse.__get__,
    _T.size,
    _T.dim,
    _T.numel,
    _T.nelement,
    _T.element_size,
    _T.stride,
    _T.is_contiguous,
    _T.is_floating_point,
    _T.is_complex,
    _T.__hash__,
    _T.__len__,
    torch.is_floating_point,
    torch.numel,
}


CASTS = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}
CASTING = {*CASTS, Tensor.to, Tensor.type}


class LazyLogits(Tensor):
    """LazyLogits(make, parts, like), made by `lazily`; see the module's docstring."""

    _make: Callable[..., Tensor]
    _parts: list[Tensor]
    _versions: list[int]
    _value: Tensor | None
    _read: Callable[[str], None]

    @staticmethod
    def __torch_function__(
        func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        first: Any = args[0] if args else None
        if func is Tensor.detach and isinstance(first, LazyLogits):
            return first._detached()
        if func in CASTING and isinstance(first, LazyLogits):
            cast = _cast(first, func, args[1:], kwargs or {})
            if cast is not None:
                return cast
        args, kwargs = pytree.tree_map(_value_of, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map(_value_of, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)

    def _detached(self) -> LazyLogits:
        with torch._C.DisableTorchFunctionSubclass():
            made = _empty(self.shape, self.dtype, self.device)
        made._make, made._read, made._versions = self._make, self._read, self._versions
        made._parts = [part.detach() for part in self._parts]
        made._value = None if self._value is None else self._value.detach()
        follow(made)
        return made

    def _keep(self, written: set[int], copies: Copies) -> None:
        taken = [part.data_ptr() in written for part in self._parts]
        if self._value is not None or not any(taken) or self._stale:
            return
        new = [p.nbytes for p, t in zip(self._parts, taken, strict=True) if t]
        known = any(part.data_ptr() in copies for part in self._parts)
        if not known and self.numel() * self.element_size() <= sum(new):
            self._make_value()
            return
        both = zip(self._parts, taken, strict=True)
        self._parts = [copied(part, copies) if t else part for part, t in both]
        self._versions = [part._version for part in self._parts]

    @property
    def _stale(self) -> bool:
        return [part._version for part in self._parts] != self._versions

    def _compute(self) -> Tensor:
        """The logits. Raises RuntimeError if the head was written to other than by an optimizer."""
        if self._value is not None:
            return self._value
        if self._stale:
            raise RuntimeError(
                "the values of the logits are read after the head's weight was written to outside "
                "of an optimizer's step, and with loss_chunks they are computed when they are "
                "read; read them before that, or compile with loss_chunks=False"
            )
        self._read(_reader())
        return self._make_value()

    def _make_value(self) -> Tensor:
        with torch.set_grad_enabled(self._differentiable):
            self._value = self._make(*self._parts)
        return self._value

    @property
    def _differentiable(self) -> bool:
        with torch._C.DisableTorchFunctionSubclass():
            return self.requires_grad


def _value_of(value: Any) -> Any:
    return value._compute() if isinstance(value, LazyLogits) else value


def _cast(
    logits: LazyLogits, func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> LazyLogits | None:
    """The result of a call that only casts logits whose values are not there yet, or None."""
    given = [*args, *(v for k, v in kwargs.items() if v is not None and k != "non_blocking")]
    dtypes = [v for v in given if isinstance(v, torch.dtype)]
    places = [v for v in given if isinstance(v, str | torch.device) and func is Tensor.to]
    known = len(dtypes) + len(places) == len(given) and bool(given) != (func in CASTS)
    if logits._value is not None or not known or len(dtypes) > 1:
        return None
    if any(torch.empty(0, device=place).device != logits.device for place in places):
        return None
    dtype = CASTS.get(func) or (dtypes[0] if dtypes else logits.dtype)
    return logits if dtype == logits.dtype else _composed(logits, dtype)


def _composed(logits: LazyLogits, dtype: torch.dtype) -> LazyLogits:
    make, differentiable = logits._make, logits._differentiable
    parts = [part if differentiable else part.detach() for part in logits._parts]
    made = lazily(lambda *parts: make(*parts).to(dtype), parts, dtype, logits._read)
    made._versions = logits._versions
    return made


def _reader() -> str:
    """File and line of what reads the values: the innermost frame outside of torch and here."""
    frame = sys._getframe()
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if name != __file__ and "/torch/" not in name:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> LazyLogits:
    made: Any = Tensor._make_wrapper_subclass(LazyLogits, tuple(shape), dtype=dtype, device=device)
    return made  # type: ignore[no-any-return]


class _Made(torch.autograd.Function):
    """Logits without values whose gradient reaches the parts, whichever way they are used."""

    @staticmethod
    def forward(
        ctx: Any, make: Callable[..., Tensor], dtype: torch.dtype, *parts: Tensor
    ) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(*parts)
        h, w = parts[:2]
        return _empty((*h.shape[:-1], w.shape[0]), dtype, h.device)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
        parts = [part.detach().requires_grad_() for part in ctx.saved_tensors]
        with torch.enable_grad():
            z = ctx.make(*parts)
        return None, None, *torch.autograd.grad(z, parts, dz)


def lazily(
    make: Callable[..., Tensor],
    parts: Sequence[Tensor],
    dtype: torch.dtype,
    read: Callable[[str], None],
) -> LazyLogits:
    """Logits that `make(*parts)` computes: parts are h (..., D), w (V, D) and perhaps a bias.

    `read` is called with the file and line of what first reads the values.
    """
    call: Any = _Made.apply
    made: LazyLogits = call(make, dtype, *parts)
    made._make, made._parts, made._read, made._value = make, list(parts), read, None
    made._versions = [part._version for part in parts]
    follow(made)
    return made
