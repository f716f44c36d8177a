"""The options VeLoRA and GaLore, validated when they are created."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from memrewrite.errors import UnsupportedError

Sites = Literal["auto", "all"] | Sequence[str] | Callable[[str, nn.Module], bool]
INITS = ("batch_mean", "running_mean", "ones", "random")


@dataclass(frozen=True)
class VeLoRA:
    """Compress the saved inputs of linear layers: arXiv 2405.17991.

    subtoken_size: M, channels per saved value; a layer with fewer input features stays exact.
    sites: "auto" (the paper's: value and MLP down projections), "all" (every linear of
        the body and the head), fnmatch patterns over module names, or a callable
        (name, module) -> bool.
    scale: factor on the compressed weight gradients (the reference's `velora_scale`).
    init: how v is made. "batch_mean": the normalised mean of all sub-tokens of the first
        usable training batch, then frozen (the paper's). "running_mean": the same mean over
        all batches so far, excluding those with inf or NaN. "ones": 1/sqrt(M), no calibration.
        "random": a fixed random direction.
    lr_scale: factor on the steps of torch.optim.Adam and AdamW for the compressed weights,
        decoupled decay excluded. Under Adam |v| cancels and a step moves W along sign(v), which
        moves the layer's output up to sqrt(M) times further than an ordinary one: "sqrt"
        divides by that. It acts wherever the whole gradient of a weight is A (x) v, returned
        small or full. 1.0 is the paper's; None, the default, is "sqrt", because it was far
        better at equal learning rates and at each row's best one (docs/results).
    gradients: "coordinates": backward returns a compressed weight's gradient as its
        coordinates (O, G) (`weight.grad` is a ProjectedGrad, which has the full shape), and
        Adam keeps only their moments, exactly. "dense": the full gradient; always used for
        "running_mean", whose vectors change from step to step.

    Raises TypeError or ValueError for values outside these ranges.
    """

    subtoken_size: int = 16
    sites: Sites = "auto"
    scale: float = 1.0
    init: Literal["batch_mean", "running_mean", "ones", "random"] = "batch_mean"
    lr_scale: float | Literal["sqrt"] | None = None
    gradients: Literal["coordinates", "dense"] = "coordinates"

    def __post_init__(self) -> None:
        if self.gradients not in ("coordinates", "dense"):
            raise ValueError(f"gradients={self.gradients!r} is neither 'coordinates' nor 'dense'")
        _check_int("subtoken_size", self.subtoken_size, at_least=1)
        _check_finite("scale", self.scale)
        if self.init not in INITS:
            raise ValueError(f"init={self.init!r} is none of {', '.join(map(repr, INITS))}")
        if self.lr_scale not in ("sqrt", None):
            _check_finite("lr_scale", self.lr_scale)
            if isinstance(self.lr_scale, int | float) and self.lr_scale <= 0:
                raise ValueError(f"lr_scale={self.lr_scale} is not positive")
        object.__setattr__(self, "sites", _checked_sites(self.sites))

    @property
    def step_scale(self) -> float:
        """lr_scale as a number."""
        if isinstance(self.lr_scale, int | float):
            return self.lr_scale
        return 1 / math.sqrt(self.subtoken_size)

    @property
    def full_gradients(self) -> bool:
        """Whether the gradients of all layers are full."""
        return self.gradients == "dense" or self.init == "running_mean"


@dataclass(frozen=True)
class GaLore:
    """Keep Adam's state of a weight in a projection of rank r: arXiv 2403.03507.

    rank: r; a weight whose projected state would not be smaller stays on plain Adam.
    update_every: steps between refreshes of the projector (the paper's T).
    scale: factor on the projected step (the paper's alpha).
    side: which side of the (O, D) gradient is projected. "short" (the reference's "std")
        has the least state; "long" ("reverse_std"), "left" (always O), "right" (always D).
    refresh: "randomized", a range finder with power iteration, or "svd", exact and slower.
    moments: what a refresh does to Adam's moments. "keep" (the reference's) leaves their
        values unchanged; "rotate" transforms them to the new coordinates (LDAdam's
        projection-aware update).
    sites: "auto" (linear and Conv1D weights of the body: neither embeddings nor the output
        head), "all" (every matrix and convolution), fnmatch patterns over module names,
        or a callable (name, module) -> bool.
    stagger: spread the refreshes of different weights over `update_every` steps; at the first
        step all are refreshed.
    gradients: "dense": the full gradient is formed and projected by the optimizer.
        "coordinates": backward returns the gradient of a linear layer's weight in the
        projector's coordinates, (r, D) or (O, r) (`weight.grad` is a ProjectedGrad), and the
        full one is never formed; a refresh reads a sketch of r + 16 columns of it, which
        finds a slightly different projector (see `gradients.sketch`). `clip_grad_norm_` then
        clips the norm of the projected gradient.

    Raises TypeError or ValueError for values outside these ranges.
    """

    rank: int
    update_every: int = 200
    scale: float = 0.25
    side: Literal["short", "long", "left", "right"] = "short"
    refresh: Literal["randomized", "svd"] = "randomized"
    moments: Literal["keep", "rotate"] = "keep"
    sites: Sites = "auto"
    stagger: bool = False
    gradients: Literal["dense", "coordinates"] = "dense"

    def __post_init__(self) -> None:
        _check_int("rank", self.rank, at_least=1)
        _check_int("update_every", self.update_every, at_least=1)
        _check_finite("scale", self.scale)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is none of {', '.join(map(repr, allowed))}"
                )
        if not isinstance(self.stagger, bool):
            raise TypeError(f"stagger={self.stagger!r} is not True or False")
        if self.gradients == "coordinates" and (self.stagger or self.refresh == "svd"):
            wrong = "stagger=True" if self.stagger else "refresh='svd'"
            raise UnsupportedError(
                f"{wrong} spreads or decomposes full gradients, which gradients='coordinates' "
                "does not form; choose gradients='dense', or leave it out"
            )
        object.__setattr__(self, "sites", _checked_sites(self.sites))


CHOICES = {
    "side": ("short", "long", "left", "right"),
    "refresh": ("randomized", "svd"),
    "moments": ("keep", "rotate"),
    "gradients": ("dense", "coordinates"),
}


def galore_options(galore_rank: object, galore: object) -> GaLore | None:
    """The options of `compile(galore_rank=..., galore=...)`, or None.

    Raises TypeError for values of other types, ValueError where both are given and differ.
    """
    if galore is not None and not isinstance(galore, GaLore):
        raise TypeError(
            f"galore={galore!r} is a {type(galore).__name__}; pass memrewrite.GaLore(rank=128), "
            "or galore_rank=128"
        )
    if galore_rank is None:
        return galore
    short = GaLore(rank=galore_rank)  # type: ignore[arg-type]
    if galore is not None and galore.rank != short.rank:
        raise ValueError(
            f"galore_rank={galore_rank} and galore={galore} name two ranks; pass one of them"
        )
    return galore or short


def velora_options(velora: object) -> VeLoRA | None:
    """The options of `compile(velora=...)`, or None. Raises TypeError unless bool or VeLoRA."""
    if isinstance(velora, VeLoRA):
        return velora
    if velora is True:
        return VeLoRA()
    if velora is False or velora is None:
        return None
    raise TypeError(
        f"velora={velora!r} is a {type(velora).__name__}; pass True, False or "
        "memrewrite.VeLoRA(subtoken_size=16, sites='auto')"
    )


def refuse_options(model: nn.Module, kwargs: Collection[str], caller: str) -> None:
    """Raise TypeError for options of `compile` in the keyword arguments of a model's call."""
    try:
        accepted: Collection[str] = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # it has no Python signature
        accepted = ()
    for name in ("velora", "galore", "galore_rank"):
        if name in kwargs and name not in accepted:
            raise TypeError(
                f"{caller} takes no {name}=: its keyword arguments are those of the model's call; "
                f"compile the model first, memrewrite.compile(model, {name}=...)"
            )


def _checked_sites(sites: Any) -> Any:
    if sites in ("auto", "all") or callable(sites):
        return sites
    if isinstance(sites, str):
        raise ValueError(
            f"sites={sites!r} is neither 'auto' nor 'all'; for one pattern write sites=[{sites!r}]"
        )
    if not isinstance(sites, Sequence) or not all(isinstance(s, str) for s in sites):
        raise TypeError(f"sites={sites!r} is not 'auto', 'all', a list of patterns or a callable")
    if not sites:
        raise ValueError(
            "sites is empty; leave it out, or pass velora=False (or no galore_rank) for none"
        )
    return tuple(sites)


def _check_int(name: str, value: object, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it must be an int")
    if value < at_least:
        raise ValueError(f"{name}={value} is below {at_least}")


def _check_finite(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it must be a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value} is not finite")
