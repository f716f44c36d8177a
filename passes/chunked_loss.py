"""A linear and its cross entropy, chunk by chunk: the logits are never whole.  [exact]

    before                                   after
    z = f(linear(h, w, bias))                loss, dh, dw, db = chunked_loss(h, w, bias, y)
    loss = cross_entropy(z, y)

Identity: rows are independent. With p = softmax(z) and t the smoothed one-hot target of a row,

    loss = sum_i (logsumexp(z_i) - t_i . z_i) / c   dz_i = (p_i - t_i) / c
    dh = f'(dz) w      dw = f'(dz)^T h      db = f'(dz)^T 1

so that a chunk of rows yields its loss, its rows of dh, and its terms of dw and db; the next chunk
reuses its memory. c is 1, or for a mean the number of labels that are not ignored. Backward
multiplies the gradients by that of the loss, usually 1: no more matmuls than before, and no other
rounding. f is a chain of scales and tanh (logit scale, soft cap). A method that compresses the
input of the head (`passes.joint.velora`) lets dw read x in place of h; nothing else reads x.
Source: Luo et al. 2024, MiniSequence (arXiv 2407.15892); gradients in the forward as in Liger
(arXiv 2410.10989).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

# Where the number of chunks is not given: matmuls of fewer rows are slow, larger chunks free less.
CHUNK_ROWS, CHUNK_BYTES, LARGEST = 256, 2**23, 2**25  # bytes of a chunk's logits
Results = tuple[Tensor, Tensor, Tensor, Tensor]


def rows_of_chunk(rows: int, vocabulary: int, itemsize: int, chunks: int) -> int:
    """Rows per chunk; chunks = 0 chooses them."""
    if chunks:
        return max(1, math.ceil(rows / chunks))
    return min(rows, rows_by_bytes(vocabulary * itemsize))


def rows_by_bytes(row: int) -> int:
    """Rows per chunk of logits that take `row` bytes a row."""
    return max(1, CHUNK_BYTES // row, min(CHUNK_ROWS, LARGEST // row))


def workspace_of(node: Node) -> Any:
    """Bytes that are alive within the operation: z and an exponential, and dw before rounding."""
    values: list[Any] = [n.meta["val"] if isinstance(n, Node) else n for n in node.args]
    h, w, upcast, chunks = (values[i] for i in (0, 1, 5, 9))
    x = values[X] if len(values) > X else None
    wide = torch.promote_types(h.dtype, torch.float32)
    itemsize = (wide if upcast else h.dtype).itemsize
    by_bytes = rows_by_bytes(w.shape[0] * itemsize)
    rows = -(-h.shape[0] // chunks) if chunks else by_bytes  # (a minimum would guard N)
    width = (h if x is None else x).shape[1]
    rounded = w.shape[0] * width * wide.itemsize if w.dtype != wide else 0
    return 2 * rows * w.shape[0] * itemsize + rounded


def chunked_loss(
    h: Tensor,  # (N, D)
    w: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    steps: Sequence[float],
    upcast: bool,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    chunks: int,
    trained: bool,
    x: Tensor | None = None,  # (N, G)
) -> Results:
    """The loss, and its gradients of h, w and bias.

    `steps` are f: a number scales by it, 0.0 is tanh. Sums over chunks are float32 at least.
    Without `trained`, the gradients of w and bias are empty. With `x`, dw is f'(dz)^T x (V, G).
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    inner = wide if upcast else h.dtype
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    x = h if x is None else x
    dw = torch.zeros((w.shape[0], x.shape[1]) if trained else (0,), dtype=wide, device=w.device)
    db = torch.zeros(w.shape[0] if _moves(bias, trained) else 0, dtype=wide, device=w.device)
    total = torch.zeros((), dtype=wide, device=h.device)
    count = (labels != ignore_index).sum().to(wide) if mean else torch.ones_like(total)
    rows = rows_of_chunk(h.shape[0], w.shape[0], inner.itemsize, chunks)
    parts = (torch.split(t, rows) for t in (h, x, dh, labels))
    for part, read, mine, y in zip(*parts, strict=True):
        z = torch.nn.functional.linear(part, w, bias).to(inner)  # (rows, V)
        slopes = _forward(z, steps)
        loss, dz = _loss(z, y, ignore_index, label_smoothing, count)
        total += loss
        dz = _backward(dz, steps, slopes).to(h.dtype)
        torch.mm(dz, w, out=mine)
        if trained and wide == dz.dtype:
            dw.addmm_(dz.t(), read)
        elif trained:
            dw += dz.t() @ read
        if _moves(bias, trained):
            db += dz.sum(0, dtype=wide)
    return (total / count if mean else total).to(inner), dh, dw.to(w.dtype), db.to(w.dtype)


