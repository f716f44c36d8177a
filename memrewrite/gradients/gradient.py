"""ProjectedGrad: a gradient of full shape that stores coordinates and a basis.

`W.grad` of a ported weight. It has W's shape, dtype and device, and takes a fraction of its
bytes. Linear operations and the norm act on the coordinates; any other operation gets the
dense value, so that any optimizer, hook or logger sees the gradient that it expects:

    small   + - += -= of gradients with the same basis, * / by a number, neg, zero_, norm (2),
            clip_grad_norm_, GradScaler's unscaling, clone, detach, copy_, to
    dense   everything else. An in-place operation of that kind, such as clip_grad_value_,
            makes a ProjectedGrad dense from then on (`is_dense`). So does a write through a
            view, `g[0] = 0` or `g.view(-1).mul_(2)`. `detach` and `data` share their value
            with the gradient, as for any tensor.

It is pickled as its dense value, so that a file with one loads without memrewrite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from memrewrite.gradients.basis import Basis

aten = torch.ops.aten


class _Held:
    """The value of a gradient, shared by it and its `detach` and `data`."""

    def __init__(self, coordinates: Tensor) -> None:
        self.coordinates: Tensor | None = coordinates
        self.value: Tensor | None = None  # dense value: if dense, or if a view of it may exist
        self.views: list[tuple[Tensor, int]] = []  # of `value`, with their versions when made


class ProjectedGrad(Tensor):
    """ProjectedGrad(coordinates, basis, shape), made by `Port`; see the module's docstring."""

    basis: Basis
    _held: _Held

    @staticmethod
    def __new__(cls, coordinates: Tensor, basis: Basis, shape: Sequence[int]) -> ProjectedGrad:
        made: Any = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=coordinates.dtype, device=coordinates.device
        )
        made._held, made.basis = _Held(coordinates), basis
        return made  # type: ignore[no-any-return]

    def __init__(self, coordinates: Tensor, basis: Basis, shape: Sequence[int]) -> None:
        super().__init__()

    @property
    def coordinates(self) -> Tensor | None:
        """The coordinates, such as A (O, G); None if the value is dense."""
        held = self._held
        if any(view._version != seen for view, seen in held.views):
            held.coordinates, held.views = None, []  # a view was written to
        return held.coordinates

    @property
    def is_dense(self) -> bool:
        """Whether an operation has stored a value that is no longer coordinates in the basis."""
        return self.coordinates is None

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """The gradient as a plain tensor, (O, D)."""
        small, value = self.coordinates, self._held.value
        return self.basis.dense(small, self.shape) if value is None else value  # type: ignore[arg-type]

    @property
    def data(self) -> Any:
        """As `.data` of any tensor; assigning to it replaces the value."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self._become(value.detach())

    def numpy(self, *, force: bool = False) -> Any:
        return self.to_dense().numpy(force=force)

    def tolist(self) -> Any:
        return self.to_dense().tolist()

    @property
    def stored_bytes(self) -> int:
        """Bytes of its storage, excluding the basis."""
        return sum(t.nbytes for t in self.held())

    def held(self) -> list[Tensor]:
        """The plain tensors that store it, excluding the basis."""
        return [t for t in (self.coordinates, self._held.value) if t is not None]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        shape, dtype = tuple(self.shape), str(self.dtype).removeprefix("torch.")
        if self.coordinates is None:
            return f"ProjectedGrad(shape={shape}, dtype={dtype}, dense)"
        return (
            f"ProjectedGrad(shape={shape}, dtype={dtype}, "
            f"coordinates={tuple(self.coordinates.shape)}, {self.basis})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: Any = self.to_dense()
        return plain.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        known = _SMALL.get(func)
        if known is not None:
            result = known(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _densely(func, args, kwargs)

    # --- helpers of the handlers below ---
    def _with(self, coordinates: Tensor) -> ProjectedGrad:
        return ProjectedGrad(coordinates, self.basis, self.shape)

    def _same(self) -> ProjectedGrad:
        """Another tensor with the same value: a write to either changes both."""
        other = self._with(self.held()[0])
        other._held = self._held
        return other

    def _viewed(self, value: Tensor, result: Any) -> None:
        """Keep track of views of `value`, whose writes change the gradient."""
        leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self._held.value = value
        self._held.views += [(leaf, leaf._version) for leaf in leaves]

    def _become(self, value: Tensor) -> None:
        """Store a dense value."""
        held = self._held
        held.coordinates, held.value, held.views = None, value, []


# --- operations on coordinates -----------------------------------------------------------


def _small(value: object) -> bool:
    return isinstance(value, ProjectedGrad) and value.coordinates is not None


def _alone(value: object) -> bool:
    """Small, without a view of its dense value: its coordinates may be written in place."""
    return isinstance(value, ProjectedGrad) and _small(value) and value._held.value is None


def _number(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)


def _mapped(op: Callable[..., Tensor]) -> Callable[..., Any]:
    """A linear operation, out of place: op(coordinates)."""

    def handle(g: Any, *args: Any, **kwargs: Any) -> Any:
        if not _small(g) or not all(map(_number, args)):
            return NotImplemented
        return g._with(op(g.coordinates, *args))

    return handle


def _mapped_in_place(op: Callable[..., Tensor]) -> Callable[..., Any]:
    def handle(g: Any, *args: Any, **kwargs: Any) -> Any:
        if not _alone(g) or not all(map(_number, args)):
            return NotImplemented
        op(g.coordinates, *args)
        return g

    return handle


def _combined(op: Callable[..., Tensor], in_place: bool) -> Callable[..., Any]:
    """A linear operation on two gradients in one basis."""

    def handle(g: Any, other: Any, *, alpha: float = 1) -> Any:
        if not (_small(g) and _small(other) and g.basis.same(other.basis)):
            return NotImplemented
        if in_place and not _alone(g):
            return NotImplemented
        if g.shape != other.shape:
            return NotImplemented
        result = op(g.coordinates, other.coordinates, alpha=alpha)
        return g if in_place else g._with(result)

    return handle


def _clone(g: Any, *, memory_format: Any = None) -> Any:
    return g._with(g.coordinates.clone()) if _small(g) else NotImplemented


def _to_copy(g: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    if not _small(g) or (dtype is not None and not dtype.is_floating_point):
        return NotImplemented
    moved = g.coordinates.to(device=device, dtype=dtype, copy=True)
    return ProjectedGrad(moved, g.basis.to(moved.device), g.shape)


def _copy_(g: Any, source: Any, non_blocking: bool = False) -> Any:
    if not (_alone(g) and _small(source) and g.basis.same(source.basis)):
        return NotImplemented
    g.coordinates.copy_(source.coordinates, non_blocking)
    return g


def _norm(
    g: Any, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if not _small(g) or ord != 2 or dim is not None or keepdim:
        return NotImplemented
    return torch.linalg.vector_norm(g.basis.isometric(g.coordinates, g.shape), dtype=dtype)


def _new_empty_strided(g: Any, size: Any, stride: Any, **kwargs: Any) -> Any:
    """Called by autograd to clone the first gradient of a parameter."""
    if not _small(g) or tuple(size) != tuple(g.shape) or kwargs.get("dtype", g.dtype) != g.dtype:
        return NotImplemented
    return g._with(torch.empty_like(g.coordinates))


def _empty_like(make: Callable[..., Tensor]) -> Callable[..., Any]:
    """A plain tensor of the full shape, by an operation that reads no values."""

    def handle(g: Any, *, dtype: Any = None, layout: Any = None, device: Any = None,
               pin_memory: Any = None, memory_format: Any = None) -> Any:  # fmt: skip
        return make(g.shape, dtype=dtype or g.dtype, device=device or g.device)

    return handle


def _each(op: Callable[..., Any], in_place: bool) -> Callable[..., Any]:
    """A foreach operation, one tensor at a time, as only some may be a ProjectedGrad."""

    def handle(tensors: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        count = len(tensors)
        spread = [a if isinstance(a, list | tuple) else [a] * count for a in args]
        results = [op(t, *rest, **kwargs) for t, *rest in zip(tensors, *spread, strict=True)]
        return None if in_place else results

    return handle


def _unscale(tensors: Sequence[Any], found_inf: Tensor, inverse: Tensor) -> None:
    plain = [g.coordinates if _alone(g) else _written_into(g) for g in tensors]
    torch._amp_foreach_non_finite_check_and_unscale_(plain, found_inf, inverse)


def _written_into(value: Any) -> Any:
    if isinstance(value, ProjectedGrad):
        value._become(value.to_dense())
        return value.to_dense()
    return value


def _foreach_norm(tensors: Sequence[Any], ord: float = 2, dtype: Any = None) -> list[Tensor]:
    return [torch.linalg.vector_norm(t, ord, dtype=dtype) for t in tensors]


_SMALL: dict[Any, Callable[..., Any]] = {
    aten.detach.default: ProjectedGrad._same,
    aten.alias.default: ProjectedGrad._same,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.neg.default: _mapped(torch.neg),
    aten.neg_.default: _mapped_in_place(torch.neg_),
    aten.mul.Tensor: _mapped(torch.mul),
    aten.mul.Scalar: _mapped(torch.mul),
    aten.mul_.Tensor: _mapped_in_place(Tensor.mul_),
    aten.mul_.Scalar: _mapped_in_place(Tensor.mul_),
    aten.div.Tensor: _mapped(torch.div),
    aten.div.Scalar: _mapped(torch.div),
    aten.div_.Tensor: _mapped_in_place(Tensor.div_),
    aten.div_.Scalar: _mapped_in_place(Tensor.div_),
    aten.zero_.default: _mapped_in_place(torch.zero_),
    aten.add.Tensor: _combined(torch.add, in_place=False),
    aten.add_.Tensor: _combined(Tensor.add_, in_place=True),
    aten.sub.Tensor: _combined(torch.sub, in_place=False),
    aten.sub_.Tensor: _combined(Tensor.sub_, in_place=True),
    aten.linalg_vector_norm.default: _norm,
    aten.new_empty_strided.default: _new_empty_strided,
    aten.empty_like.default: _empty_like(torch.empty),
    aten.zeros_like.default: _empty_like(torch.zeros),
    aten._foreach_norm.Scalar: _foreach_norm,
    aten._foreach_mul_.Tensor: _each(Tensor.mul_, in_place=True),
    aten._foreach_mul_.Scalar: _each(Tensor.mul_, in_place=True),
    aten._foreach_div_.Scalar: _each(Tensor.div_, in_place=True),
    aten._foreach_div_.Tensor: _each(Tensor.div_, in_place=True),
    aten._foreach_zero_.default: _each(torch.zero_, in_place=True),
    aten._foreach_neg_.default: _each(torch.neg_, in_place=True),
    aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
}


# --- operations on the dense value ----------------------------------------------------------


def _densely(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operation on dense values; operands that it writes to become dense."""
    written, viewed = _touched(func, args, kwargs)
    values: dict[int, Tensor] = {}

    def value(item: Any) -> Any:
        if not isinstance(item, ProjectedGrad):
            return item
        if id(item) not in values:
            values[id(item)] = item.to_dense()
        return values[id(item)]

    plain_args, plain_kwargs = pytree.tree_map(value, (tuple(args), kwargs))
    result = func(*plain_args, **plain_kwargs)
    returned = {id(values[id(g)]): g for g in written}
    for gradient in written:
        gradient._become(values[id(gradient)])
    for gradient in viewed:
        if not gradient.is_dense:
            gradient._viewed(values[id(gradient)], result)
    return pytree.tree_map(lambda r: returned.get(id(r), r), result)


def _touched(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[ProjectedGrad], list[ProjectedGrad]]:
    """By the operation's schema: (operands that it writes to, operands that it views)."""
    written: list[ProjectedGrad] = []
    viewed: list[ProjectedGrad] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            leaves = [g for g in pytree.tree_leaves(given) if isinstance(g, ProjectedGrad)]
            (written if argument.alias_info.is_write else viewed).extend(leaves)
    return written, viewed
