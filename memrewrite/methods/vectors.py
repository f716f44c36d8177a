"""The state of VeLoRA's method for one model: a unit vector v (M,) per compressed input.

A v is kept under the name of every compressed weight that reads its input, not per graph: a
recompile, for other shapes or other trained weights, keeps it. A v is never written in place,
because a backward reads the v of its forward.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memrewrite.calibration import observe
from memrewrite.calibration.means import Means, over_ranks, ranks
from memrewrite.calibration.observe import Found
from memrewrite.calibration.recall import Held, states_of
from memrewrite.gradients.basis import Basis, Vector
from memrewrite.gradients.packing import CALIBRATED, SUM, VECTOR, unpack
from memrewrite.methods.method import OWNERS, Ask, Bound, State
from memrewrite.sites.options import VeLoRA
from memrewrite.sites.weights import candidates

PREFIX = "velora."
V, TOTAL = f"{PREFIX}v.", f"{PREFIX}sum."  # prefixes of keys in a state dict
OWNERS[PREFIX] = "velora"
Missing = Sequence[tuple[Ask, tuple[str, ...]]]  # (ask, readers' names) per input


class Vectors(State):
    """The v of every compressed input, by the names of the weights that read it."""

    prefix = PREFIX

    def __init__(self, model: weakref.ref[nn.Module], options: VeLoRA) -> None:
        self.model, self.options = model, options
        self.vectors: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}  # of running means, not normalised
        self.unseen: set[str] = set()  # names whose v fell back to ones
        self.means = Means()  # which batch calibrates a v

    # --- for a call of a graph ------------------------------------------------------------------

    def prepare(self, bound: Bound, args: Sequence[Any]) -> None:
        inputs = [(ask, bound.names_of(ask.position)) for ask in bound.leaders()]
        missing: Missing = [
            (a, names) for a, names in inputs if self.vectors.keys().isdisjoint(names)
        ]
        if not bound.calls:
            missing = self._not_recalled(bound, missing)
        bound.ready = not missing or self.options.init in ("ones", "random")
        if bound.ready:
            return
        bound.calls += 1
        if self.means.is_due(bound.calls, [names[0] for _, names in missing]):
            sizes = {ask.position: self._size for ask, _ in missing}
            found = observe.subtoken_sums(bound.gm, args, sizes)
            self.first_means(missing, found, bound.group())

    def handed(self, bound: Bound) -> list[Basis]:
        return [Vector(self._of(bound, ask), ask.left) for ask in bound.asks]

    def _of(self, bound: Bound, ask: Ask) -> Tensor:
        if ask.position in bound.readers:
            return self.vector(bound.names_of(ask.position), ask)
        if ask.position not in bound.unread:  # this graph compresses no input of the weight
            ones = torch.ones(self._size, dtype=ask.dtype, device=ask.device)
            bound.unread[ask.position] = ones
        return bound.unread[ask.position]

    def known(self, bound: Bound, ask: Ask) -> Basis | None:
        names = bound.names_of(ask.position)
        if ask.port is None or self.vectors.keys().isdisjoint(names):
            return None
        return Vector(self.vector(names, ask), ask.left)

    def follow(self, bound: Bound, observed: Sequence[int], totals: Sequence[Tensor]) -> None:
        """Add the inputs of this call to the running means."""
        leaders = {ask.position: ask for ask in bound.leaders()}
        means: dict[int, Tensor] = {}
        for position, total in zip(observed, totals, strict=True):
            if position in leaders:
                means[position] = means[position] + total if position in means else total
        inputs = [(leaders[i], bound.names_of(i), total) for i, total in means.items()]
        self.update_means(inputs, bound.group())

    def sentence(self, name: str) -> str:
        return self.means.sentence(name)

    def held(self) -> list[Tensor]:
        return [*self.vectors.values(), *self.means.provisional.values()]

    @property
    def _size(self) -> int:
        return self.options.subtoken_size

    # --- one v ------------------------------------------------------------------------------

    def vector(self, names: Sequence[str], like: Ask, total: Tensor | None = None) -> Tensor:
        """The v (M,) of the input that these weights read, created on first use.

        If several have different ones, that of the first name is given to all.
        """
        held = self.vectors
        if held.keys().isdisjoint(names) and names[0] in self.means.provisional:
            held = self.means.provisional
        v = held.get(names[0])
        if v is None:
            v = next((self.vectors[n] for n in names if n in self.vectors), None)
            v = self._initial(names[0], like, total) if v is None else v
            self.vectors |= dict.fromkeys(names, v)
        if v.device != like.device or v.dtype != like.dtype:
            v = v.to(like.device, like.dtype)
            held |= dict.fromkeys(names if held is self.vectors else names[:1], v)
        return v

    def _initial(self, name: str, like: Ask, total: Tensor | None) -> Tensor:
        if self.options.init == "random":
            seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            total = torch.randn(self._size, generator=seed, dtype=torch.float64)
        elif self.options.init != "ones" and total is None:
            self.unseen.add(name)
        return normalised(total, like)

    def replace(self, old: Tensor, new: Tensor) -> None:
        """Replace v `old` by `new` (M,) for all weights that share it."""
        self.vectors |= {name: new for name, v in self.vectors.items() if v is old}

    # --- from batches ---------------------------------------------------------------------------

    def first_means(self, missing: Missing, found: Found, group: Any) -> None:
        """Set v for the inputs that this batch can calibrate, a provisional v for the others."""
        rows = over_ranks([found.row(ask.position, ask.device) for ask, _ in missing], group)
        world = ranks(group)
        for (ask, names), row in zip(missing, rows, strict=True):
            total, (absolute, seen) = row[:-2], row[-2:].tolist()
            final = self.means.judge(names[0], float(total.norm()), absolute, seen == world)
            late = self.means.provisional.pop(names[0], None)
            if not final:
                ones = normalised(None, ask) if late is None else late
                self.means.provisional[names[0]] = ones
                continue
            if seen != world:
                v = self.vector(names, ask)
            else:  # a total that cancels to zero has no direction
                v = self.vector(names, ask, total * (names[0] not in self.means.reasons))
            if late is not None:
                self.means.late.append(v)
        self.means.warn([names[0] for _, names in missing], found.failure)

    def update_means(
        self, inputs: Sequence[tuple[Ask, tuple[str, ...], Tensor]], group: Any
    ) -> None:
        """Add one batch to the running means; makes a new v, as a backward may read the old one."""
        rows = over_ranks([total.to(torch.float64) for _, _, total in inputs], group)
        skipped = []
        for (ask, names, _), total in zip(inputs, rows, strict=True):
            known = next((self.sums[name] for name in names if name in self.sums), None)
            total = total if known is None else known.to(total.device) + total
            norm = float(total.norm())
            if not math.isfinite(norm):
                skipped.append(names[0])
            elif norm:
                self.sums |= dict.fromkeys(names, total)
                self.means.usable(names[0])
                v = (total / norm).to(ask.device, ask.dtype)
                self.vectors |= dict.fromkeys(names, v)
        self.means.warn_of_skipped(skipped)

    # --- from optimizers and checkpoints ----------------------------------------------------------

    def _not_recalled(self, bound: Bound, inputs: Missing) -> Missing:
        """Restore v from optimizer state where possible; returns the other inputs."""
        readers = {ask.position: bound.readers[ask.position] for ask, _ in inputs}
        weights = {i: bound.parameter(i) for positions in readers.values() for i in positions}
        states = states_of([p for p in weights.values() if p is not None]) if inputs else {}
        rest = []
        for ask, names in inputs:
            mine = [weights[i] for i in readers[ask.position]]
            held = [states[p] for p in mine if p is not None and p in states]
            if not self.recall_vector(names, ask, held):
                rest.append((ask, names))
        return rest

    def recall_vector(self, names: Sequence[str], like: Ask, states: Iterable[Held]) -> bool:
        """Restore the v of an input from the states of the weights that read it; True if found."""
        running = self.options.init == "running_mean"
        for state in states:
            total = _read(state, (SUM,), self._size, torch.float64) if running else None
            if total is not None:
                self._set_sum(names, like, total)
                return True
            v = None if running else _read(state, (VECTOR, CALIBRATED), self._size, like.dtype)
            if v is not None and not self._was_provisional(names[0], v, like, state):
                self.vectors |= dict.fromkeys(names, v)
                return True
        return False

    def _set_sum(self, names: Sequence[str], like: Ask, total: Tensor) -> None:
        """Set v to the direction of a sum (M,) of sub-tokens."""
        self.sums |= dict.fromkeys(names, total)
        self.means.usable(names[0])
        self.vectors |= dict.fromkeys(names, normalised(total, like))

    def _was_provisional(self, name: str, v: Tensor, like: Ask, state: Held) -> bool:
        """Whether a v was ones until calibration, and no moment has moved along it."""
        if name in self.means.provisional:
            return True
        moved = any(bool(t.any()) for key, t in state.items() if key.startswith(("exp_", "max_")))
        needs = self.options.init == "batch_mean"
        return needs and not moved and torch.equal(v, normalised(None, like).to(v.device))

    def state_dict(self) -> dict[str, Tensor]:
        """Every v, and the sums of running means, as plain tensors."""
        state = {V + name: v.detach().clone() for name, v in self.vectors.items()}
        return state | {TOTAL + name: s.detach().clone() for name, s in self.sums.items()}

    def read(self, state: Mapping[str, Tensor]) -> Any:
        model = self.model()
        names = {weight.name for weight in candidates(model)} if model is not None else set()
        vectors: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        for key, tensor in state.items():
            for prefix, into in ((V, vectors), (TOTAL, sums)):
                if key.startswith(prefix):
                    self._check(key, tensor, key.removeprefix(prefix), names)
                    into[key.removeprefix(prefix)] = tensor.detach().clone()
                    break
            else:
                raise ValueError(f"{key!r} is not an entry of a memrewrite state")
        sums = {name: total for name, total in sums.items() if bool(total.isfinite().all())}
        return vectors, sums

    def take(self, found: Any) -> None:
        self.vectors, self.sums = found
        self.unseen = set()
        self.means.forget()

    def _check(self, key: str, tensor: Tensor, name: str, names: set[str]) -> None:
        if name not in names:
            raise ValueError(f"the state has {key!r}, but the model has no weight of that name")
        if tuple(tensor.shape) != (self._size,):
            raise ValueError(
                f"{key!r} has shape {tuple(tensor.shape)}, but subtoken_size is {self._size}; "
                "compile with the options of the saved run"
            )


def normalised(total: Tensor | None, like: Ask) -> Tensor:
    """total / |total| (M,); ones / sqrt(M) where total is None, zero or not finite."""
    assert like.basis is not None
    (size,) = like.basis
    if total is not None:
        norm = total.norm()
        if bool(torch.isfinite(norm)) and float(norm) > 0:
            unit: Tensor = total / norm
            return unit.to(like.device, like.dtype)
    ones = torch.ones(size, dtype=like.dtype, device=like.device)
    return ones / math.sqrt(size)


def _read(state: Held, keys: Sequence[str], size: int, dtype: torch.dtype) -> Tensor | None:
    """The tensor (M,) under the first of `keys` in `state`; None if it is not calibrated."""
    packed = next((state[key] for key in keys if key in state), None)
    if not isinstance(packed, Tensor) or not packed.ndim or packed.shape[-1] != size:
        return None
    found = unpack(packed.detach(), dtype)
    return found if 0.0 < float(found.norm()) < math.inf else None