def _moves(bias: Tensor | None, trained: bool) -> bool:
    return bias is not None and trained


def _forward(z: Tensor, steps: Sequence[float]) -> list[Tensor]:
    """Apply f to z in place; returns the outputs of its tanh."""
    outputs = []
    for step in steps:
        if step:
            z.mul_(step)
        else:
            outputs.append(z.tanh_().clone())
    return outputs


def _backward(dz: Tensor, steps: Sequence[float], outputs: list[Tensor]) -> Tensor:
    for step in reversed(steps):
        dz = dz.mul_(step) if step else dz.mul_(1 - outputs.pop().square_())
    return dz


def _loss(
    z: Tensor, y: Tensor, ignored: int, smoothing: float, count: Tensor
) -> tuple[Tensor, Tensor]:
    """The summed cross entropy of z (rows, V); its gradient / count, which overwrites z."""
    vocabulary = z.shape[1]
    kept = (y != ignored).unsqueeze(1)  # (rows, 1)
    y = torch.where(kept, y.unsqueeze(1), 0)
    lse = z.logsumexp(1, keepdim=True)
    target = (1 - smoothing) * z.gather(1, y)  # raises for a label out of range, as eager does
    if smoothing:
        target = target + smoothing / vocabulary * z.sum(1, keepdim=True)
    loss = torch.where(kept, lse - target, 0).sum()
    dz = z.sub_(lse).exp_()
    if smoothing:
        dz -= smoothing / vocabulary
    dz.scatter_add_(1, y, torch.full_like(lse, smoothing - 1))
    return loss, dz.div_(count).masked_fill_(~kept, 0)


def _shapes(
    h: Tensor, w: Tensor, bias: Tensor | None, *rest: Any, x: Tensor | None = None
) -> Results:
    upcast, trained = rest[2], rest[7]
    x = rest[8] if len(rest) > 8 else x
    wide = torch.promote_types(h.dtype, torch.float32)
    db = w.new_empty(w.shape[0] if _moves(bias, trained) else 0)
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    width = w.shape[1] if x is None else x.shape[1]
    dw = w.new_empty((w.shape[0], width) if trained else (0,))
    return h.new_empty((), dtype=wide if upcast else h.dtype), dh, dw, db


def _keep(ctx: Any, inputs: Any, output: Results) -> None:
    ctx.trained, ctx.biased = inputs[10], _moves(inputs[2], inputs[10])
    ctx.save_for_backward(*output[1:])


def _scaled(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
    dh, dw, db = ((d.to(g.dtype) * g).to(d.dtype) for d in ctx.saved_tensors)
    return dh, dw if ctx.trained else None, db if ctx.biased else None, *[None] * 9


_Library: Any = torch.library.Library
_library = _Library("memrewrite", "FRAGMENT")
_library.define(
    "chunked_loss(Tensor h, Tensor w, Tensor? bias, Tensor labels, float[] steps, bool upcast, "
    "int ignore_index, float label_smoothing, bool mean, int chunks, bool trained, "
    "Tensor? x=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("chunked_loss", chunked_loss, "CompositeExplicitAutograd")
torch.library.register_fake("memrewrite::chunked_loss", _shapes, lib=_library)
torch.library.register_autograd(
    "memrewrite::chunked_loss", _scaled, setup_context=_keep, lib=_library
)
op = torch.ops.memrewrite.chunked_loss.default
DW, X = 2, 11  # positions of dw among the results, and of x among the arguments
