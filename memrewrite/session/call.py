"""What torch.compile is given in place of a module: a function of our own."""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn

_serial = itertools.count()


def call_of(model: nn.Module) -> Any:
    """A function of our own around the module's call.

    Dynamo skips frames of torch.nn, so compiling a stock module's own call compiles
    nothing. Each model gets a code object of its own, because Dynamo counts recompiles
    per code object: two models must not use up one limit.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return type(model)._call_impl(model, *args, **kwargs)  # type: ignore[no-untyped-call]

    name = f"call_{type(model).__name__}_{next(_serial)}"
    call.__code__ = call.__code__.replace(co_name=name)
    return call
