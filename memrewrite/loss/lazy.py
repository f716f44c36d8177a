"""LazyLogits: logits that are computed when something reads their values.

A chunked loss never has them whole, but the model still returns them. This tensor has their
shape, dtype and device, and holds what they are made of: the head's input, its weight and its
bias. Metadata, `detach`, casts and hooks cost nothing; any other operation computes the logits
once, with their autograd history, and works on those. What an optimizer's step would change of it
is kept before the step: see `memrewrite.loss.kept`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    _T._base.__get__,  # fully_shard looks whether an output is a view
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


@dataclass
class Shared:
    """What logits share with those that are detached from them, as these share their memory."""

    origin: weakref.ref[LazyLogits]  # what the others are detached from
    values: Tensor | None = None  # without history, once anything has computed them


class LazyLogits(Tensor):
    """LazyLogits(make, parts, like), made by `lazily`; see the module's docstring."""

    _make: Callable[..., Tensor]
    _parts: list[Tensor]
    _versions: list[int]
    _value: Tensor | None
    _shared: Shared
    _hooks: list[_Hook]
    _gathered: bool  # fully_shard frees the head's weight, and writes to it by gathering it again
    _freed: bool  # and has done so
    _read: Callable[[str], None]

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
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
        if func is Tensor.register_hook and isinstance(first, LazyLogits):
            return _Hook(first, *args[1:], **(kwargs or {}))
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
        made._gathered, made._freed = self._gathered, self._freed
        made._parts = [part.detach() for part in self._parts]
        made._value, made._shared, made._hooks = self._shared.values, self._shared, []
        follow(made)
        return made

    def _keep(self, written: set[int], copies: Copies) -> None:
        taken = [part.data_ptr() in written for part in self._parts]
        if self._gathered:  # the optimizer has shards
            taken = [False, *[True] * (len(self._parts) - 1)]
            self._freed = self._freed or self._without_weight
        if self._value is not None or not any(taken) or self._stale or self._freed:
            return
        new = [p.nbytes for p, t in zip(self._parts, taken, strict=True) if t]
        known = any(part.data_ptr() in copies for part in self._parts)
        if not known and self.numel() * self.element_size() <= sum(new):
            self._make_value()
            return
        both = zip(self._parts, taken, strict=True)
        self._parts = [copied(part, copies) if t else part for part, t in both]
        self._gathered = False
        self._versions = [part._version for part in self._parts]

    @property
    def _stale(self) -> bool:
        return [part._version for part in self._parts] != self._versions

    @property
    def _without_weight(self) -> bool:
        return not all(part.untyped_storage().size() for part in self._parts if part.numel())

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # `make` is no code to trace
    def _compute(self) -> Tensor:
        """The logits. Raises RuntimeError if the head was freed, or written to unseen."""
        if self._value is not None:
            return self._value
        if self._freed or self._without_weight:
            raise RuntimeError(
                "the values of the logits are read after fully_shard has freed the head's weight, "
                "and with loss_chunks they are computed when they are read; read them before "
                "backward and pass reshard_after_forward=False to fully_shard for the module of "
                "the head, or compile with loss_chunks=False"
            )
        if self._stale:
            raise RuntimeError(
                "the values of the logits are read after the head's weight was written to outside "
                "of an optimizer's step, and with loss_chunks they are computed when they are "
                "read; read them before that, or compile with loss_chunks=False"
            )
        self._read(_reader())
        return self._make_value()

    def _make_value(self) -> Tensor:
        known, origin = self._shared.values, self._shared.origin()
        if known is None and origin is not None and origin is not self:
            origin._make_value()
            known = self._shared.values
        if known is None:
            # Whatever context they are read in: later reads find the same values.
            plain = torch.autograd.graph.saved_tensors_hooks(_same, _same)
            with torch.inference_mode(False), torch.set_grad_enabled(self._differentiable), plain:
                known = self._make(*self._parts)
            self._shared.values = known.detach()
        for hook in self._hooks:
            hook.on_values(known)
        self._value = known
        return known

    @property
    def _differentiable(self) -> bool:
        with torch._C.DisableTorchFunctionSubclass():
            return self.requires_grad


class _Hook:
    """The handle of a hook on the gradient of logits, whether their values have it or not."""

    def __init__(self, logits: LazyLogits, hook: Callable[[Tensor], Tensor | None]) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            self.handles = [_hooked(logits, hook)]  # raises where there is no gradient
        self.hook, self.logits = hook, weakref.ref(logits)
        logits._hooks.append(self)
        if logits._value is not None:
            self.on_values(logits._value)

    def on_values(self, values: Tensor) -> None:
        self.handles.append(_hooked(values, self.hook))

    def remove(self) -> None:
        logits = self.logits()
        if logits is not None and self in logits._hooks:
            logits._hooks.remove(self)
        for handle in self.handles:
            handle.remove()


def _hooked(tensor: Any, hook: Any) -> Any:
    return tensor.register_hook(hook)


def _same(tensor: Tensor) -> Tensor:
    return tensor


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
    made = lazily(
        lambda *parts: make(*parts).to(dtype), parts, dtype, logits._read, logits._gathered
    )
    made._versions, made._freed = logits._versions, logits._freed
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
    @torch.autograd.function.once_differentiable
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
    gathered: bool = False,
) -> LazyLogits:
    """Logits that `make(*parts)` computes: parts are h (..., D), w (V, D) and perhaps a bias.

    `read` is called with the file and line of what first reads the values; gathered: fully_shard
    manages w.
    """
    call: Any = _Made.apply
    made: LazyLogits = call(make, dtype, *parts)
    made._make, made._parts, made._read, made._value = make, list(parts), read, None
    made._versions = [part._version for part in parts]
    made._gathered, made._freed = gathered, False
    made._shared, made._hooks = Shared(weakref.ref(made)), []
    follow(made)
    return made
