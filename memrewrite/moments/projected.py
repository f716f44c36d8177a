"""GaLore's moments: Adam in the coordinates of a projector.

State of a projected weight, plain tensors in `optimizer.state[p]`:

    step ()   exp_avg, exp_avg_sq (r, D) or (O, r)   [max_exp_avg_sq]   projector (side, r)
    projector_stale ()   1 where the latest refresh failed

See `passes.update.galore` for the update, `gradients.range_finder` for the projector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from memrewrite.errors import UnsupportedError
from memrewrite.gradients import range_finder, sketch
from memrewrite.moments.moment import Moment
from memrewrite.moments.optimizers import ADAM, ADAMW, Flags, Row, flags_of
from memrewrite.moments.stored import Held, full_from_here, stored_from_here, take_back
from memrewrite.moments.update import W, add_input, wide
from memrewrite.session.session import Session
from memrewrite.sites.options import GaLore
from memrewrite.sites.sharded import is_sharded
from memrewrite.sites.weights import Site
from passes.base import Pass
from passes.lower import lower_ir_ops
from passes.update.accumulate import accumulate_in_place
from passes.update.galore import Projection, project_updates
from passes.update.store import store_moments

PROJECTOR = "projector"  # key in a weight's state
STALE = "projector_stale"  # key in a weight's state: 1 if its refresh failed, to be repeated


@dataclass(frozen=True)
class ProjectedKind:
    """Everything that identifies a projected update; see `moments.update.Kind`."""

    shape: tuple[int, ...]  # of W
    dtype: torch.dtype
    device: torch.device
    rank: int
    left: bool
    scale: float
    amsgrad: bool
    maximize: bool
    decays: bool  # weight decay other than zero
    decoupled: bool
    given: bool = False  # the gradient is R already
    moment: Moment | None = None  # in which the moments and P are stored
    dynamic = False

    @property
    def flags(self) -> Flags:
        return Flags(self.amsgrad, self.maximize, self.decays, self.decoupled)

    @property
    def row(self) -> Row:
        return ADAMW if self.decoupled else ADAM

    @property
    def side(self) -> int:
        """The number of rows of P: the size of the projected side."""
        return self.shape[0] if self.left else _columns(self.shape)

    @property
    def state_shape(self) -> tuple[int, int]:
        """The shape of m and v."""
        rows, columns = self.shape[0], _columns(self.shape)
        return (self.rank, columns) if self.left else (rows, self.rank)

    @property
    def names(self) -> tuple[str, ...]:
        """Keys of the moments of a state in full."""
        return tuple(self.row.moments_of(self.flags))

    @cached_property
    def held(self) -> Held | None:
        """The moments in their form, or None for moments in full."""
        return self._held(self.names, self.state_shape)

    @cached_property
    def held_projector(self) -> Held | None:
        """P in the form, or None for P in full."""
        if self.moment is None or not self.moment.projectors:
            return None
        return self._held((PROJECTOR,), (self.side, self.rank))

    def _held(self, names: tuple[str, ...], shape: tuple[int, ...]) -> Held | None:
        if self.moment is None or self.moment.declines(torch.empty(shape, device="meta")):
            return None
        return Held(self.moment, names, shape, self.dtype)

    def zeros(self, weight: Tensor) -> dict[str, Tensor]:
        how: dict[str, Any] = {"dtype": self.dtype, "device": weight.device}
        if self.held is not None:
            moments = self.held.zeros(weight.device)
        else:
            moments = {name: torch.zeros(self.state_shape, **how) for name in self.names}
        return moments | self.stored_projector(torch.eye(self.side, self.rank, **how))

    def stored_projector(self, p: Tensor) -> dict[str, Tensor]:
        """The entries of a state for a P (side, r)."""
        return (
            {PROJECTOR: p}
            if self.held_projector is None
            else self.held_projector.store({PROJECTOR: p})
        )

    def projector(self, state: Mapping[str, Tensor]) -> Tensor:
        """P (side, r), in the dtype of the weight."""
        held = self.held_projector
        return state[PROJECTOR] if held is None else held.whole(state)[PROJECTOR].to(self.dtype)

    def inputs(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """The inputs of the update after the gradient: moments and P, as they are stored."""
        moments = (
            [state[name] for name in self.names] if self.held is None else self.held.inputs(state)
        )
        held = self.held_projector
        return moments + ([state[PROJECTOR]] if held is None else held.inputs(state))

    def rewrite(self, gm: GraphModule) -> list[Pass]:
        """The projecting passes; P (side, r) becomes an input after `step`."""
        at = add_input(gm, PROJECTOR, (self.side, self.rank))
        projection = Projection(at, self.left, self.scale, self.given)
        held = {} if self.held is None else self.held.forms()
        if self.held_projector is not None:
            held |= self.held_projector.forms(at)
        key = (self.moment, self.state_shape, self.rank, self.dtype)
        store = [store_moments(held, wide(self.dtype), key)] if held else []
        lowering = [*self.row.lowering, *store, lower_ir_ops(), accumulate_in_place()]
        return [*self.row.inputs, project_updates({W: projection}), *lowering]


def _columns(shape: Sequence[int]) -> int:
    return torch.Size(shape[1:]).numel()


def projected_bytes(site: Site, count: int, moment: Moment | None = None) -> int:
    """Bytes of a projected weight's state, of `count` moments and P."""
    weight = site.weight.parameter
    side, other = site.weight.shape[0], _columns(site.weight.shape)
    side, other = (side, other) if site.left else (other, side)

    def taken(shape: tuple[int, ...], names: Sequence[str], stored: bool) -> int:
        like = torch.empty(shape, dtype=weight.dtype, device="meta")
        if moment is None or not stored or moment.declines(like):
            return len(names) * like.nbytes
        return moment.bytes_of(like, names)

    moments = taken((site.rank, other), list(ADAM.moments)[:count], stored=True)
    projects = moment is not None and moment.projectors
    return moments + taken((side, site.rank), [PROJECTOR], stored=projects)


