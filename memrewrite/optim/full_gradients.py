"""Optimizers other than torch's Adam get full gradients before they step.

A ProjectedGrad is of the full shape to eager code, but not to a compiler: torchao's
optimizers compile their own step, and anybody may compile another's. So the small
gradients of whatever such an optimizer steps become plain tensors first, and those that a
closure computes within the step as soon as they are there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from memrewrite.gradients.gradient import ProjectedGrad
from memrewrite.optim.attachment import members

NO_FULLGRAPH = (
    "memrewrite looks at the gradients around every optimizer step; compile the step without "
    "fullgraph=True"
)


def uncompiled(hook: Callable[..., Any]) -> Any:
    """A hook around optimizer steps that no compiler traces; a step around it may be compiled."""
    return torch.compiler.disable(hook, reason=NO_FULLGRAPH)  # type: ignore[no-untyped-call]


def give_full_gradients(
    optimizer: Optimizer, args: Any, kwargs: dict[str, Any], told: Callable[[], None]
) -> tuple[Any, dict[str, Any]] | None:
    """Make the small gradients dense; returns the arguments of a step with a closure.

    told: is called ahead of it, whenever there may be any.
    """

    def make_dense() -> None:
        told()
        for _, parameter in members(optimizer):
            if isinstance(parameter.grad, ProjectedGrad):
                parameter.grad = parameter.grad.to_dense()

    make_dense()
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return None

    @functools.wraps(closure)
    def densely(*given: Any, **named: Any) -> Any:
        loss = closure(*given, **named)
        make_dense()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": densely}
    return (args[0], densely, *args[2:]), kwargs
