"""The state of GaLore's method for one model: the basis of each weight's next gradient.

Saved as plain tensors, where `side` is the projected dimension of the weight and `other` the
other one:

    galore.p.<weight>       (side, r)   the projector
    galore.warm.<weight>    (other, k)  the basis of a sketch, its first columns from the last R
    galore.cold.<weight>    (other, k)  the same, all columns random
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from memrewrite.calibration.recall import Held, states_of
from memrewrite.gradients import sketch
from memrewrite.gradients.basis import Basis, Projector, Sketch
from memrewrite.methods.method import OWNERS, Ask, Bound, State
from memrewrite.sites.eligible import sites_of
from memrewrite.sites.options import GaLore
from memrewrite.sites.weights import Site

PREFIX = "galore."
OWNERS[PREFIX] = "memrewrite.GaLore(gradients='coordinates')"
KINDS = ("p", "warm", "cold")


class Bases(State):
    """The basis of the next gradient of every projected weight, by the weight's name.

    settled: for an estimate; every weight has an (empty) projector.
    """

    prefix = PREFIX

    def __init__(
        self, model: weakref.ref[nn.Module], options: GaLore, settled: bool = False
    ) -> None:
        self.model, self.options, self.settled = model, options, settled
        self.by_name: dict[str, Projector] = {}

    def basis(self, site: Site) -> Projector:
        """The basis of a weight's next gradient; that of a sketch if there is no projector yet."""
        name, weight = site.weight.name, site.weight.parameter
        basis = self.by_name.get(name)
        if basis is None:
            basis = self.by_name[name] = self._first(name, weight.detach(), site)
        elif (basis.p.device, basis.p.dtype) != (weight.device, weight.dtype):
            p = basis.p.to(weight.device, weight.dtype)
            basis = self.by_name[name] = replace(basis, p=p)
        return basis

    def _first(self, name: str, weight: Tensor, site: Site) -> Projector:
        if self.settled:
            side = weight.shape[0 if site.left else 1]
            return Projector(weight.new_empty(side, site.rank), site.left)
        return sketch.start(name, weight, site.rank, site.left)

    def handed(self, bound: Bound) -> list[Basis]:
        return [self.by_name[bound.names[ask.position]] for ask in bound.asks]

    def known(self, bound: Bound, ask: Ask) -> Basis | None:
        return self.by_name.get(bound.names[ask.position])

    # --- from optimizers and checkpoints ----------------------------------------------------------

    def recall(self, sites: Sequence[Site]) -> None:
        """Restore projectors from optimizer state, for weights that have no basis yet."""
        missing = [site for site in sites if site.weight.name not in self.by_name]
        if missing and not self.settled:
            states = states_of(site.weight.parameter for site in missing)
            for site in missing:
                self.recall_basis(site, states.get(site.weight.parameter, {}))

    def recall_basis(self, site: Site, state: Held) -> None:
        """Restore from one weight's optimizer state, if it has a projector of this rank."""
        p = state.get("projector")
        if not isinstance(p, Tensor) or p.shape[-1] != site.rank or state.get("projector_stale"):
            return
        weight, name = site.weight.parameter.detach(), site.weight.name
        due = sketch.is_due(int(state["step"]), self.options.update_every)
        self.by_name[name] = sketch.following(name, weight, site.rank, site.left, state, due)

    def state_dict(self) -> dict[str, Tensor]:
        return {_key(name, basis): basis.p.detach().clone() for name, basis in self.by_name.items()}

    def read(self, state: Mapping[str, Tensor]) -> Any:
        model = self.model()
        if not state or model is None:
            return {}
        projected = sites_of(model, self.options, frozen=True).projected
        sites = {site.weight.name: site for site in projected}
        found = {}
        for key, tensor in state.items():
            _, kind, name = key.split(".", 2)
            if name not in sites or kind not in KINDS:
                raise ValueError(f"the state has {key!r}, but no weight of that name is projected")
            found[name] = _restored(key, kind, tensor.detach().contiguous().clone(), sites[name])
        return found

    def take(self, found: Any) -> None:
        self.by_name = found


def _key(name: str, basis: Projector) -> str:
    """The key under which a basis is saved."""
    if not isinstance(basis, Sketch):
        return f"{PREFIX}p.{name}"
    return f"{PREFIX}{'warm' if basis.warm else 'cold'}.{name}"


def _restored(key: str, kind: str, p: Tensor, site: Site) -> Projector:
    weight = site.weight.parameter.detach()
    usual = (weight.shape[0 if site.left else 1], site.rank)
    fresh = sketch.start(site.weight.name, weight, site.rank, site.left)
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
