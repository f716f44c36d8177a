"""Undefined tangents, passed to a compiled backward as tensors with empty storage.

For every output that the caller did not differentiate, AOTAutograd has autograd materialize
zeros: of the size of the logits, for a model that returns them with its loss. Here
materialization is switched off, so that backward gets None, and its entry point, replaced once
per compile, passes a tensor with empty storage where `passes.joint.absent` allows it, and zeros
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memrewrite.compiler.backend import in_compiled_autograd
from passes.joint.absent import absent_like


def with_undefined_tangents(
    compiled: Callable[..., Any], outputs: Sequence[int]
) -> Callable[..., Any]:
    """The same program; the tangents of `outputs` may have empty storage."""
    if not outputs:
        return compiled

    def run(*args: Any) -> Any:
        results = compiled(*args)
        node = next((results[i].grad_fn for i in outputs if _is_compiled(results[i])), None)
        if node is None or in_compiled_autograd():
            return results
        mine = {r.output_nr for r in results if type(r) is Tensor and r.grad_fn is node}
        others = (m for i, m in enumerate(node._input_metadata) if i not in mine)
        if any(meta.shape for meta in others):  # only autograd can make zeros for these: a
            return results  # subclass, or an output that is not returned
        _accept_none(type(node)._forward_cls)
        node.given = mine
        node.may_be_absent = {results[i].output_nr for i in outputs if results[i].grad_fn is node}
        node.set_materialize_grads(False)
        return results

    return run


def _is_compiled(value: Any) -> bool:
    return hasattr(getattr(value, "grad_fn", None), "_forward_cls")


def _accept_none(function: Any) -> None:
    """Make the backward of a compiled function accept None where `ctx.given` says so."""
    if hasattr(function, "memrewrite_backward"):
        return
    function.memrewrite_backward = backward = function.backward

    def fill(ctx: Any, *gradients: Any) -> Any:
        boxed = len(gradients) == 1 and isinstance(gradients[0], list)  # as torch 2.13 calls it
        given = gradients[0] if boxed else list(gradients)
        for i in getattr(ctx, "given", ()):
            if given[i] is None:
                meta = ctx._input_metadata[i]
                make: Any = absent_like if i in ctx.may_be_absent else torch.zeros
                given[i] = make(torch.Size(meta.shape), dtype=meta.dtype, device=meta.device)
        return backward(ctx, given) if boxed else backward(ctx, *given)

    function.backward = staticmethod(fill)
