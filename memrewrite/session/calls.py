"""Count the training calls of a compiled model, and those that ran no rewritten graph.

Dynamo decides for each call whether compiled code runs; where it does not, the model runs
eagerly, trains correctly, and saves no memory. Each cause is warned of once, with its remedy,
and the report counts such calls. Where the cause may be temporary (an exception, a profiler's
mode), Dynamo is made to try the next call again.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memrewrite.errors import warn
from memrewrite.session import skipping

WINDOW = 100  # latest calls that the report counts
LOOKS = 8  # times per model that Dynamo is made to try again, which traces it each time
log = logging.getLogger(__name__)


@dataclass
class Calls:
    """The training calls of one model, and which of them ran eagerly (missed)."""

    called: bool = False  # Dynamo has captured something
    ran: int = 0  # rewritten training graphs that were called
    failure: str = ""  # of the latest compile
    foreign: bool = False  # a graph was called with other parameters than the model's
    total: int = 0
    missed: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))
    looks: int = LOOKS
    raised: int = 0  # exceptions
    warned: set[str] = field(default_factory=set)  # kinds of cause
    cause: str = ""  # of the last miss

    def count(self, training: bool, foreign: bool) -> None:
        """Count a call of a captured graph."""
        if foreign:
            self.foreign = True
        else:
            self.ran += training

    def recent(self) -> tuple[int, int]:
        """(missed, all) of the latest calls, at most WINDOW."""
        return sum(n > self.total - WINDOW for n in self.missed), min(self.total, WINDOW)

    def line(self) -> str:
        """A line for the report; "" where no call missed."""
        missed, recent = self.recent()
        if not missed:
            return ""
        return f"{missed} of the last {recent} calls did not run the rewritten graph: {self.cause}"


def watched(
    model: weakref.ref[nn.Module],
    calls: Calls,
    call: Callable[..., Any],
    compiled: Callable[..., Any],
) -> Any:
    """A wrapper that counts the calls of `compiled`, which compiles `call`.

    An outer compiler traces through it, as through `compiled`.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return compiled(*args, **kwargs)
        before = calls.ran
        try:
            result = compiled(*args, **kwargs)
        except Exception as error:
            _raised(calls, error)
            raise
        if calls.ran != before:
            calls.total += 1
        elif torch.is_grad_enabled():
            _missed(model(), calls, call, result)
        return result

    skipping.exempt(run)
    return run


def _raised(calls: Calls, error: Exception) -> None:
    """Undo that Dynamo skips frames for good after an exception in them."""
    calls.raised += 1
    if calls.looks:
        calls.looks -= 1
        skipping.look_again(skipping.ran_as_they_are(error.__traceback__))


def _missed(model: nn.Module | None, calls: Calls, call: Any, result: Any) -> None:
    if model is None or skipping.traced_by_jit() or not _trains(model, result):
        return
    calls.total += 1
    calls.missed.append(calls.total)
    raised = 0 if calls.looks else calls.raised
    cause = skipping.why(model, call.__code__, calls.failure, calls.foreign, raised)
    calls.foreign = False
    if cause.passing and calls.looks:
        calls.looks -= 1
        skipping.look_again([call.__code__, *skipping.forwards(model)])
    calls.cause = f"{cause.reason}; {cause.remedy}"
    log.info("a call of %s ran eagerly: %s", type(model).__name__, calls.cause)
    if cause.kind not in calls.warned:
        calls.warned.add(cause.kind)
        warn(
            f"a training call of {type(model).__name__} did not run the rewritten graph, so it "
            f"keeps all activations and its gradients are full: {calls.cause}. memrewrite.report "
            "counts such calls"
        )


def _trains(model: nn.Module, result: Any) -> bool:
    """Whether a call with gradients enabled was for training, by its result and parameters."""
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    if tensors and not any(tensor.requires_grad for tensor in tensors):
        return False
    return any(p.requires_grad for p in model.parameters())
