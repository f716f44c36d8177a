"""The function that torch.compile compiles in place of a module."""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn

_serial = itertools.count()


def call_of(model: nn.Module) -> Any:
    """A function that calls the module.

    Needed because Dynamo skips frames of torch.nn, so that compiling a torch.nn module's call
    compiles nothing. Each model has its own code object, because Dynamo limits recompiles per
    code object: two models must not share one limit.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return type(model)._call_impl(model, *args, **kwargs)  # type: ignore[no-untyped-call]

    name = f"call_{type(model).__name__}_{next(_serial)}"
    call.__code__ = call.__code__.replace(co_name=name)
    return call
