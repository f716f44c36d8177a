"""Moments in a storage format: entries of an optimizer's state, and the update of a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from memrewrite.moments.moment import MOMENTS, Moment
from memrewrite.moments.optimizers import Flags, Row
from memrewrite.moments.update import same_storage, wide
from passes.base import Pass
from passes.lower import lower_ir_ops
from passes.update.store import Form, store_moments

FIRST = 2  # argument position of the first moment in a captured update


@dataclass(frozen=True)
class Held:
    """Moments of one shape in a form. dtype: of the weight, to which `load_state_dict` casts."""

    moment: Moment
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def keys(self) -> list[str]:
        """Their keys in the state, in the order of the update's inputs."""
        return [key for name in self.names for key in self.moment.keys(name)]

    def zeros(self, device: torch.device | str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        like = torch.empty((), dtype=self.dtype, device=device).expand(self.shape)
        for name in self.names:
            found |= self.entries(name, self.moment.zeros(like, name=name))
        return found

    def store(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The entries for moments in full."""
        found: dict[str, Tensor] = {}
        for name, value in moments.items():
            written = self.moment.write(value.to(wide(self.dtype)), name=name)
            found |= self.entries(name, written)
        return found

    def whole(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The moments in full, in the dtype of the update."""
        parts = iter(self.inputs(state))
        how: dict[str, Any] = {"shape": self.shape, "dtype": wide(self.dtype)}
        found = {}
        for name in self.names:
            stored = tuple(next(parts) for _ in self.moment.parts)
            found[name] = self.moment.read(_unpacked(stored), name=name, **how)
        return found

    def inputs(self, state: Mapping[str, Tensor], fresh: bool = False) -> list[Tensor]:
        """The tensors of a state, not as their bytes; fresh: other tensors of their storage."""
        found = []
        for key, dtype in _dtypes(self).items():
            kept = state[key]
            last = kept.shape[-1:].numel() * kept.itemsize // dtype.itemsize
            shape = (*kept.shape[:-1], last) if kept.ndim else ()
            same = kept.dtype == dtype and not fresh
            found.append(kept if same else same_storage(kept, shape, dtype))
        return found

    def forms(self, first: int = FIRST) -> dict[int, Form]:
        """The form of each moment of a captured update, by its argument position."""
        return {
            first + i: Form(self.moment.name, *_functions(self.moment, name))
            for i, name in enumerate(self.names)
        }

    def take_over(self, state: dict[str, Any], what: str) -> bool:
        """Convert loaded state: of this form, cast by `load_state_dict`; or of moments in full.

        Returns whether any was in full. Raises ValueError for anything else, before it writes.
        """
        zeros, found, full = self.zeros("meta"), dict[str, Tensor](), dict[str, Tensor]()
        for name in self.names:
            keys = self.moment.keys(name)
            known = all(k in state and state[k].shape == zeros[k].shape for k in keys)
            cast = {k: state[k].to(zeros[k].dtype) for k in keys} if known else {}
            if cast and all(torch.equal(cast[k].to(state[k].dtype), state[k]) for k in keys):
                found |= cast
                continue
            full[name] = state.get(name)  # type: ignore[assignment]
            if not isinstance(full[name], Tensor) or full[name].shape != self.shape:
                shapes = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor)}
                raise ValueError(
                    f"the optimizer's state of {what} has tensors {shapes}: neither moments as "
                    f"{self.moment.name!r} stores them nor full-size ones; compile with the "
                    "options of the run that saved it, or start with a new optimizer"
                )
        state.update(found | self.store(full))
        return bool(full)

    def entries(self, name: str, stored: Any) -> dict[str, Tensor]:
        """The entries of a state for what `write` returned for one moment."""
        kept = [t.view(torch.uint8) if self._as_bytes(t) else t for t in _packed(stored)]
        return dict(zip(self.moment.keys(name), kept, strict=True))

    def _as_bytes(self, part: Tensor) -> bool:
        longer = part.is_floating_point() and part.itemsize > self.dtype.itemsize
        return longer and part.ndim > 0 and part.is_contiguous()


@cache  # read in every step
def _dtypes(held: Held) -> dict[str, torch.dtype]:
    """Of each entry, before it is kept as its bytes."""
    like = torch.empty(held.shape, dtype=held.dtype, device="meta")
    zeros = (_packed(held.moment.zeros(like, name=name)) for name in held.names)
    parts = [part for stored in zeros for part in stored]
    return {key: part.dtype for key, part in zip(held.keys, parts, strict=True)}


def take_back(
    state: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> str | None:
    """Replace moments that a registered form stores in several tensors by moments in full.

    shapes: of the moments in full. Returns the name of the form, or None where there is none.
    """
    for make in MOMENTS.values():
        form, full = make(), dict[str, Tensor]()
        for name, shape in shapes.items():
            held = Held(form, (name,), shape, dtype)
            zeros = held.zeros("meta")
            if len(zeros) > 1 and all(
                k in state and state[k].shape == zeros[k].shape for k in zeros
            ):
                cast = {key: state[key].to(zeros[key].dtype) for key in zeros}
                full |= {n: t.to(dtype) for n, t in held.whole(cast).items()}
        if shapes and full.keys() == shapes.keys():
            for key in (key for name in shapes for key in form.keys(name)):
                del state[key]
            state.update(full)
            return form.name
    return None


def stored_from_here(moment: Moment, what: str) -> str:
    """The message where `take_over` found moments in full."""
    form = f"they are stored as {moment.name!r} from here on"
    return f"the optimizer held moments of {what} in full: {form}"


def full_from_here(form: str | None) -> str:
    """The message where `take_back` found moments in a form, or ""."""
    return f"moments that were stored as {form!r} are in full from here on" if form else ""


def _packed(stored: Any) -> tuple[Tensor, ...]:
    return stored if isinstance(stored, tuple) else (stored,)


def _unpacked(stored: tuple[Tensor, ...]) -> Any:
    return stored if len(stored) > 1 else stored[0]


def _functions(moment: Moment, name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def read(*tensors: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return moment.read(_unpacked(tensors), name=name, shape=shape, dtype=dtype)

    def write(value: Tensor) -> Any:
        return moment.write(value, name=name)

    return read, write


@dataclass(frozen=True)
class StoredKind:
    """Everything that identifies such an update; see `moments.update.Kind`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    flags: Flags
    row: Row
    moment: Moment
    dynamic: bool = False  # the weight is rows of `moment.row`, and `shape` is an example

    def held(self, shape: tuple[int, ...]) -> Held:
        """The moments of a weight of this kind, of that shape."""
        return Held(self.moment, tuple(self.row.moments_of(self.flags)), shape, self.dtype)

    def zeros(self, weight: Tensor) -> dict[str, Tensor]:
        return self.held(tuple(weight.shape)).zeros(weight.device)

    def rewrite(self, gm: GraphModule) -> list[Pass]:
        """The passes that replace each moment's input by those of its parts."""
        key = (self.moment, self.shape, self.dtype)
        store = store_moments(self.held(self.shape).forms(), wide(self.dtype), key)
        return [*self.row.inputs, *self.row.lowering, store, lower_ir_ops()]
