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
rounding. f is a chain of scales and tanh (logit scale, soft cap).

Autocast computes the linear in a lower precision than that of h, w and bias. These are rounded to
it as there, w and bias once for all chunks; f'(dz) is, for the two matmuls. What autocast rounds
besides, the gradients themselves, is not rounded: sums over chunks are float32, as w is.

In float16, dz / c would underflow before the loss scale reaches it. So c divides the float32
sums instead, and dz is scaled by the power of two r that lets the largest number that f'(dz) can
hold, f's own scales, be 2^15:

    dh = (r f'(dz) w) / (r c)      dw = (r f'(dz)^T h) / (r c)

Legal because r is exact and |p_i - t_i| <= 1. At least as precise as any loss scale at which no row
can overflow, since a row's scale is then at most 2 r. Gradients stay float32 until backward has
multiplied them by the incoming gradient, in which the loss scale is.
Source: Luo et al. 2024, MiniSequence (arXiv 2407.15892); gradients in the forward as in Liger
(arXiv 2410.10989).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Where the number of chunks is not given: matmuls of fewer rows are slow, larger chunks free less.
CHUNK_ROWS, CHUNK_BYTES, LARGEST = 256, 2**23, 2**25  # bytes of a chunk's logits
Results = tuple[Tensor, Tensor, Tensor, Tensor]


def rows_of_chunk(rows: int, vocabulary: int, itemsize: int, chunks: int) -> int:
    """Rows per chunk; chunks = 0 chooses them."""
    if chunks:
        return max(1, math.ceil(rows / chunks))
    row = vocabulary * itemsize
    return max(1, min(rows, max(CHUNK_BYTES // row, min(CHUNK_ROWS, LARGEST // row))))


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
    compute: torch.dtype | None = None,
) -> Results:
    """The loss, and its gradients of h, w and bias.

    `steps` are f: a number scales by it, 0.0 is tanh. `upcast`: the loss is computed in float32.
    `compute` is the dtype of the linear, by default that of h. Sums over chunks are float32 at
    least. Without `trained`, the gradients of w and bias are empty.
    """
    compute = compute or h.dtype
    wide, half = torch.promote_types(compute, torch.float32), compute == torch.float16
    inner = wide if upcast or half else compute
    dh = torch.empty(h.shape, dtype=_kept(h, compute), device=h.device)
    dw = torch.zeros(w.shape if trained else (0,), dtype=wide, device=w.device)
    db = torch.zeros(w.shape[0] if _moves(bias, trained) else 0, dtype=wide, device=w.device)
    total = torch.zeros((), dtype=wide, device=h.device)
    count = (labels != ignore_index).sum().to(wide) if mean else torch.ones_like(total)
    divisor = torch.full_like(count, 1 / _room(steps)) if half else count
    low, bias_low = w.to(compute), None if bias is None else bias.to(compute)
    rows = rows_of_chunk(h.shape[0], w.shape[0], inner.itemsize, chunks)
    with torch.autocast(h.device.type, enabled=False):
        for part, mine, y in zip(*(torch.split(t, rows) for t in (h, dh, labels)), strict=True):
            part = part.to(compute)
            z = torch.nn.functional.linear(part, low, bias_low).to(inner)  # (rows, V)
            slopes = _forward(z, steps)
            loss, dz = _loss(z, y, ignore_index, label_smoothing, divisor)
            total += loss
            dz = _backward(dz, steps, slopes).to(compute)
            _product(mine, dz, low)
            if trained:
                _add_product(dw, dz.t(), part)
            if _moves(bias, trained):
                db += dz.sum(0, dtype=wide)
    if half:
        for d in (dh, dw, db):
            d.mul_(divisor / count.clamp(min=1))
    loss = (total / count if mean else total).to(wide if upcast else compute)
    return (
        loss,
        dh,
        dw.to(_kept(w, compute)),
        db.to(_kept(bias if bias is not None else w, compute)),
    )


def _kept(t: Tensor, compute: torch.dtype) -> torch.dtype:
    """The dtype in which the gradient of t waits for backward."""
    waits = t.dtype == compute != torch.float16
    return t.dtype if waits else torch.promote_types(compute, torch.float32)


def _room(steps: Sequence[float]) -> float:
    """r; see the module's docstring."""
    largest = math.prod(abs(step) for step in steps if step)
    return 2.0 ** (15 - math.ceil(math.log2(largest)))


def _product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b, rounded to the dtype of out only."""
    if a.dtype != out.dtype and out.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, in the dtype of out."""
    if a.dtype != out.dtype and out.is_cuda:  # in parts: a product as large as out is not freed yet
        rows = max(1, LARGEST // (out.shape[1] * out.itemsize))
        for mine, left in zip(torch.split(out, rows), torch.split(a, rows), strict=True):
            mine += torch.mm(left, b, out_dtype=out.dtype)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


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
    z: Tensor, y: Tensor, ignored: int, smoothing: float, divisor: Tensor
) -> tuple[Tensor, Tensor]:
    """The summed cross entropy of z (rows, V); its gradient / divisor, which overwrites z."""
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
    return loss, dz.div_(divisor).masked_fill_(~kept, 0)


def _shapes(h: Tensor, w: Tensor, bias: Tensor | None, *rest: Any) -> Results:
    (upcast, *_, trained), compute = rest[2:8], rest[8] or h.dtype if len(rest) > 8 else h.dtype
    wide = torch.promote_types(compute, torch.float32)
    shape = w.shape[0] if _moves(bias, trained) else 0
    db = w.new_empty(shape, dtype=_kept(bias if bias is not None else w, compute))
    dh = torch.empty(h.shape, dtype=_kept(h, compute), device=h.device)
    dw = w.new_empty(w.shape if trained else (0,), dtype=_kept(w, compute))
    return h.new_empty((), dtype=wide if upcast else compute), dh, dw, db


def _keep(ctx: Any, inputs: Any, output: Results) -> None:
    (h, w, bias), trained = inputs[:3], inputs[10]
    ctx.trained, ctx.biased = trained, _moves(bias, trained)
    ctx.dtypes = h.dtype, w.dtype, (w if bias is None else bias).dtype
    ctx.save_for_backward(*output[1:])


def _scaled(ctx: Any, g: Tensor, *_: Any) -> tuple[Any, ...]:
    dh, dw, db = (
        _times(d, g).to(dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return dh, dw if ctx.trained else None, db if ctx.biased else None, *[None] * 9


def _times(d: Tensor, g: Tensor) -> Tensor:
    wide = torch.promote_types(d.dtype, g.dtype)
    return d.to(wide) * g.to(wide)


_Library: Any = torch.library.Library
_library = _Library("memrewrite", "FRAGMENT")
_library.define(
    "chunked_loss(Tensor h, Tensor w, Tensor? bias, Tensor labels, float[] steps, bool upcast, "
    "int ignore_index, float label_smoothing, bool mean, int chunks, bool trained, "
    "ScalarType? compute=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("chunked_loss", chunked_loss, "CompositeExplicitAutograd")
torch.library.register_fake("memrewrite::chunked_loss", _shapes, lib=_library)
torch.library.register_autograd(
    "memrewrite::chunked_loss", _scaled, setup_context=_keep, lib=_library
)
op = torch.ops.memrewrite.chunked_loss.default
