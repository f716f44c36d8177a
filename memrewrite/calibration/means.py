"""Which batch calibrates a v: the first usable one; until then v is provisional.

A batch whose input holds inf or NaN (an overflow that a GradScaler skips), or is all zeros
(an expert without a token, a gate that starts at zero), has no direction. Its v is ones / sqrt(M)
provisionally, and later batches are tried: the second, the third, then each power of two, so that
an input that stays zero costs nothing in the long run; and the next one after an optimizer steps
on a gradient that is not zero. Sub-tokens that add up to zero without being zero have no mean:
there v is ones permanently.

Every decision is made on sums over all ranks, so that all ranks make the same one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memrewrite.errors import warn

CANCELS = 1e-12  # relative to the sum of |x|: a smaller float64 sum is rounding error
NOT_FINITE, ZEROS = "holds inf or NaN", "is all zeros"
OPPOSITE = "the sub-tokens of its input add up to zero"
UNSEEN = "calibration could not see x"
FAILED = "what x needs cannot be run twice"
SKIPPED = "left out"
NEEDS_NONE = "init='ones' or 'random' needs no calibration"
WAITS = (
    "this batch cannot calibrate {}: the input {}. v is ones / sqrt(M) for now, and is calibrated "
    f"by a later usable batch; memrewrite.report shows which are not calibrated. {NEEDS_NONE}"
)
WORDS = {
    OPPOSITE: "no v for {}: {}, so it is ones / sqrt(M). " + NEEDS_NONE,
    FAILED: "no v for {}: calibration runs what their inputs need once more, without gradients; {}"
    f". v is ones / sqrt(M), and training continues. {NEEDS_NONE}; or leave them out of sites",
    SKIPPED: "a batch is left out of the running mean of {}: the input {}. v does not change; "
    "further ones are skipped silently",
}


@dataclass
class Means:
    """The weights of one model, by name, whose v is ones, and the reasons."""

    provisional: dict[str, Tensor] = field(default_factory=dict)  # name -> its provisional v
    tried: dict[str, int] = field(default_factory=dict)  # name -> batches tried
    reasons: dict[str, str] = field(default_factory=dict)
    late: list[Tensor] = field(default_factory=list)  # v that replaced a provisional one
    asked: set[str] = field(default_factory=set)  # names to try with the next batch
    warned: set[str] = field(default_factory=set)  # kinds of warning that were given

    def judge(self, name: str, norm: float, absolute: float, seen: bool) -> bool:
        """Whether v is final; norm: of the sum of x, absolute: the sum of |x|."""
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
        """Forget a provisional v: a running sum has replaced it."""
        self.reasons.pop(name, None)
        self.provisional.pop(name, None)

    def forget(self) -> None:
        """Reset after a state is loaded, except that no warning is repeated."""
        for one in (self.provisional, self.tried, self.reasons, self.late, self.asked):
            one.clear()

    def is_due(self, calls: int, names: Iterable[str]) -> bool:
        """Whether to try the batch of this call; `calls` starts at 1."""
        return calls <= 3 or calls & (calls - 1) == 0 or not self.asked.isdisjoint(names)

    def sentence(self, name: str) -> str:
        """Why v is ones, for a report; "" where it is not."""
        reason = self.reasons.get(name)
        if reason is None:
            return ""
        if reason not in (NOT_FINITE, ZEROS):
            return f"v is ones, because {reason}"
        return f"v is ones until a batch can calibrate it ({self.tried[name]} tried: x {reason})"

    def stepped(self, v: Tensor, coordinates: Tensor) -> None:
        """An optimizer steps on a gradient in v: if v is provisional, try the next batch."""
        name = next((n for n, one in self.provisional.items() if one is v), None)
        if name is not None and not distributed() and bool(coordinates.any()):
            self.asked.add(name)

    def warn(self, names: Sequence[str], failure: str) -> None:
        """Warn once per reason why these weights have no calibrated v."""
        for reason in (NOT_FINITE, ZEROS, OPPOSITE):
            found = [name for name in names if self.reasons.get(name) == reason]
            if found:
                self._once(reason, WORDS.get(reason, WAITS).format(_listed(found), reason))
        unseen = [name for name in names if self.reasons.get(name) == UNSEEN]
        if unseen and failure:
            self.reasons |= dict.fromkeys(unseen, f"{FAILED} ({failure})")
            self._once(FAILED, WORDS[FAILED].format(_listed(unseen), failure))

    def warn_of_skipped(self, names: Sequence[str]) -> None:
        """Warn once that running means skip a batch."""
        if names:
            self._once(SKIPPED, WORDS[SKIPPED].format(_listed(names), NOT_FINITE))

    def _once(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            warn(message)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def over_ranks(rows: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Sums over a group, in one call per device, so that all ranks get the same v."""
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
    """The number of ranks that train one model together; 1 for group None."""
    return 1 if group is None else torch.distributed.get_world_size(group)


def distributed() -> bool:
    """Whether other ranks may run the same program."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
