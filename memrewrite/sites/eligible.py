"""Which weights GaLore projects, from which side, and why the others stay on plain Adam.

"auto" selects the linear and Conv1D weights of the model's body, excluding embeddings (and
weights tied to one) and the output head, as the reference does; the head is what
`get_output_embeddings()` returns, or a module of one of these names:

    lm_head embed_out output_projection classifier score qa_outputs head,
    predictions.decoder, seq_relationship, and at the top level fc and output
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memrewrite.sites.options import GaLore
from memrewrite.sites.select import choose
from memrewrite.sites.sharded import can_be_gathered, is_sharded
from memrewrite.sites.weights import EMBEDDINGS, Site, Weight, matrices

LAST = ("lm_head", "embed_out", "output_projection", "classifier", "score", "qa_outputs", "head")
HEADS = (*LAST, *(f"*.{n}" for n in LAST), "*.predictions.decoder", "*.seq_relationship")
TOP_LEVEL_HEADS = ("fc", "output")
SHARDED = "sharded over ranks in a way that only its own parallelism knows"
PLAIN = (nn.Parameter, torch.Tensor, FakeTensor)


@dataclass(frozen=True)
class Selection:
    """The weights of a model: the projected ones, and the others with the reason."""

    projected: list[Site]
    plain: list[tuple[Weight, str]]


def sites_of(model: nn.Module, galore: GaLore, frozen: bool = False) -> Selection:
    """Apply `galore.sites` to a model. Raises ValueError if it selects nothing.

    frozen=True also projects weights whose requires_grad is False.
    """
    found = list(matrices(model))
    if not found:
        raise ValueError("the model has no matrix or convolution for GaLore to project")
    if galore.sites == "auto":
        reasons = _outside_body(found, model)
        chosen = {c.name for c in found if c.name not in reasons}
        if not chosen:
            raise ValueError(
                "the model has no linear layer in its body for GaLore to project; select "
                "weights with memrewrite.GaLore(rank, sites='all') or a list of patterns"
            )
    else:
        chosen = choose(found, galore.sites, "memrewrite.GaLore(rank, sites='all')")
        reasons = {}
    projected, plain = [], []
    for weight in found:
        left = _left(weight.shape, galore.side)
        rank = min(galore.rank, *_matrix(weight.shape))
        reason = _why_plain(weight, galore, left, rank)
        if reason is None and not (frozen or weight.parameter.requires_grad):
            reason = "not trained"
        if weight.name not in chosen:
            reason = reasons.get(weight.name, "not selected by sites")
        if reason is None:
            projected.append(Site(weight, left, rank))
        else:
            plain.append((weight, reason))
    return Selection(projected, plain)


def projected_numbers(shape: tuple[int, ...], rank: int, left: bool, moments: int = 2) -> int:
    """Number of state elements of a projected weight: moments, (r, D) or (O, r) each, and P."""
    rows, columns = _matrix(shape)
    side, other = (rows, columns) if left else (columns, rows)
    return moments * rank * other + rank * side


def _outside_body(found: list[Weight], model: nn.Module) -> dict[str, str]:
    """Name -> reason, for the weights that "auto" excludes."""
    embeddings = {m.weight for m in model.modules() if isinstance(m, EMBEDDINGS)}
    head = _output_embeddings(model)
    reasons = {}
    for weight in found:
        attention = isinstance(weight.module, nn.MultiheadAttention)
        linear = weight.kind in ("linear", "conv1d") or (weight.kind == "raw" and attention)
        if weight.parameter in embeddings:
            reasons[weight.name] = "an embedding (or tied to one)"
        elif weight.module is head or is_head(weight.name):
            reasons[weight.name] = "the output head"
        elif not linear:
            reasons[weight.name] = f"not a linear layer's weight (sites='auto'): {weight.kind}"
    return reasons


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    known = getattr(model, "get_output_embeddings", None)
    try:
        return known() if callable(known) else None
    except NotImplementedError:
        return None


def is_head(name: str) -> bool:
    """Whether a module has one of the names of an output head."""
    return name in TOP_LEVEL_HEADS or any(fnmatchcase(name, pattern) for pattern in HEADS)


def _why_plain(weight: Weight, galore: GaLore, left: bool, rank: int) -> str | None:
    """The reason why a selected weight keeps its full-size state."""
    parameter = weight.parameter
    if not parameter.dtype.is_floating_point:
        return f"not projected: its dtype is {parameter.dtype}"
    if is_sharded(parameter) and not can_be_gathered(parameter):
        return f"not projected: {SHARDED}, and a projector needs the whole matrix"
    if not is_sharded(parameter) and type(parameter) not in PLAIN:
        return f"not projected: a {type(parameter).__name__}, no plain tensor"
    if weight.kind == "stack":
        return "not projected: a stack of matrices, neither a matrix nor a convolution"
    if projected_numbers(weight.shape, rank, left) >= 2 * parameter.numel():
        return f"too small for rank {galore.rank}: its projected state would be no smaller"
    return None


def _left(shape: tuple[int, ...], side: str) -> bool:
    rows, columns = _matrix(shape)
    return {"short": rows < columns, "long": rows >= columns, "left": True, "right": False}[side]


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape (O, D) of a weight, all dimensions after the first flattened."""
    return shape[0], torch.Size(shape[1:]).numel()