@dataclass
class Target:
    """One projected parameter of one optimizer, and the results of its refreshes."""

    site: Site
    session: Session
    galore: GaLore
    offset: int  # steps by which its refreshes are early: 0 unless staggered
    refreshed: int | None = None  # the step, from 1, whose gradient gave P
    energy: float | None = None  # |P^T G|^2 / |G|^2 of that gradient
    failures: int = 0
    known: ProjectedKind | None = None  # the latest result of `kind`, and its flags
    flags: tuple[Any, ...] = ()
    checked: Tensor | None = None  # the exp_avg of the state that passed `check_state`

    @property
    def parameter(self) -> nn.Parameter:
        return self.site.weight.parameter

    @property
    def name(self) -> str:
        return self.site.weight.name

    @property
    def pushed(self) -> bool:
        """Whether backward returns this gradient in coordinates."""
        asked = self.galore.gradients == "coordinates" and self.parameter.ndim == 2
        return asked and not is_sharded(self.parameter)

    def is_due(self, done: int) -> bool:
        """Whether the step after `done` others refreshes the projector."""
        if self.pushed:
            return sketch.is_due(done, self.galore.update_every)
        return (done + self.offset) % self.galore.update_every == 0

    def kind(self, group: dict[str, Any]) -> ProjectedKind:
        p, how = self.parameter, flags_of(group)
        flags = (p.dtype, p.device, how)
        if self.known is None or flags != self.flags:
            site = self.site
            kind = tuple(p.shape), p.dtype, p.device, site.rank, site.left, self.galore.scale
            given = how.amsgrad, how.maximize, how.decays, how.decoupled
            # Backward reads P in full, and a sketch the first moment.
            moment = None if self.pushed else self.session.moments
            self.known = ProjectedKind(*kind, *given, moment=moment)
            self.flags, self.checked = flags, None
        return self.known


def check_target(target: Target) -> None:
    """Raise UnsupportedError for a parameter that the model no longer has."""
    weight = target.site.weight
    if weight.module._parameters.get(weight.attribute) is weight.parameter:
        return
    model = target.session.model()  # pruning and parametrizations only rename it
    if model is not None and any(p is weight.parameter for p in model.parameters()):
        return
    raise UnsupportedError(
        f"{weight.name} {weight.shape} was replaced by another parameter while its "
        "optimizer still updates the old one: build a new optimizer over the model's "
        "parameters"
    )


