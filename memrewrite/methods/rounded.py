"""Saved activations in 8 or 4 bits.   [approximate]

    memrewrite.compile(model, activations="int8")
    memrewrite.compile(model, activations=memrewrite.Rounded(bits=4, group=16))

Whatever the forward saves is rounded, where what reads it in backward allows that; see
`passes.split.rounded`. The forward, and so the loss, is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memrewrite.methods.method import METHODS, Chosen, Context, Method, Task
from memrewrite.sites.weights import Weight
from passes.base import Pass
from passes.split.tolerance import Rounding


class Rounded(Method):
    """Save activations in `bits` each, of groups of channels with one scale.

    bits: 8 or 4. group: channels that share a bfloat16 scale, even. stochastic: round what only
    weight gradients read up or down at random, so that their mean is exact ("weight-gradients"),
    or everything to the nearest ("never").
    """

    compresses = False

    def __init__(
        self, bits: int = 8, group: int = 32, stochastic: str = "weight-gradients"
    ) -> None:
        if bits not in (8, 4):
            raise ValueError(f"bits={bits!r}: 8 or 4")
        if isinstance(group, bool) or not isinstance(group, int) or group < 2 or group % 2:
            raise ValueError(f"group={group!r}: an even number of channels")
        if stochastic not in ("weight-gradients", "never"):
            raise ValueError(f'stochastic={stochastic!r}: "weight-gradients" or "never"')
        self.bits, self.group, self.stochastic = bits, group, stochastic

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"int{self.bits}"

    @property
    def kept(self) -> str:  # type: ignore[override]
        return "rounded x"

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.name, self.rounding)

    @property
    def rounding(self) -> Rounding:  # type: ignore[override]
        return Rounding(self.bits, self.group, self.stochastic != "never")

    def __repr__(self) -> str:
        return f"Rounded(bits={self.bits}, group={self.group}, stochastic={self.stochastic!r})"

    def choose(self, model: Any, found: Sequence[Weight]) -> Chosen:
        """No weights: activations are chosen in each graph, by their readers."""
        return {}

    def passes(self, task: Task, context: Context) -> list[Pass]:
        return []


METHODS["int8"] = Rounded
METHODS["int4"] = lambda: Rounded(4)
