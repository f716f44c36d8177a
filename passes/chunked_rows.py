"""The losses of single rows, chunk by chunk, computed again in backward.  [exact]

    before                                        after
    z = f(linear(h, w, bias))                     losses, lse = chunked_loss_rows(h, w, bias, y)
    losses = cross_entropy(z, y, reduction="none")
    lse = logsumexp(z)                            backward, of g and k, the gradients of both:
                                                  dh, dw, db = chunked_loss_rows_backward(g, k, ...)

Identity: with p = softmax(z), t the target of a row, (1 - s) q_y at its label and s / V q_c
everywhere for class weights q and a label smoothing s, or 0 for an ignored row, and T = sum_c t_c,

    loss = T lse - t . z      dz = (g T + k) p - g t
    dh = f'(dz) w      dw = f'(dz)^T h      db = f'(dz)^T 1

Where each row has a gradient of its own, dw cannot be computed before it is known, as
`passes.chunked_loss` does: the logits of a chunk are computed again, a third more matmul
operations at the head. Nothing but h is kept. This serves losses per row, class weights, whose
mean is over q_y, and a second reader of the normaliser (z-loss). With one gradient for all rows
computing dw in forward is never worse: backward begins with it.
Source: z-loss as in PaLM (arXiv 2204.02311, section 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import functional as F

from passes import chunked_loss
from passes.chunked_loss import (
    add_product,
    apply_steps,
    multiply_slopes,
    product,
    rows_by_bytes,
    rows_of_chunk,
)


def losses_of_rows(
    h: Tensor,  # (N, D)
    w: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    classes: Tensor | None,  # (V,)
    steps: Sequence[float],
    upcast: bool,
    ignore_index: int,
    label_smoothing: float,
    chunks: int,
    trained: bool,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The loss of each row and the logsumexp of its logits, (N,) each.

    Arguments as in `chunked_loss`; `classes` are class weights.
    """
    inner = _inner(upcast, compute)
    losses, lse = (h.new_empty(h.shape[0], dtype=_outer(upcast, compute)) for _ in range(2))
    rows = rows_of_chunk(h.shape[0], w.shape[0], inner.itemsize, chunks)
    low, bias_low = w.to(compute), None if bias is None else bias.to(compute)
    parts = (torch.split(t, rows) for t in (h, labels, losses, lse))
    with torch.autocast(h.device.type, enabled=False):
        for part, y, loss, norm in zip(*parts, strict=True):
            z, _ = _logits(part, low, bias_low, inner, steps)
            label, spread, total = _target(y, classes, z, ignore_index, label_smoothing)
            t = label * z.gather(1, _index(y, ignore_index)).squeeze(1)
            if label_smoothing:
                t += spread * (z.sum(1) if classes is None else z.mv(classes.to(inner)))
            largest = z.amax(1, keepdim=True)
            norm.copy_(z.sub_(largest).exp_().sum(1).log_() + largest.squeeze(1))
            loss.copy_(total * norm - t)
            del z
    return losses, lse


