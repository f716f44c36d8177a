"""What outlives a step: one v per compressed input, and what each graph decided.

A session belongs to one compiled model and is forgotten with it. A v belongs to an input,
and is kept under the name of every compressed weight that reads this input, never by graph:
a model captured as many graphs, or again for other shapes or with other weights trained,
keeps it. A v is never written in place, because a backward may still hold that of its
forward.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from memrewrite.calibration.means import Means, over_ranks, ranks
from memrewrite.calibration.observe import Found
from memrewrite.compiler.backend import Engine
from memrewrite.errors import warn
from memrewrite.gradients import sketch
from memrewrite.gradients.basis import Projector
from memrewrite.gradients.saved_bases import PREFIX as GALORE
from memrewrite.gradients.saved_bases import key_of, restored
from memrewrite.parallel.data_parallel import group_of, inner
from memrewrite.record.request import PassesFor, ProjectedWeight, Weight
from memrewrite.session.calls import Calls
from memrewrite.session.graph import Graph
from memrewrite.sites.candidates import Candidate, candidates, select
from memrewrite.sites.eligible import Site
from memrewrite.sites.options import GaLore, VeLoRA

PREFIX = "velora.v."


@dataclass(eq=False)
class Session:
    """One compiled model: its options, its vectors, its graphs. Also its torch backend."""

    model: weakref.ref[nn.Module]
    velora: VeLoRA | None
    engine: Engine
    passes_for: PassesFor
    request: dict[str, Any]
    galore: GaLore | None = None
    vectors: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)  # running means, not normalised
    unseen: set[str] = field(default_factory=set)  # v fell back to ones
    means: Means = field(default_factory=Means)  # which batch a v is made of
    bases: dict[str, Projector] = field(default_factory=dict)  # of GaLore's next gradients
    graphs: list[Graph] = field(default_factory=list)
    settled: bool = False  # of an estimate: every weight has a projector
    called: bool = False
    ran: int = 0  # rewritten training graphs that were called
    calls: Calls = field(default_factory=Calls)
    failure: str = ""  # of the latest compile
    foreign: bool = False  # a graph was called with other parameters than the model's
    on_change: Callable[[Session, bool], None] | None = None
    scale_checked: bool = False  # whether lr_scale reaches every compressed weight
    whole: frozenset[str] = frozenset()  # weights that GaLore projects; sharding them is refused
    full: str | None = None  # why gradients stay full-size, where small ones were asked for
    unserved_steps: int = 0  # optimizer steps so far that knew nothing of this session

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one captured graph."""
        self.called = True
        try:
            graph = Graph(self, gm, inputs)  # raises where Dynamo wants to trace once more
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            raise
        self.failure = ""
        self.graphs.append(graph)
        self.changed()
        return graph

    def changed(self, complete: bool = False) -> None:
        """A graph was compiled, or (complete) the first optimizer update was."""
        if self.on_change is not None:
            self.on_change(self, complete)

    def keep_full(self, reason: str) -> None:
        """No gradient of this model comes small from here on; said once."""
        if self.full is not None:
            return
        if self.may_be_small:
            warn(
                f"the gradients and Adam state of {type(self.model()).__name__} stay full-size: "
                f"{reason}. The step is the same; gradients='dense' in memrewrite.VeLoRA and "
                "GaLore says that this is meant"
            )
        self.full = reason
        for graph in self.graphs:  # compiled before it was known
            graph.forget()

    @property
    def may_be_small(self) -> bool:
        """Whether the options ask for gradients in coordinates."""
        velora = self.velora is not None and not self.velora.full_gradients
        return velora or (self.galore is not None and self.galore.gradients == "coordinates")

    def selected(self, found: list[Candidate]) -> set[str]:
        return select(found, self.velora.sites) if self.velora else set()

    def ported(self) -> list[Tensor]:
        """The weights whose gradients come as A (x) v, in the graphs compiled so far."""
        return self._returned("ported")

    def coordinates(self) -> dict[int, tuple[int, int]]:
        """id of each such weight -> the shape of its A."""
        return {
            id(parameter): weight.port
            for graph in self.graphs
            for binding in graph.bindings.values()
            for weight in binding.variant.selected
            if weight.port is not None
            and weight.position in binding.variant.record.ported
            and (parameter := dict(binding.parameters)[weight.position]()) is not None
        }

    def factored(self) -> set[str]:
        """The names of the weights whose gradients are A (x) v, in whatever form they arrive."""
        return {
            binding.names[position]
            for graph in self.graphs
            for binding in graph.bindings.values()
            for position in binding.variant.record.factored
        }

    @property
    def step_scale(self) -> float:
        """Factor on the optimizer's step of those."""
        return self.velora.step_scale if self.velora else 1.0

    def replace_vector(self, old: Tensor, new: Tensor) -> None:
        """Give the input that v `old` is of another one, (M,)."""
        self.vectors |= {name: new for name, v in self.vectors.items() if v is old}

    def pushed(self) -> list[Tensor]:
        """The weights whose gradients come in a projector's coordinates, in those."""
        return self._returned("projected")

    def _returned(self, how: str) -> list[Tensor]:
        places = (
            (binding, position)
            for graph in self.graphs
            for binding in graph.bindings.values()
            for position in getattr(binding.variant.record, how)
        )
        found = [dict(binding.parameters)[position]() for binding, position in places]
        return list({id(p): p for p in found if p is not None}.values())

    def projected(self, position: int, site: Site, left: bool | None = None) -> ProjectedWeight:
        """What the next backward returns of a weight, or one that projects this side of it."""
        name, weight = site.candidate.name, site.candidate.parameter
        basis = self.bases.get(name)
        if basis is None:
            basis = self.bases[name] = self._first(name, weight.detach(), site)
        elif (basis.p.device, basis.p.dtype) != (weight.device, weight.dtype):
            p = basis.p.to(weight.device, weight.dtype)
            basis = self.bases[name] = replace(basis, p=p)
        rows, columns = weight.shape
        left = basis.left if left is None else left
        side = rows if left else columns
        rank = site.rank if left is site.left else sketch.width(site.rank, side)
        shape = side, rank
        port = (rank, columns) if left else (rows, rank)
        return ProjectedWeight(position, shape, left, port, weight.dtype, weight.device)

    def _first(self, name: str, weight: Tensor, site: Site) -> Projector:
        if self.settled:
            side = weight.shape[0 if site.left else 1]
            return Projector(weight.new_empty(side, site.rank), site.left)
        return sketch.start(name, weight, site.rank, site.left)

    def state_dict(self) -> dict[str, Tensor]:
        """Every v, and the sums behind a running mean, as plain tensors."""
        state = {PREFIX + name: v.detach().clone() for name, v in self.vectors.items()}
        state |= {f"velora.sum.{n}": s.detach().clone() for n, s in self.sums.items()}
        return state | {key_of(n, b): b.p.detach().clone() for n, b in self.bases.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace every v. Raises ValueError, changing nothing, for names or sizes that differ."""
        model = self.model()
        names = {c.name for c in candidates(model)} if model is not None else set()
        vectors: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        ours = {key: tensor for key, tensor in state.items() if key.startswith(GALORE)}
        bases = restored(model, self.galore, ours)
        for key, tensor in ((k, t) for k, t in state.items() if k not in ours):
            for prefix, into in ((PREFIX, vectors), ("velora.sum.", sums)):
                if key.startswith(prefix):
                    self._check(key, tensor, key.removeprefix(prefix), names)
                    into[key.removeprefix(prefix)] = tensor.detach().clone()
                    break
            else:
                raise ValueError(f"{key!r} is no entry of a memrewrite state")
        sums = {name: total for name, total in sums.items() if bool(total.isfinite().all())}
        self.vectors, self.sums, self.bases, self.unseen = vectors, sums, bases, set()
        self.means.forget()
        for binding in (b for graph in self.graphs for b in graph.bindings.values()):
            binding.calibrated, binding.calls = False, 0  # the next batch tells what it lacks

    def _check(self, key: str, tensor: Tensor, name: str, names: set[str]) -> None:
        if self.velora is None:
            raise ValueError(f"the state has {key!r}, but the model is compiled without velora")
        if name not in names:
            raise ValueError(f"the state has {key!r}, but the model has no weight of that name")
        if tuple(tensor.shape) != (self.velora.subtoken_size,):
            raise ValueError(
                f"{key!r} has shape {tuple(tensor.shape)}, but subtoken_size is "
                f"{self.velora.subtoken_size}; compile with the options of the saved run"
            )

    def vector(self, names: Sequence[str], weight: Weight, total: Tensor | None = None) -> Tensor:
        """v (M,) of the input that the weights of these names read, made on first use.

        The first name that has one decides; from then on all have it.
        """
        held = self.vectors
        if held.keys().isdisjoint(names) and names[0] in self.means.provisional:
            held = self.means.provisional
        v = held.get(names[0])
        if v is None:
            v = next((self.vectors[n] for n in names if n in self.vectors), None)
            v = self._initial(names[0], weight, total) if v is None else v
            self.vectors |= dict.fromkeys(names, v)
        if v.device != weight.device or v.dtype != weight.dtype:
            v = v.to(weight.device, weight.dtype)
            held |= dict.fromkeys(names if held is self.vectors else names[:1], v)
        return v

    def _initial(self, name: str, weight: Weight, total: Tensor | None) -> Tensor:
        assert self.velora is not None
        if self.velora.init == "random":
            seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            total = torch.randn(weight.size, generator=seed, dtype=torch.float64)
        elif self.velora.init != "ones" and total is None:
            self.unseen.add(name)
        return normalised(total, weight)

    def set_sum(self, names: Sequence[str], weight: Weight, total: Tensor) -> None:
        """Make v the direction of a sum (M,) of sub-tokens."""
        self.sums |= dict.fromkeys(names, total)
        self.means.usable(names[0])
        self.vectors |= dict.fromkeys(names, normalised(total, weight))

    def was_provisional(
        self, name: str, v: Tensor, weight: Weight, state: Mapping[str, Any]
    ) -> bool:
        """Whether a v that was never moved along stood in for one that was still to come."""
        if name in self.means.provisional:
            return True
        moved = any(bool(t.any()) for key, t in state.items() if key.startswith(("exp_", "max_")))
        needs = self.velora is not None and self.velora.init == "batch_mean"
        return needs and not moved and torch.equal(v, normalised(None, weight).to(v.device))

    def first_means(self, missing: Sequence[tuple[Weight, tuple[str, ...]]], found: Found) -> None:
        """v of the inputs that a batch can calibrate; a provisional one for the others."""
        group = group_of(self)
        rows = over_ranks([found.row(w.position, w.device) for w, _ in missing], group)
        world = ranks(group)
        for (weight, names), row in zip(missing, rows, strict=True):
            total, (absolute, seen) = row[:-2], row[-2:].tolist()
            final = self.means.judge(names[0], float(total.norm()), absolute, seen == world)
            late = self.means.provisional.pop(names[0], None)
            if not final:
                ones = normalised(None, weight) if late is None else late
                self.means.provisional[names[0]] = ones
                continue
            if seen != world:
                v = self.vector(names, weight)
            else:  # one that cancels is no direction
                v = self.vector(names, weight, total * (names[0] not in self.means.reasons))
            if late is not None:
                self.means.late.append(v)
        self.means.tell([names[0] for _, names in missing], found.failure)

    def update_means(self, inputs: Sequence[tuple[Weight, tuple[str, ...], Tensor]]) -> None:
        """Add one batch to running means; an old v stays with the forwards that read it."""
        rows = over_ranks([total.to(torch.float64) for _, _, total in inputs], group_of(self))
        skipped = []
        for (weight, names, _), total in zip(inputs, rows, strict=True):
            known = next((self.sums[name] for name in names if name in self.sums), None)
            total = total if known is None else known.to(total.device) + total
            norm = float(total.norm())
            if not math.isfinite(norm):
                skipped.append(names[0])
            elif norm:
                self.sums |= dict.fromkeys(names, total)
                self.means.usable(names[0])
                v = (total / norm).to(weight.device, weight.dtype)
                self.vectors |= dict.fromkeys(names, v)
        self.means.tell_of_skipped(skipped)


def normalised(total: Tensor | None, weight: Weight) -> Tensor:
    """total / |total|; ones / sqrt(M) where that says nothing (zero, or not finite)."""
    if total is not None:
        norm = total.norm()
        if bool(torch.isfinite(norm)) and float(norm) > 0:
            unit: Tensor = total / norm
            return unit.to(weight.device, weight.dtype)
    ones = torch.ones(weight.size, dtype=weight.dtype, device=weight.device)
    return ones / math.sqrt(weight.size)


_sessions: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


def session_of(model: nn.Module) -> Session:
    """The session of a compiled model. Raises ValueError for any other."""
    session = known_session(model)
    if session is None:
        raise ValueError(
            f"this {type(model).__name__} is not compiled by memrewrite (a deepcopy is not "
            "either); call memrewrite.compile(model) first"
        )
    return session


def parts_of(model: nn.Module) -> list[tuple[str, Session]]:
    """(path, session) of the compiled modules inside one that is not, each once.

    Raises ValueError where there are none.
    """
    inside = [(path, _sessions.get(module)) for path, module in model.named_modules()]
    found = [(path, session) for path, session in inside if session is not None]
    if not found:
        session_of(model)
    return found


def known_session(model: nn.Module) -> Session | None:
    """The session of a model, or of what its DDP wraps, if memrewrite compiled it."""
    return _sessions.get(inner(model))


def live_sessions() -> list[Session]:
    """The sessions of all models that are compiled now."""
    return list(_sessions.values())