def check_state(target: Target, kind: ProjectedKind, state: dict[str, Any]) -> str:
    """Raise ValueError for state of another configuration; bring moments into the right form.

    Returns what was done with them, or "".
    """
    found = _shapes(state)
    if PROJECTOR not in found:
        raise ValueError(
            f"the optimizer's state of {target.name} {kind.shape} is full-size Adam state "
            f"{found}, but GaLore projects it to rank {kind.rank}: load a checkpoint of a "
            "projected run, start with a new optimizer, or compile without galore_rank"
        )
    stored = [held for held in (kind.held, kind.held_projector) if held is not None]
    taken = [held.take_over(state, f"{target.name} {kind.shape}") for held in stored]
    told = stored_from_here(kind.moment, target.name) if kind.moment and any(taken) else ""
    shapes = dict.fromkeys(kind.names, kind.state_shape), {PROJECTOR: (kind.side, kind.rank)}
    forms = [] if stored else [take_back(state, one, kind.dtype) for one in shapes]
    told += full_from_here(next((form for form in forms if form), ""))
    found = _shapes(state)
    expected = _shapes(kind.zeros(torch.empty(0, device="meta")))
    if kind.held is None and state["exp_avg"].dtype != kind.dtype:
        raise ValueError(
            f"the optimizer's state of {target.name} is {state['exp_avg'].dtype}, but the weight "
            f"is {kind.dtype} now: convert the model before its optimizer takes a step, or "
            "load the state again with optimizer.load_state_dict(optimizer.state_dict())"
        )
    target.checked = state["exp_avg"]
    if found != expected:
        raise ValueError(
            f"the optimizer's state of {target.name} {kind.shape} has shapes {found}, but rank "
            f"{kind.rank} needs {expected}: compile with the galore options (and amsgrad) of "
            "the run that saved it, or start with a new optimizer"
        )
    return told


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor) and v.ndim}


def is_stale(state: dict[str, Any]) -> bool:
    """Whether the projector must be refreshed at the next step."""
    return STALE in state and bool(state[STALE])


def mark_stale(state: dict[str, Any], stale: bool) -> None:
    """Record it in the state, so that a resumed run retries the refresh too."""
    if STALE not in state or bool(state[STALE]) is not stale:
        state[STALE] = torch.tensor(float(stale))


def prepare(state: dict[str, Any], kind: ProjectedKind, grad: Tensor, capturable: bool) -> int:
    """Create the state of a parameter if it has none; returns the number of its steps so far."""
    if not state:
        _initialise(state, kind, grad, capturable)
        return 0
    if state["step"].device.type != "cpu" and not capturable:
        state["step"] = state["step"].cpu()  # load_state_dict moves it for fused=True
    if STALE in state and state[STALE].device.type != "cpu":
        state[STALE] = state[STALE].cpu()  # on the CPU, reading it synchronises no device
    return int(state["step"])


def refresh_if_due(
    target: Target, kind: ProjectedKind, state: dict[str, Any], grad: Tensor, group: dict[str, Any]
) -> str | None:
    """Create the state at the first step, and a new P when one is due.

    Returns the reason if a refresh failed. A gradient of zeros has no basis, but is no failure.
    """
    galore, fresh = target.galore, not state
    done = prepare(state, kind, grad, group["capturable"])
    if not (fresh or target.is_due(done) or is_stale(state)):
        return None
    old = None if fresh else kind.projector(state)
    new = range_finder.refresh(grad, old, kind.rank, kind.left, galore.refresh, seed=done)
    mark_stale(state, isinstance(new, str))
    if isinstance(new, str):
        if new == range_finder.ZERO:  # LoRA's A at its first step, an expert without a token
            return None
        target.failures += 1
        return f"at step {done + 1}: {new}"
    take(target, kind, state, new, group, done)
    return None


def take(
    target: Target,
    kind: ProjectedKind,
    state: dict[str, Any],
    new: range_finder.Refreshed,
    group: dict[str, Any],
    done: int,
) -> None:
    """Set a new P in the state, and rotate the moments to its coordinates if the options say so."""
    if target.galore.moments == "rotate" and done:
        beta1, beta2 = group["betas"]
        bias1, bias2 = 1 - beta1**done, 1 - beta2**done
        old, held = kind.projector(state), kind.held
        moments = state if held is None else held.whole(state)
        range_finder.rotate_moments(moments, new.projector, old, kind.left, bias1, bias2)
        state.update({} if held is None else held.store(moments))
    state.update(kind.stored_projector(new.projector))
    target.refreshed, target.energy = done + 1, new.energy


def _initialise(state: dict[str, Any], kind: ProjectedKind, grad: Tensor, capturable: bool) -> None:
    device = grad.device if capturable else torch.device("cpu")
    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    state.update(kind.zeros(grad))
    mark_stale(state, True)  # until it is made from a gradient
