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
input of the head (`passes.joint.velora`) lets dw read x in place of h; nothing else reads x. A
projection of the gradient (`passes.joint.push`) lets it be dw P = f'(dz)^T (h P) in that way, or

    P^T dw = (f'(dz) P)^T h

Autocast computes the linear in a lower precision than that of h, w and bias. These are rounded to
it as there, w and bias once for all chunks; f'(dz) is, for the two matmuls. What autocast rounds
besides, the gradients themselves, is not rounded: sums over chunks are float32, as w is.

In float16, dz / c would underflow before the loss scale reaches it. So c divides the float32
sums instead, and dz is scaled by the power of two r that lets the largest number that f'(dz) can
hold, f's own scales, be 2^15:

    dh = (r f'(dz) w) / (r c)      dw = (r f'(dz)^T h) / (r c)

Legal because r is exact, |p_i - t_i| <= 1 and |tanh'| <= 1: nothing overflows, and what underflows
is within two bits of what does under the largest loss scale at which no row can overflow. The
gradients stay float32 until backward has multiplied them by that of the loss, in which the loss
scale is, so that they are rounded to float16 once, and where plain autograd rounds them.
Source: Luo et al. 2024, MiniSequence (arXiv 2407.15892); gradients in the forward as in Liger
(arXiv 2410.10989).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

# Where the number of chunks is not given: bytes of a chunk's logits, and its rows. Matmuls of
# fewer rows are slow, those of more no faster.
CHUNK_BYTES, LEAST_ROWS, MOST_ROWS = 2**25, 64, 512
Results = tuple[Tensor, Tensor, Tensor, Tensor]


def rows_of_chunk(rows: int, vocabulary: int, itemsize: int, chunks: int) -> int:
    """Rows per chunk; chunks = 0 chooses them."""
    if chunks:
        return max(1, math.ceil(rows / chunks))
    return min(rows, rows_by_bytes(vocabulary * itemsize))


def rows_by_bytes(row: int) -> int:
    """Rows per chunk of logits that take `row` bytes a row."""
    return max(LEAST_ROWS, min(MOST_ROWS, CHUNK_BYTES // row))


def workspace_of(node: Node) -> Any:
    """Bytes that are alive within the operation in addition to its results."""
    values: list[Any] = [n.meta["val"] if isinstance(n, Node) else n for n in node.args]
    h, w, upcast, chunks = (values[i] for i in (0, 1, 5, 9))
    x, compute, p = ([*values, None, None, None])[X : X + 3]
    compute = compute or h.dtype
    wide = torch.promote_types(compute, torch.float32)
    itemsize = (wide if upcast or compute == torch.float16 else compute).itemsize
    by_bytes = rows_by_bytes(w.shape[0] * itemsize)
    rows = -(-h.shape[0] // chunks) if chunks else by_bytes  # (a minimum would guard N)
    height = w.shape[0] if p is None else p.shape[1]
    width = (h if x is None else x).shape[1]
    sums = height * width * (wide.itemsize - _kept(w, compute).itemsize)
    low = w.numel() * compute.itemsize if w.dtype != compute else 0
    low += w.numel() * wide.itemsize if compute == torch.float16 else 0
    other = rows * w.shape[0] * compute.itemsize if compute.itemsize != itemsize else 0
    return rows * w.shape[0] * itemsize + other + sums + low


def operations_of(node: Node) -> Any:
    """Operations (a multiply-add is two) of its matmuls: the logits, dh and dw, 2 N V D each."""
    h, w = (arg.meta["val"] for arg in node.args[:2])  # type: ignore[union-attr]
    return 6 * h.numel() * w.shape[0]


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
    compute: torch.dtype | None = None,
    p: Tensor | None = None,  # (V, R)
) -> Results:
    """The loss, and its gradients of h, w and bias.

    `steps` are f: a number scales by it, 0.0 is tanh. `upcast`: the loss is computed in float32.
    `compute` is the dtype of the linear, by default that of h. Sums over chunks are float32 at
    least. Without `trained`, the gradients of w and bias are empty. With `x`, dw is f'(dz)^T x,
    and with `p`, p^T f'(dz)^T x.
    """
    x, compute, biased = h if x is None else x, compute or h.dtype, _moves(bias, trained)
    wide, half = torch.promote_types(compute, torch.float32), compute == torch.float16
    inner = wide if upcast or half else compute
    zeros = partial(torch.zeros, dtype=wide, device=h.device)
    dh = torch.empty(h.shape, dtype=_kept(h, compute), device=h.device)
    height = w.shape[0] if p is None else p.shape[1]
    dw = zeros((height, x.shape[1]) if trained else (0,))
    db, total = zeros(w.shape[0] if biased else 0), zeros(())
    count = (labels != ignore_index).sum().to(wide) if mean else torch.ones_like(total)
    divisor = torch.full_like(count, 1 / _room(steps)) if half else count
    low, bias_low = w.to(compute), None if bias is None else bias.to(compute)
    rows = rows_of_chunk(h.shape[0], w.shape[0], inner.itemsize, chunks)
    parts = (torch.split(t, rows) for t in (h, x, dh, labels))
    with torch.autocast(h.device.type, enabled=False):
        for part, read, mine, y in zip(*parts, strict=True):
            z = F.linear(part.to(compute), low, bias_low).to(inner)  # (rows, V)
            slopes = apply_steps(z, steps)
            total += _loss(z, y, ignore_index, label_smoothing, divisor)  # z becomes dz
            z = multiply_slopes(z, steps, slopes).to(compute)
            product(mine, z, low)
            if trained:
                add_product(dw, _across(z, p, wide), read.to(compute))
            if biased:
                db += z.sum(0, dtype=wide)
            del z, slopes  # before the next chunk is allocated
    for d in (dh, dw, db) if half else ():
        d.mul_(divisor / count.clamp(min=1))
    loss = (total / count if mean else total).to(wide if upcast else compute)
    kept = _kept(w, compute), _kept(w if bias is None else bias, compute)
    return loss, dh, dw.to(kept[0]), db.to(kept[1])


def _kept(t: Tensor, compute: torch.dtype) -> torch.dtype:
    """The dtype in which the gradient of t waits for backward."""
    waits = t.dtype == compute != torch.float16
    return t.dtype if waits else torch.promote_types(compute, torch.float32)


def _room(steps: Sequence[float]) -> float:
    """r; see the module's docstring."""
    largest = math.prod(abs(step) for step in steps if step)
    return 2.0 ** (15 - math.ceil(math.log2(largest)))


def _across(dz: Tensor, p: Tensor | None, wide: torch.dtype) -> Tensor:
    """dz^T (V, rows), or (dz p)^T (R, rows), which of float16 may be too large for float16."""
    if p is None:
        return dz.t()
    small = torch.empty(dz.shape[0], p.shape[1], dtype=wide, device=dz.device)
    product(small, dz, p.to(dz.dtype))
    return small.t()


def product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b; of float16 it may be too large for float16."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.dtype != torch.float16:
        out.copy_(a @ b)  # rounded as by autocast
    elif out.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, in the dtype of out."""
    if a.dtype != out.dtype and out.is_cuda:  # in parts: out may be large
        rows = max(1, CHUNK_BYTES // (out.shape[1] * out.itemsize))
        for mine, left in zip(torch.split(out, rows), torch.split(a, rows), strict=True):
            mine += torch.mm(left, b, out_dtype=out.dtype)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def _moves(bias: Tensor | None, trained: bool) -> bool:
    return bias is not None and trained


def apply_steps(z: Tensor, steps: Sequence[float]) -> list[Tensor]:
    """Apply f to z in place; returns the outputs of its tanh."""
    outputs = []
    for step in steps:
        if step:
            z.mul_(step)
        else:
            outputs.append(z.tanh_().clone())
    return outputs


def multiply_slopes(dz: Tensor, steps: Sequence[float], outputs: list[Tensor]) -> Tensor:
    for step in reversed(steps):
        dz = dz.mul_(step) if step else dz.mul_(1 - outputs.pop().square_())
    return dz


def _loss(z: Tensor, y: Tensor, ignored: int, smoothing: float, divisor: Tensor) -> Tensor:
    """The summed cross entropy of z (rows, V); its gradient / divisor overwrites z."""
    vocabulary = z.shape[1]
    kept = (y != ignored).unsqueeze(1)  # (rows, 1)
    y = torch.where(kept, y.unsqueeze(1), 0)
    target = (1 - smoothing) * z.gather(1, y)  # raises for a label out of range, as eager does
    if smoothing:
        target = target + smoothing / vocabulary * z.sum(1, keepdim=True)
    largest = z.amax(1, keepdim=True)
    total = z.sub_(largest).exp_().sum(1, keepdim=True)
    loss = torch.where(kept, largest + total.log() - target, 0).sum()
    share = torch.where(kept, 1 / divisor, 0)
    z.mul_(share / total)
    if smoothing:
        z.sub_(share * (smoothing / vocabulary))
    z.scatter_add_(1, y, share * (smoothing - 1))
    return loss


def _shapes(
    h: Tensor,
    w: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    steps: Sequence[float],
    upcast: bool,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    chunks: int,
    trained: bool,
    x: Tensor | None = None,
    compute: torch.dtype | None = None,
    p: Tensor | None = None,
) -> Results:
    compute = compute or h.dtype
    wide = torch.promote_types(compute, torch.float32)
    height = w.shape[0] if p is None else p.shape[1]
    width = w.shape[1] if x is None else x.shape[1]
    dh = torch.empty(h.shape, dtype=_kept(h, compute), device=h.device)
    dw = w.new_empty((height, width) if trained else (0,), dtype=_kept(w, compute))
    biased = w if bias is None else bias
    db = biased.new_empty(w.shape[0] if _moves(bias, trained) else 0, dtype=_kept(biased, compute))
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
    return dh, dw if ctx.trained else None, db if ctx.biased else None, *[None] * 11


def _times(d: Tensor, g: Tensor) -> Tensor:
    wide = torch.promote_types(d.dtype, g.dtype)
    return d.to(wide) * g.to(wide)


_Library: Any = torch.library.Library
_library = _Library("memrewrite", "FRAGMENT")
_library.define(
    "chunked_loss(Tensor h, Tensor w, Tensor? bias, Tensor labels, float[] steps, bool upcast, "
    "int ignore_index, float label_smoothing, bool mean, int chunks, bool trained, "
    "Tensor? x=None, ScalarType? compute=None, Tensor? p=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("chunked_loss", chunked_loss, "CompositeExplicitAutograd")
torch.library.register_fake("memrewrite::chunked_loss", _shapes, lib=_library)
torch.library.register_autograd(
    "memrewrite::chunked_loss", _scaled, setup_context=_keep, lib=_library
)
op = torch.ops.memrewrite.chunked_loss.default
DW, X, P = 2, 11, 13  # positions of dw among the results, and of x and p among the arguments


def x_of(node: Node) -> Any:
    """What dw reads in place of h, or None."""
    return node.args[X] if len(node.args) > X else None


def projected(node: Node) -> bool:
    """Whether dw is p^T f'(dz)^T x."""
    return len(node.args) > P and node.args[P] is not None


def arguments_with(node: Node, **others: Any) -> list[Any]:
    """The arguments of a call with another `x` or `p`."""
    found = [*node.args, *[None] * (P + 1 - len(node.args))]
    for name, value in others.items():
        found[{"x": X, "p": P}[name]] = value
    return found
