"""The bases that GaLore's next gradients come in, as the plain tensors of a saved state.

galore.p.<weight>       (side, r)   the projector
galore.warm.<weight>    (other, k)  the basis of a sketch, its first columns from the last R
galore.cold.<weight>    (other, k)  the same, all columns random
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from memrewrite.gradients.basis import Projector, Sketch
from memrewrite.gradients.sketch import start
from memrewrite.sites.eligible import Site, sites_of
from memrewrite.sites.options import GaLore

PREFIX = "galore."
KINDS = ("p", "warm", "cold")


def key_of(name: str, basis: Projector) -> str:
    """Under which a basis is saved."""
    if not isinstance(basis, Sketch):
        return f"{PREFIX}p.{name}"
    return f"{PREFIX}{'warm' if basis.warm else 'cold'}.{name}"


def restored(
    model: nn.Module | None, galore: GaLore | None, state: Mapping[str, Tensor]
) -> dict[str, Projector]:
    """Bases by the weight's name. Raises ValueError for names or sizes that differ."""
    if not state or model is None:
        return {}
    if galore is None or galore.gradients == "dense":
        raise ValueError(
            f"the state has {next(iter(state))!r}, but the model is compiled without "
            "memrewrite.GaLore(gradients='coordinates')"
        )
    sites = {site.candidate.name: site for site in sites_of(model, galore, frozen=True).projected}
    found = {}
    for key, tensor in state.items():
        _, kind, name = key.split(".", 2)
        if name not in sites or kind not in KINDS:
            raise ValueError(f"the state has {key!r}, but no weight of that name is projected")
        found[name] = _restored(key, kind, tensor.detach().contiguous().clone(), sites[name])
    return found


def _restored(key: str, kind: str, p: Tensor, site: Site) -> Projector:
    weight = site.candidate.parameter.detach()
    usual = (weight.shape[0 if site.left else 1], site.rank)
    fresh = start(site.candidate.name, weight, site.rank, site.left)
    wanted = usual if kind == "p" else tuple(fresh.p.shape)
    if tuple(p.shape) != wanted:
        raise ValueError(
            f"{key!r} has shape {tuple(p.shape)}, not {wanted}: compile with the options of the "
            "saved run"
        )
    p = p.to(weight.device, weight.dtype)
    if kind == "p":
        return Projector(p, site.left)
    return Sketch(p, not site.left, min(site.rank, p.shape[1]) if kind == "warm" else 0)
