"""Which batch a v is made of: the first that can be used, and what is used until then.

A batch whose input holds inf or NaN (an overflow that a GradScaler will skip), or is all zeros
(an expert without a token, a branch that starts closed), tells nothing of a direction. Its v is
ones / sqrt(M) for the time being, and later batches are tried: the second, the third, and then
each power of two, so that an input of zeros costs nothing in the long run; and the next one where
an optimizer steps on a gradient that is no longer zero. Sub-tokens that are not zero and yet add
up to it have no mean: there v is ones for good.

All of this is decided on sums over all ranks, so that all ranks decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memrewrite.errors import warn

CANCELS = 1e-12  # of the sum of |x|: below it, a float64 sum is rounding
NOT_FINITE, ZEROS = "holds inf or NaN", "is all zeros"
OPPOSITE = "the sub-tokens of its input add up to zero"
UNSEEN = "calibration could not see x"
FAILED = "what x needs cannot be run twice"
SKIPPED = "left out"
NEEDS_NONE = "init='ones' or 'random' needs no calibration"
WAITS = (
    "this batch cannot calibrate {}: the input {}. v is ones / sqrt(M) for now, and is made of a "
    f"later batch that can be used; memrewrite.report says what still waits. {NEEDS_NONE}"
)
WORDS = {
    OPPOSITE: "no v for {}: {}, so it is ones / sqrt(M). " + NEEDS_NONE,
    FAILED: "no v for {}: calibration runs what their inputs need once more, without gradients; {}"
    f". v is ones / sqrt(M), and training goes on. {NEEDS_NONE}; or leave them out of sites",
    SKIPPED: "a batch is left out of the running mean of {}: the input {}. v stays what it was; "
    "further ones are left out silently",
}


@dataclass
class Means:
    """The weights of one model, by name, whose v is ones, and why."""

    provisional: dict[str, Tensor] = field(default_factory=dict)  # v until a batch can be used
    tried: dict[str, int] = field(default_factory=dict)  # batches so far
    reasons: dict[str, str] = field(default_factory=dict)
    late: list[Tensor] = field(default_factory=list)  # v that replaced a provisional one
    asked: set[str] = field(default_factory=set)  # to be tried with the next batch
    told: set[str] = field(default_factory=set)  # kinds of warning that were given

    def judge(self, name: str, norm: float, absolute: float, seen: bool) -> bool:
        """Whether there is nothing to wait for; norm: of the total, absolute: the sum of |x|."""
        self.asked.discard(name)
        self.tried[name] = self.tried.get(name, 0) + 1
        self.reasons.pop(name, None)
        if not seen:
            self.reasons[name] = UNSEEN
        elif not math.isfinite(norm) or not math.isfinite(absolute):
            self.reasons[name] = NOT_FINITE
        elif absolute == 0:
            self.reasons[name] = ZEROS
        elif norm <= CANCELS * absolute:
            self.reasons[name] = OPPOSITE
        return self.reasons.get(name) not in (NOT_FINITE, ZEROS)

    def usable(self, name: str) -> None:
        """A v came otherwise: from a running sum."""
        self.reasons.pop(name, None)
        self.provisional.pop(name, None)

    def forget(self) -> None:
        """A state was loaded; what was said once is not said again."""
        for one in (self.provisional, self.tried, self.reasons, self.late, self.asked):
            one.clear()

    def is_due(self, calls: int, names: Iterable[str]) -> bool:
        """Whether the batch of this call, from 1, is tried."""
        return calls <= 3 or calls & (calls - 1) == 0 or not self.asked.isdisjoint(names)

    def sentence(self, name: str) -> str:
        """Why v is ones, for a report; nothing where it is not."""
        reason = self.reasons.get(name)
        if reason is None:
            return ""
        if reason not in (NOT_FINITE, ZEROS):
            return f"v is ones, because {reason}"
        return f"v is ones until a batch can calibrate it ({self.tried[name]} tried: x {reason})"

    def stepped(self, v: Tensor, coordinates: Tensor) -> None:
        """An optimizer steps on a gradient in v: if that is provisional, hurry."""
        name = next((n for n, one in self.provisional.items() if one is v), None)
        if name is not None and not distributed() and bool(coordinates.any()):
            self.asked.add(name)

    def tell(self, names: Sequence[str], failure: str) -> None:
        """One warning for each thing that kept these from a v of their own."""
        for reason in (NOT_FINITE, ZEROS, OPPOSITE):
            found = [name for name in names if self.reasons.get(name) == reason]
            if found:
                self._once(reason, WORDS.get(reason, WAITS).format(_listed(found), reason))
        unseen = [name for name in names if self.reasons.get(name) == UNSEEN]
        if unseen and failure:
            self.reasons |= dict.fromkeys(unseen, f"{FAILED} ({failure})")
            self._once(FAILED, WORDS[FAILED].format(_listed(unseen), failure))

    def tell_of_skipped(self, names: Sequence[str]) -> None:
        """A running mean leaves a batch out."""
        if names:
            self._once(SKIPPED, WORDS[SKIPPED].format(_listed(names), NOT_FINITE))

    def _once(self, kind: str, message: str) -> None:
        if kind not in self.told:
            self.told.add(kind)
            warn(message)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def over_ranks(rows: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Sums over a group, in one call a device: other v there would average unlike gradients."""
    if not rows or ranks(group) == 1:
        return list(rows)
    summed: list[Tensor] = list(rows)
    for device in dict.fromkeys(row.device for row in rows):
        places = [i for i, row in enumerate(rows) if row.device == device]
        flat = torch.cat([rows[i] for i in places])
        torch.distributed.all_reduce(flat, group=group)
        parts = torch.split(flat, [len(rows[i]) for i in places])
        for i, part in zip(places, parts, strict=True):
            summed[i] = part
    return summed


def ranks(group: Any) -> int:
    """That train one model together; group: None for a process alone."""
    return 1 if group is None else torch.distributed.get_world_size(group)


def distributed() -> bool:
    """Whether other ranks may run the same program."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
