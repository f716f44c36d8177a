"""What logits that are alive at an optimizer's step keep, so that they can be read after it.

The step writes to the weight that they would be computed from. Before it they keep the smaller
of a copy of that weight, which all logits made from it share, and their values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Copies = dict[int, Tensor]  # by the address of what is copied


class Keeping(Protocol):
    """Logits without values; see `memrewrite.loss.lazy`."""

    def _keep(self, written: set[int], copies: Copies) -> None: ...


_living = WeakTensorKeyDictionary()


def follow(logits: Tensor) -> None:
    """Let `logits` keep what they are made of at the next step, if they are then alive."""
    _living[logits] = None


def keep_before(parameters: Iterable[Tensor]) -> None:
    """Called before something writes to these parameters."""
    if not len(_living):
        return
    written = {parameter.data_ptr() for parameter in parameters} - {0}
    copies: Copies = {}
    for logits in list(_living):
        logits._keep(written, copies)


def copied(part: Tensor, copies: Copies) -> Tensor:
    """A copy of `part`, which passes its gradient on to it."""
    known = copies.get(part.data_ptr())
    if known is None or (part.requires_grad and not known.requires_grad):
        with torch.enable_grad():
            known = copies[part.data_ptr()] = part.clone()
    return known if part.requires_grad else known.detach()
