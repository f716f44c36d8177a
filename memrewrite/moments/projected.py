"""GaLore's moments: Adam in the coordinates of a projector.

State of a projected weight, plain tensors in `optimizer.state[p]`:

    step ()   exp_avg, exp_avg_sq (r, D) or (O, r)   [max_exp_avg_sq]   projector (side, r)
    projector_stale ()   1 where the latest refresh failed

See `passes.update.galore` for the update, `gradients.range_finder` for the projector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from memrewrite.errors import UnsupportedError
from memrewrite.gradients import range_finder, sketch
from memrewrite.moments.optimizers import ADAM, ADAMW, Flags, Row, flags_of
from memrewrite.moments.update import W, add_input
from memrewrite.session.session import Session
from memrewrite.sites.options import GaLore
from memrewrite.sites.sharded import is_sharded
from memrewrite.sites.weights import Site
from passes.base import Pass
from passes.lower import lower_ir_ops
from passes.update.accumulate import accumulate_in_place
from passes.update.galore import Projection, project_updates

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

    def zeros(self, weight: Tensor) -> dict[str, Tensor]:
        how: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        names = self.row.moments_of(self.flags)
        moments = {name: torch.zeros(self.state_shape, **how) for name in names}
        return {**moments, "projector": torch.eye(self.side, self.rank, **how)}

    def rewrite(self, gm: GraphModule) -> list[Pass]:
        """The projecting passes; P (side, r) becomes an input after `step`."""
        at = add_input(gm, "projector", (self.side, self.rank))
        projection = Projection(at, self.left, self.scale, self.given)
        lowering = [*self.row.lowering, lower_ir_ops(), accumulate_in_place()]
        return [*self.row.inputs, project_updates({W: projection}), *lowering]


def _columns(shape: Sequence[int]) -> int:
    return torch.Size(shape[1:]).numel()


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
            decay = how.decays, how.decoupled
            self.known = ProjectedKind(*kind, how.amsgrad, how.maximize, *decay)
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


def check_state(target: Target, kind: ProjectedKind, state: dict[str, Any]) -> None:
    """Raise ValueError for state of another configuration."""
    found = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor) and v.ndim}
    if "projector" not in found:
        raise ValueError(
            f"the optimizer's state of {target.name} {kind.shape} is full-size Adam state "
            f"{found}, but GaLore projects it to rank {kind.rank}: load a checkpoint of a "
            "projected run, start with a new optimizer, or compile without galore_rank"
        )
    expected = dict.fromkeys(kind.row.moments_of(kind.flags), kind.state_shape)
    expected["projector"] = (kind.side, kind.rank)
    if state["exp_avg"].dtype != kind.dtype:
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
    old = None if fresh else state["projector"]
    if not (fresh or target.is_due(done) or is_stale(state)):
        return None
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
        old = state["projector"]
        range_finder.rotate_moments(state, new.projector, old, kind.left, bias1, bias2)
    state["projector"] = new.projector
    target.refreshed, target.energy = done + 1, new.energy


def _initialise(state: dict[str, Any], kind: ProjectedKind, grad: Tensor, capturable: bool) -> None:
    device = grad.device if capturable else torch.device("cpu")
    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    state.update(kind.zeros(grad))
    mark_stale(state, True)  # until it is made from a gradient
