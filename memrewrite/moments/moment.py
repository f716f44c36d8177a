"""Moments in a storage format, read and written within the update of the optimizer.

    class BF16(memrewrite.Moment):
        name = "bf16"

        def write(self, value, *, name):
            return value.bfloat16()

        def read(self, stored, *, name, shape, dtype):
            return stored.to(dtype)

    memrewrite.compile(model, moments=BF16())

`read` runs before the update and returns its compute dtype, `write` runs after it; both are
traced into the graph, once per kind of weight. State in `optimizer.state[p]`: `step`, and per
moment of the optimizer (`exp_avg`, ...) one plain tensor for each of `parts`, under the moment's
name with that suffix. `load_state_dict` casts floats to the dtype of the weight: a part of more
bytes a number, such as a float32 scale of a bfloat16 weight, is kept as its bytes, in uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from memrewrite.moments.update import wide
from memrewrite.sites.sharded import is_sharded


class Moment:
    """A storage format for moments. Subclass it: set `name`, define `read` and `write`.

    parts: suffixes of the tensors that store one moment. row: if given, a weight whose size it
    divides is updated as a matrix of rows of that length, which `read` and `write` then get: one
    compiled update serves all such weights. projectors: also GaLore's projectors are stored in
    this form, under the name "projector". Instances with equal attributes are equal, and share
    a compiled update.
    """

    name: ClassVar[str] = ""
    parts: ClassVar[tuple[str, ...]] = ("",)
    row: ClassVar[int | None] = None
    projectors: ClassVar[bool] = False

    def declines(self, weight: Tensor) -> str | None:
        """The reason not to use this format for the moments of a weight, or None."""
        return None

    def zeros(self, like: Tensor, *, name: str) -> Any:
        """The stored form of a moment of zeros with the shape of `like`."""
        return self.write(torch.zeros_like(like, dtype=wide(like.dtype)), name=name)

    def read(self, stored: Any, *, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The moment, of that shape and dtype, from its stored tensor, or tuple of tensors."""
        raise NotImplementedError

    def write(self, value: Tensor, *, name: str) -> Any:
        """The tensor, or tuple of tensors, to store for a moment (float32 or float64)."""
        raise NotImplementedError

    def bytes_of(self, weight: Tensor, names: Sequence[str]) -> int:
        """Bytes of these moments of a weight."""
        meta = weight.detach().to("meta")
        stored = [self.zeros(meta, name=name) for name in names]
        parts = [p for one in stored for p in (one if isinstance(one, tuple) else (one,))]
        return sum(part.nbytes for part in parts)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), repr(sorted(vars(self).items()))))

    def keys(self, name: str) -> list[str]:
        """Keys of one moment's tensors in an optimizer's state."""
        return [f"{name}{part}" for part in self.parts]


def stores(form: Moment | None, weight: Tensor) -> bool:
    """Whether a form stores the moments of a weight: not of a scalar or a quantised wrapper."""
    if form is None or not weight.ndim or not weight.is_floating_point():
        return False
    if hasattr(weight, "__tensor_flatten__") and not is_sharded(weight):
        return False
    return form.declines(weight) is None


MOMENTS: dict[str, Callable[[], Moment]] = {}  # by the name for `moments=`


def moment_of(moments: object) -> Moment | None:
    """The format of `moments=`. Raises TypeError or ValueError where it is none."""
    if moments is None:
        return None
    known = ", ".join(map(repr, MOMENTS)) or "none"
    if isinstance(moments, str):
        if moments not in MOMENTS:
            raise ValueError(f"moments={moments!r} is not registered; known: {known}")
        return MOMENTS[moments]()
    if isinstance(moments, Moment):
        if not moments.name:
            raise ValueError(f"{type(moments).__name__} has no name: set the attribute `name`")
        return moments
    raise TypeError(
        f"moments={moments!r} is a {type(moments).__name__}; pass a memrewrite.Moment, or the "
        f"name of a registered one ({known})"
    )
