"""Compressor: define a method for `compile(model, activations=...)` by two functions of tensors.

    class BF16(memrewrite.Compressor):
        name = "bf16"

        def declines(self, x):
            return None if x.dtype == torch.float32 else f"it is {x.dtype}"

        def compress(self, x):
            return x.bfloat16()

        def reconstruct(self, z, *, shape, dtype):
            return z.to(dtype)

    memrewrite.compile(model, activations=BF16())

Weight gradients then read reconstruct(compress(x)); everything else reads x. Both functions are
traced on fake tensors, once per graph: they must not write to their arguments or depend on
values. After `memrewrite.register("bf16", BF16)`, `activations="bf16"` means the same.
"""

from __future__ import annotations

import hashlib
import inspect
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from memrewrite.methods.method import Chosen, Context, Method, Task
from memrewrite.sites.options import Sites
from memrewrite.sites.select import select
from memrewrite.sites.weights import Site, Weight
from passes.base import Pass
from passes.joint.compress import Codec, compress_activations


class Compressor(Method):
    """Subclass it: set `name`, define `compress` and `reconstruct`, optionally `declines`.

    name: its name in options, reports and dumps. sites: the weights whose inputs are compressed,
    as in `VeLoRA`. Parameters of an instance must show in its attributes or its `repr`: instances
    that are equal in these share a compiled graph.
    """

    sites: Any = "all"  # as in VeLoRA

    def compress(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The tensor, or tuple of tensors, to save for backward in place of x (N, D)."""
        raise NotImplementedError

    def reconstruct(self, z: Any, *, shape: tuple[int, ...], dtype: Any) -> Tensor:
        """x^, of the given shape and dtype, from what `compress` returned."""
        raise NotImplementedError

    @property
    def kept(self) -> str:  # type: ignore[override]
        return f"x in {self.name}"

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.name, _source(type(self)), repr(sorted(vars(self).items())))

    def select(self, found: Sequence[Weight]) -> set[str]:
        sites: Sites = type(self).sites if callable(self.sites) else self.sites
        return select(list(found), sites)

    def choose(self, model: nn.Module, found: Sequence[Weight]) -> Chosen:
        chosen = self.select(found) if found else set()
        taken: Chosen = {}
        for weight in found:
            if weight.name in chosen and self.why_not(weight) is None:
                taken.setdefault(weight.parameter, Site(weight, weight.kind == "conv1d"))
        return taken

    def passes(self, task: Task, context: Context) -> list[Pass]:
        codec = Codec(
            self.name, self.declines, self.compress, self.reconstruct, context.decompositions
        )
        inputs: dict[int, tuple[int, ...]] = {ask.position: () for ask in task.asks}
        return [compress_activations(codec, inputs, context.weights, self.key)]


_sources: dict[type, str] = {}


def _source(kind: type) -> str:
    """A digest of a class's source, for the compile cache; random where there is no source."""
    if kind not in _sources:
        try:
            text = "".join(map(inspect.getsource, _own(kind)))
        except (OSError, TypeError):
            text = secrets.token_hex()
        _sources[kind] = hashlib.sha256(text.encode()).hexdigest()
    return _sources[kind]


def _own(kind: type) -> list[Callable[..., Any]]:
    return [base for base in kind.__mro__ if issubclass(base, Compressor) and base != Compressor]
