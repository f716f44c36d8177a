"""Save activations in few bits, where what reads them allows it.   [approximate]

    before                                    after
    forward:  x, saved (..., D)               forward:  x --> round --> codes (..., D), scales
    backward: x --> readers                   backward: codes, scales --> restore --> x^ --> readers

Identity: none; x^ is x with each group of g channels rounded to 2^b - 1 levels of its largest
value. The forward is exact. An error of x^ passes on as its readers do:

    matmuls of weight gradients only      into their gradients alone: rounded at random, so that
                                          the mean of the gradients is exact
    pointwise operations, reductions      (SiLU, GELU, norms) of the order of the error
    exp(x - y)                            of logits and their logsumexp: times e; stays exact
    anything else                         attention reads q, k and v beside their exact
                                          log-sum-exp, with which rounded ones disagree: exact

x^ is restored beside each reader, so that none is held. Source: group-wise rounding as in ActNN
(Chen et al. 2021, arXiv:2104.14129); the rule by readers: measured, docs/design.md.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import functional as F

from passes.base import CASTS, StandsFor, aten, base_of, stands_for, storage_root, tensor_bytes
from passes.emit import NONE, Decompositions, emit, provenance_of
from passes.noise import noise
from passes.split.recompute import MATMULS
from passes.split.saved import kept_for_backward, readers

LEAST = 2**14  # numbers below which a tensor is not worth two kernels
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = {aten.sum.dim_IntList, aten.mean.dim, aten.sum.default, aten.mean.default}


@dataclass(frozen=True)
class Rounding:
    """bits: 8 or 4. group: channels that share a scale. random: of what weight gradients read."""

    bits: int = 8
    group: int = 32
    random: bool = True

    @property
    def name(self) -> str:
        return f"int{self.bits}"


@dataclass(frozen=True)
class Decision:
    """What was done with one saved tensor; reason: why it is exact, or ""."""

    name: str
    reason: str
    before: Any  # bytes, symbolic under dynamic shapes
    after: Any


def round_saved(
    forward: Graph,
    backward: Graph,
    outputs: int,
    how: Rounding,
    free: Collection[int],
    table: Decompositions = NONE,
) -> list[Decision]:
    """Round what the forward saves, in place; returns what was done with each tensor of floats."""
    kept = kept_for_backward(forward, outputs, free)
    places = {node.name: node for node in backward.find_nodes(op="placeholder")}
    returned: Any = forward.output_node().args[0]
    held = {storage_root(n) for n in returned[:outputs] if isinstance(n, Node)}
    found = []
    for storage, views in kept.views.items():
        value = views[0].meta["val"]
        if value.dtype not in FLOATS or stands_for(base_of(views[0])) is not None:
            continue
        before = after = tensor_bytes(storage)
        place = places[views[0].name]
        reason = _read_exactly(backward, place) or _why_exact(storage, views, held)
        if reason is None:
            after = _round(forward, backward, views[0], place, how, table)
        found.append(Decision(views[0].name, reason or "", before, after))
    return found


def _why_exact(storage: Node, views: tuple[Node, ...], held: Collection[Node]) -> str | None:
    """Why a saved tensor stays exact, as far as the forward tells."""
    value = views[0].meta["val"]
    if isinstance(value.numel(), int) and value.numel() < LEAST:
        return "it is small"
    if storage.op == "placeholder" or storage in held:
        return "the caller holds it"
    if len(views) > 1:
        return "it is saved in two views"
    if not value.is_contiguous():
        return "it is not contiguous"
    return None


def _read_exactly(backward: Graph, place: Node) -> str | None:
    """The operation for which backward reads it exactly, or None."""
    for reader in readers(backward, [place]):
        target: Any = reader.target
        tags = getattr(target, "tags", ())
        known = target in CASTS or target in REDUCTIONS or target in MATMULS
        if reader.op == "output":
            return "backward returns it"
        if not known and torch.Tag.pointwise not in tags:
            return f"{getattr(target, 'overloadpacket', target)} reads it".removeprefix("aten.")
        if target is aten.sub.Tensor and any(u.target is aten.exp.default for u in reader.users):
            return "its exponential is read, of logits"
    return None


def _round(
    forward: Graph, backward: Graph, saved: Node, place: Node, how: Rounding, table: Decompositions
) -> Any:
    """Save codes and scales in place of a tensor; returns their bytes."""
    alone = all(reader.target in MATMULS for reader in readers(backward, [place]))
    mark = StandsFor(how.name, base_of(saved).name)
    meta = {**provenance_of(base_of(saved)), "stands_for": mark}
    value = saved.meta["val"]
    write = partial(round_groups, bits=how.bits, group=how.group, random=alone and how.random)
    codes = emit([saved], how.name, write, (), table, meta)
    for node in codes:
        node.meta["stands_for"] = StandsFor(how.name, mark.storage, kept=True)
        if saved.meta.get("saved_tensor_with_no_vc_check"):
            node.meta["saved_tensor_with_no_vc_check"] = True
    _return_instead(forward, saved, codes)
    handed = [_handed(place, node) for node in codes]
    read = partial(restore_groups, bits=how.bits, group=how.group, width=value.shape[-1])
    how_read = {**provenance_of(place), "stands_for": mark}
    for user in list(place.users):
        (restored,) = emit(handed, how.name, partial(read, dtype=value.dtype), (), table, how_read)
        user.replace_input_with(place, restored)
    backward.erase_node(place)
    for node, source in zip(handed, codes, strict=True):
        node.name = source.name
    return sum(tensor_bytes(node) for node in codes)


def _return_instead(forward: Graph, saved: Node, codes: list[Node]) -> None:
    output = forward.output_node()
    returned: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    at = len(returned) - 1 - returned[::-1].index(saved)
    output.args = ((*returned[:at], *codes, *returned[at + 1 :]),)
    for key in ("desc", "output_stack_traces"):
        if key in output.meta:
            entries = list(output.meta[key])
            output.meta[key] = entries[:at] + [None] * len(codes) + entries[at + 1 :]


def _handed(place: Node, source: Node) -> Node:
    """A placeholder of backward for a node that the forward saves."""
    with place.graph.inserting_before(place):
        handed = place.graph.placeholder(f"{source.name}_handed")
    handed.meta = {**place.meta, **source.meta}
    return handed


# --- the format -----------------------------------------------------------------------------------


def round_groups(x: Tensor, bits: int, group: int, random: bool) -> tuple[Tensor, Tensor]:
    """codes (..., D b / 8) and scales (..., D / g) bfloat16 of x (..., D); D is filled up to g.

    8 bits: int8. 4 bits: two codes a byte, of the first and the second half of a group.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    missing, top = -x.shape[-1] % group, 2 ** (bits - 1) - 1
    rows = (F.pad(x, (0, missing)) if missing else x).to(wide)
    rows = rows.reshape(*x.shape[:-1], -1, group)  # (..., D / g, g)
    largest = rows.abs().amax(-1, keepdim=True)  # (..., D / g, 1)
    scale = (largest * ((1 + 2**-8) / top)).to(torch.bfloat16)  # no less, so that all codes fit
    share = rows * (1 / scale.to(wide).clamp(min=1e-30))
    code = ((share + noise(rows)).floor() if random else share.round()).clamp(-top, top)
    if bits == 8:
        return code.to(torch.int8).flatten(-2), scale.squeeze(-1)
    low, high = (part.to(torch.uint8) for part in (code + top).split(group // 2, -1))
    return (low | (high << 4)).flatten(-2), scale.squeeze(-1)


def restore_groups(
    codes: Tensor, scale: Tensor, bits: int, group: int, width: int, dtype: torch.dtype
) -> Tensor:
    """x^ (..., D), D = width."""
    wide = torch.promote_types(dtype, torch.float32)
    rows = codes.reshape(*codes.shape[:-1], -1, group * bits // 8)
    if bits == 4:
        rows = torch.cat([rows & 15, rows >> 4], -1)
    code = rows.to(wide) - (2 ** (bits - 1) - 1 if bits == 4 else 0)
    x: Tensor = (code * scale.to(wide).unsqueeze(-1)).flatten(-2)
    return x[..., :width].to(dtype)
