"""Which weights GaLore projects, from which side, and why the others stay on plain Adam.

"auto" takes the linear and Conv1D weights of the model's body. Embeddings (and what is
tied to one) and the output head are left out, as in the reference; the head is what
`get_output_embeddings()` returns, or goes by these names:

    lm_head embed_out output_projection classifier score qa_outputs head,
    predictions.decoder, seq_relationship, and at the top level fc and output
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memrewrite.sites.candidates import Candidate, choose
from memrewrite.sites.options import GaLore
from memrewrite.sites.sharded import can_be_gathered, is_sharded

LAST = ("lm_head", "embed_out", "output_projection", "classifier", "score", "qa_outputs", "head")
HEADS = (*LAST, *(f"*.{n}" for n in LAST), "*.predictions.decoder", "*.seq_relationship")
TOP_LEVEL_HEADS = ("fc", "output")
SHARDED = "sharded over ranks in a way that only its own parallelism knows"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLAIN = (nn.Parameter, torch.Tensor, FakeTensor)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, eq=False)
class Site:
    """A projected weight."""

    candidate: Candidate
    rank: int
    left: bool  # P is (O, r); else (D, r)


@dataclass(frozen=True)
class Selection:
    """Every weight of a model: the projected ones, and why each other one is not."""

    projected: list[Site]
    plain: list[tuple[Candidate, str]]


def sites_of(model: nn.Module, galore: GaLore, frozen: bool = False) -> Selection:
    """Apply `galore.sites` to a model. Raises ValueError where it selects nothing.

    frozen=True also projects weights that are not trained now but may be later.
    """
    found = list(weights_of(model))
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
    for candidate in found:
        left = _left(candidate.shape, galore.side)
        rank = min(galore.rank, *_matrix(candidate.shape))
        reason = _why_plain(candidate, galore, left, rank)
        if reason is None and not (frozen or candidate.parameter.requires_grad):
            reason = "not trained"
        if candidate.name not in chosen:
            reason = reasons.get(candidate.name, "not selected by sites")
        if reason is None:
            projected.append(Site(candidate, rank, left))
        else:
            plain.append((candidate, reason))
    return Selection(projected, plain)


def projected_numbers(shape: tuple[int, ...], rank: int, left: bool, moments: int = 2) -> int:
    """State elements of a projected weight: the moments, (r, D) or (O, r) each, and P."""
    rows, columns = _matrix(shape)
    side, other = (rows, columns) if left else (columns, rows)
    return moments * rank * other + rank * side


def weights_of(model: nn.Module) -> Iterator[Candidate]:
    """Each parameter of two dimensions or more once, under its first name."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                yield _candidate(path or type(module).__name__, module, name, parameter)


def _candidate(path: str, module: nn.Module, name: str, parameter: nn.Parameter) -> Candidate:
    if name == "weight":
        if isinstance(module, nn.Linear):
            return Candidate(path, "linear", module, parameter)
        if type(module).__name__ == "Conv1D":
            return Candidate(path, "conv1d", module, parameter)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return Candidate(path, "embedding", module, parameter)
        if isinstance(module, CONVOLUTIONS + TRANSPOSED):
            return Candidate(path, "convolution", module, parameter)
    if parameter.ndim == 2:
        return Candidate(f"{path}.{name}", "raw", module, parameter)
    return Candidate(f"{path}.{name}", "stack", module, parameter)


def _outside_body(found: list[Candidate], model: nn.Module) -> dict[str, str]:
    """Per weight that "auto" leaves out, why."""
    kinds = nn.Embedding | nn.EmbeddingBag
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, kinds)}
    head = _output_embeddings(model)
    reasons = {}
    for candidate in found:
        attention = isinstance(candidate.module, nn.MultiheadAttention)
        linear = candidate.kind in ("linear", "conv1d") or (candidate.kind == "raw" and attention)
        if id(candidate.parameter) in embeddings:
            reasons[candidate.name] = "an embedding (or tied to one)"
        elif candidate.module is head or is_head(candidate.name):
            reasons[candidate.name] = "the output head"
        elif not linear:
            reasons[candidate.name] = (
                f"not a linear layer's weight (sites='auto'): {candidate.kind}"
            )
    return reasons


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    known = getattr(model, "get_output_embeddings", None)
    try:
        return known() if callable(known) else None
    except NotImplementedError:
        return None


def is_head(name: str) -> bool:
    """True for a module that goes by one of the names of an output head."""
    return name in TOP_LEVEL_HEADS or any(fnmatchcase(name, pattern) for pattern in HEADS)


def _why_plain(candidate: Candidate, galore: GaLore, left: bool, rank: int) -> str | None:
    """The reason why a selected weight keeps its full-size state."""
    parameter = candidate.parameter
    if not parameter.dtype.is_floating_point:
        return f"not projected: its dtype is {parameter.dtype}"
    if is_sharded(parameter) and not can_be_gathered(parameter):
        return f"not projected: {SHARDED}, and a projector needs the whole matrix"
    if not is_sharded(parameter) and type(parameter) not in PLAIN:
        return f"not projected: a {type(parameter).__name__}, no plain tensor"
    if candidate.kind == "stack":
        return "not projected: a stack of matrices, neither a matrix nor a convolution"
    if projected_numbers(candidate.shape, rank, left) >= 2 * parameter.numel():
        return f"too small for rank {galore.rank}: its projected state would be no smaller"
    return None


def _left(shape: tuple[int, ...], side: str) -> bool:
    rows, columns = _matrix(shape)
    return {"short": rows < columns, "long": rows >= columns, "left": True, "right": False}[side]


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A weight as (O, D): what lies behind the first dimension is one."""
    return shape[0], torch.Size(shape[1:]).numel()
