"""Optimizers other than torch's Adam get full gradients before they step.

A ProjectedGrad has the full shape in eager code, but a compiler cannot trace it, and torchao's
optimizers, for example, compile their step. So the small gradients of such an optimizer's
parameters are replaced by plain tensors before the step, and after each call of its closure.
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
    """A hook that no compiler traces, though the optimizer's step may be compiled."""
    return torch.compiler.disable(hook, reason=NO_FULLGRAPH)  # type: ignore[no-untyped-call]


def give_full_gradients(
    optimizer: Optimizer, args: Any, kwargs: dict[str, Any], warn: Callable[[], None]
) -> tuple[Any, dict[str, Any]] | None:
    """Expand the small gradients; returns the new arguments of a step that has a closure.

    warn: called before that, whenever there may be small gradients.
    """

    def make_dense() -> None:
        warn()
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