def gradients_of_rows(
    g: Tensor,  # (N,)
    k: Tensor,  # (N,)
    h: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    classes: Tensor | None,
    steps: Sequence[float],
    upcast: bool,
    ignore_index: int,
    label_smoothing: float,
    chunks: int,
    trained: bool,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of h, w and bias for those of the losses, g, and of the logsumexp, k."""
    wide, inner = torch.promote_types(compute, torch.float32), _inner(upcast, compute)
    biased = bias is not None and trained
    dh = torch.empty(h.shape, dtype=wide if h.dtype != compute else compute, device=h.device)
    zeros = partial(torch.zeros, dtype=wide, device=h.device)
    dw, db = zeros(w.shape if trained else (0,)), zeros(w.shape[0] if biased else 0)
    rows = rows_of_chunk(h.shape[0], w.shape[0], inner.itemsize, chunks)
    low, bias_low = w.to(compute), None if bias is None else bias.to(compute)
    parts = (torch.split(t, rows) for t in (h, labels, g.to(inner), k.to(inner), dh))
    with torch.autocast(h.device.type, enabled=False):
        for part, y, one, other, mine in zip(*parts, strict=True):
            z, slopes = _logits(part, low, bias_low, inner, steps)
            label, spread, total = _target(y, classes, z, ignore_index, label_smoothing)
            z.sub_(z.amax(1, keepdim=True)).exp_()
            z.mul_(((one * total + other) / z.sum(1)).unsqueeze(1))
            if label_smoothing:
                share = (one * spread).unsqueeze(1)
                z.sub_(share) if classes is None else z.addmm_(
                    share, classes.to(inner)[None], alpha=-1
                )
            z.scatter_add_(1, _index(y, ignore_index), (-one * label).unsqueeze(1))
            z = multiply_slopes(z, steps, slopes).to(compute)
            product(mine, z, low)
            if trained:
                add_product(dw, z.t(), part.to(compute))
            if biased:
                db += z.sum(0, dtype=wide)
            del z, slopes
    return dh.to(h.dtype), dw.to(w.dtype), db.to((w if bias is None else bias).dtype)


def _logits(
    part: Tensor, w: Tensor, bias: Tensor | None, inner: torch.dtype, steps: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """Those of a chunk, (rows, V), and the outputs of its tanh."""
    z = F.linear(part.to(w.dtype), w, bias).to(inner)
    return z, apply_steps(z, steps)


def _outer(upcast: bool, compute: torch.dtype) -> torch.dtype:
    return torch.promote_types(compute, torch.float32) if upcast else compute


def _inner(upcast: bool, compute: torch.dtype) -> torch.dtype:
    return _outer(upcast or compute == torch.float16, compute)


def _index(y: Tensor, ignored: int) -> Tensor:
    return torch.where(y == ignored, 0, y).unsqueeze(1)  # (rows, 1)


def _target(
    y: Tensor, classes: Tensor | None, z: Tensor, ignored: int, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: its target at the label, that of a class of weight 1 elsewhere, and T."""
    kept = (y != ignored).to(z.dtype)
    spread = kept * (smoothing / z.shape[1])
    if classes is None:
        return (1 - smoothing) * kept, spread, kept  # smoothing / V, V times, is smoothing
    q = classes.to(z.dtype)
    label = (1 - smoothing) * kept * q[_index(y, ignored).squeeze(1)]
    return label, spread, label + spread * q.sum()


def _shapes(
    h: Tensor, w: Tensor, bias: Tensor | None, labels: Tensor, classes: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    dtype = _outer(rest[1], rest[6])
    return h.new_empty(h.shape[0], dtype=dtype), h.new_empty(h.shape[0], dtype=dtype)


def _gradient_shapes(
    g: Tensor, k: Tensor, h: Tensor, w: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    trained = rest[-2]
    biased = bias is not None and trained
    db = (w if bias is None else bias).new_empty(w.shape[0] if biased else 0)
    return h.new_empty(h.shape), w.new_empty(w.shape if trained else (0,)), db


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.rest = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _gradients(ctx: Any, g: Tensor, k: Tensor) -> tuple[Any, ...]:
    trained, bias = ctx.rest[-2], ctx.saved_tensors[2]
    dh, dw, db = backward_op(g, k, *ctx.saved_tensors, *ctx.rest)
    biased = trained and bias is not None
    return dh, dw if trained else None, db if biased else None, *[None] * 9


_ARGUMENTS = (
    "Tensor h, Tensor w, Tensor? bias, Tensor labels, Tensor? classes, float[] steps, bool upcast, "
    "int ignore_index, float label_smoothing, int chunks, bool trained, ScalarType compute"
)
_Library: Any = torch.library.Library
_library = _Library("memrewrite", "FRAGMENT")
_library.define(f"chunked_loss_rows({_ARGUMENTS}) -> (Tensor, Tensor)")
_library.define(
    f"chunked_loss_rows_backward(Tensor g, Tensor k, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)
_library.impl("chunked_loss_rows", losses_of_rows, "CompositeExplicitAutograd")
_library.impl("chunked_loss_rows_backward", gradients_of_rows, "CompositeExplicitAutograd")
torch.library.register_fake("memrewrite::chunked_loss_rows", _shapes, lib=_library)
torch.library.register_fake(
    "memrewrite::chunked_loss_rows_backward", _gradient_shapes, lib=_library
)
torch.library.register_autograd(
    "memrewrite::chunked_loss_rows", _gradients, setup_context=_keep, lib=_library
)
op = torch.ops.memrewrite.chunked_loss_rows.default
backward_op = torch.ops.memrewrite.chunked_loss_rows_backward.default


def calls(graph: Graph) -> Iterator[tuple[Node, Any, Any]]:
    """(call, bytes within it beside its results, operations) of every loss in chunks."""
    for node in graph.find_nodes(op="call_function", target=chunked_loss.op):
        yield node, chunked_loss.workspace_of(node), chunked_loss.operations_of(node)
    for target, first, products in ((op, 0, 1), (backward_op, 2, 3)):
        for node in graph.find_nodes(op="call_function", target=target):
            h, w, *_ = _values(node, first)
            yield node, _workspace(node, first), 2 * products * h.numel() * w.shape[0]


def _workspace(node: Node, first: int) -> Any:
    h, w, *rest = _values(node, first)
    upcast, chunks, trained, compute = (rest[i] for i in (4, 7, 8, 9))
    wide = torch.promote_types(compute, torch.float32)
    itemsize = _inner(upcast, compute).itemsize
    rows = -(-h.shape[0] // chunks) if chunks else rows_by_bytes(w.shape[0] * itemsize)
    low = w.numel() * compute.itemsize if w.dtype != compute else 0
    other = rows * w.shape[0] * compute.itemsize if compute.itemsize != itemsize else 0
    sums = w.numel() * wide.itemsize if first and trained and w.dtype != wide else 0
    return rows * w.shape[0] * itemsize + other + low + sums


def _values(node: Node, first: int) -> list[Any]:
    return [n.meta["val"] if isinstance(n, Node) else n for n in node.args[first:]]
