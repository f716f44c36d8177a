"""Bytes of an optimizer's state, and of the temporaries of its step and of a refresh.

Adam and AdamW keep two moments of each trained parameter, three with amsgrad; SGD with momentum
one. A projected weight keeps `moments.projected.projected_bytes`; a weight with a small gradient
keeps only moments of its coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn, optim
from torch.optim import Optimizer

from memrewrite.errors import UnsupportedError
from memrewrite.gradients.range_finder import OVERSAMPLING
from memrewrite.moments.moment import Moment, stores
from memrewrite.moments.optimizers import ADAM
from memrewrite.moments.projected import projected_bytes
from memrewrite.sites.eligible import sites_of
from memrewrite.sites.options import GaLore
from memrewrite.sites.weights import Site

MOMENTS: dict[type[Optimizer], Callable[[dict[str, Any]], int]] = {
    optim.Adam: lambda group: 3 if group["amsgrad"] else 2,
    optim.AdamW: lambda group: 3 if group["amsgrad"] else 2,
    optim.NAdam: lambda group: 2,
    optim.RAdam: lambda group: 2,
    optim.Adamax: lambda group: 2,
    optim.Adagrad: lambda group: 1,
    optim.RMSprop: lambda group: 1 + bool(group["momentum"]) + bool(group["centered"]),
    optim.SGD: lambda group: int(bool(group["momentum"])),
}


@dataclass(frozen=True)
class Kept:
    """Bytes of an optimizer's state, of its step's temporaries, and of a refresh's."""

    state: int
    step: int = 0
    refresh: int | None = None


def state_of(
    model: nn.Module,
    optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None,
    galore: GaLore | None,
    small: Mapping[Tensor, tuple[int, int]] = MappingProxyType({}),
    pushed: Set[Tensor] = frozenset(),
    moments: Moment | None = None,
) -> tuple[Kept, Kept]:
    """(plain, rewritten) of an optimizer over all of a model's trained parameters.

    small: parameter with a small VeLoRA gradient -> bytes of that, and of its v, which is in the
        state too.
    pushed: parameters whose gradient is in the projector's coordinates.
    moments: the storage format of the moments of parameters that are in neither.
    Raises UnsupportedError for an optimizer whose state is not known.
    """
    if optimizer is None:
        return Kept(0), Kept(0)
    if not isinstance(optimizer, Optimizer):
        optimizer = optimizer(model.parameters())
    kind = type(optimizer)
    if kind not in MOMENTS:
        known = ", ".join(k.__name__ for k in MOMENTS)
        raise UnsupportedError(f"the state of {kind.__name__} is not known here; known: {known}")
    if galore is not None and kind not in (optim.Adam, optim.AdamW):
        raise UnsupportedError(f"GaLore projects Adam and AdamW, not {kind.__name__}")
    group = optimizer.param_groups[0]
    count = MOMENTS[kind](group)
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = Kept(count * sum(p.nbytes for p in trained), _temporaries(trained, group))
    if galore is None and moments is None and not small:
        return plain, plain
    factored = [p for p in trained if p in small]
    if kind not in (optim.Adam, optim.AdamW) or (
        group["weight_decay"] and not group["decoupled_weight_decay"]
    ):
        dense = sum(p.nbytes for p in factored)  # full gradients, built in each step
        return plain, Kept(plain.state, plain.step + dense)
    sites = sites_of(model, galore).projected if galore is not None else []
    sites = [site for site in sites if site.weight.parameter not in small]
    taken = {site.weight.parameter for site in sites} | small.keys()
    rest = [p for p in trained if p not in taken]
    state = sum(_stored(p, count, moments) for p in rest)
    state += sum(projected_bytes(s, count, _form(s, moments, pushed)) for s in sites)
    state += sum(count * small[p][0] + small[p][1] for p in factored)
    given = [s for s in sites if s.weight.parameter in pushed]
    others = [s for s in sites if s.weight.parameter not in pushed]
    updates = [
        *map(_update, others),
        *(_update(s) // 2 for s in given),
    ]  # R of `given` is the gradient
    step = max([_temporaries(rest, group), *updates])
    refreshes = [*(_refresh(s, galore) for s in others if galore), *map(_sketched, given)]
    refresh = None if galore is None else max(refreshes, default=None)
    return plain, Kept(state, step, refresh)


def _stored(parameter: nn.Parameter, count: int, moments: Moment | None) -> int:
    """Bytes of the moments of one weight, in the storage format if it applies."""
    if moments is None or not stores(moments, parameter):
        return count * parameter.nbytes
    return moments.bytes_of(parameter, list(ADAM.moments)[:count])


def _temporaries(parameters: Sequence[Tensor], group: dict[str, Any]) -> int:
    """Bytes: fused, none; foreach, a copy of all parameters; else three times the largest."""
    if group.get("fused"):
        return 0
    sizes = [p.nbytes for p in parameters]
    foreach = group.get("foreach")
    if foreach or (foreach is None and any(p.device.type == "cuda" for p in parameters)):
        return sum(sizes)
    return 3 * max(sizes, default=0)


def _form(site: Site, moments: Moment | None, pushed: Set[Tensor]) -> Moment | None:
    """The form of a projected weight's moments: none where backward returns its coordinates."""
    return None if site.weight.parameter in pushed else moments


def _update(site: Site) -> int:
    """Bytes of R and Z, (r, other) each, in at least float32."""
    _, other = _sides(site)
    return 2 * site.rank * other * max(4, site.weight.parameter.element_size())


def _refresh(site: Site, galore: GaLore) -> int:
    """Bytes of the normalised float32 gradient and the factors of its decomposition."""
    side, other = _sides(site)
    size = site.weight.parameter.element_size()
    copies = 1 if size >= 4 else 2
    if galore.refresh == "svd":
        factors = side * min(side, other) + min(side, other) * other
        factors += side * other  # LAPACK's copy
    else:
        k = min(site.rank + OVERSAMPLING, side, other)
        factors = 2 * k * (side + other)
    return max(4, size) * (copies * side * other + factors)


def _sketched(site: Site) -> int:
    """Bytes of the normalised sketch, its factors, and R: 3 x (side, k) and (r, other)."""
    side, other = _sides(site)
    k = min(site.rank + OVERSAMPLING, other)
    size = site.weight.parameter.element_size()
    return max(4, size) * (3 * side * k + site.rank * other)


def _sides(site: Site) -> tuple[int, int]:
    numel, rows = site.weight.parameter.numel(), site.weight.shape[0]
    return (rows, numel // rows) if site.left else (numel // rows, rows)
