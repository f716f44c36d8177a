"""One projected parameter of one optimizer: its kind, its state, its refreshes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memrewrite.errors import UnsupportedError
from memrewrite.gradients import range_finder, sketch
from memrewrite.optim.update import Kind
from memrewrite.session.session import Session
from memrewrite.sites.eligible import Site
from memrewrite.sites.options import GaLore
from memrewrite.sites.sharded import is_sharded

STALE = "projector_stale"  # in the state of a weight, 1 where its refresh failed: try again


@dataclass
class Target:
    """One projected parameter of one optimizer, and what its refreshes have shown."""

    site: Site
    session: Session
    galore: GaLore
    offset: int  # steps by which its refreshes are early: 0 unless staggered
    refreshed: int | None = None  # the step, from 1, whose gradient gave P
    energy: float | None = None  # |P^T G|^2 / |G|^2 of that gradient
    failures: int = 0
    known: Kind | None = None  # the last one that `kind` made, and of which flags
    flags: tuple[Any, ...] = ()
    checked: Tensor | None = None  # the exp_avg whose state was found to be in order

    @property
    def parameter(self) -> nn.Parameter:
        return self.site.candidate.parameter

    @property
    def name(self) -> str:
        return self.site.candidate.name

    @property
    def pushed(self) -> bool:
        """Whether backward is asked for this gradient in coordinates."""
        asked = self.galore.gradients == "coordinates" and self.parameter.ndim == 2
        return asked and not is_sharded(self.parameter)

    def is_due(self, done: int) -> bool:
        """Whether the step behind `done` others refreshes the projector."""
        if self.pushed:
            return sketch.is_due(done, self.galore.update_every)
        return (done + self.offset) % self.galore.update_every == 0

    def kind(self, group: dict[str, Any]) -> Kind:
        p = self.parameter
        decays = group["weight_decay"] != 0
        how = group["amsgrad"], group["maximize"], decays, group["decoupled_weight_decay"]
        flags = (p.dtype, p.device, *how)
        if self.known is None or flags != self.flags:
            site = self.site
            shape, scale = tuple(p.shape), self.galore.scale
            self.known = Kind(shape, p.dtype, p.device, site.rank, site.left, scale, *how)
            self.flags, self.checked = flags, None
        return self.known


def check_target(target: Target) -> None:
    """Raise UnsupportedError for a parameter that the model no longer has."""
    candidate = target.site.candidate
    if candidate.module._parameters.get(candidate.attribute) is candidate.parameter:
        return
    model = target.session.model()  # pruning and parametrizations only rename it
    if model is not None and any(p is candidate.parameter for p in model.parameters()):
        return
    raise UnsupportedError(
        f"{candidate.name} {candidate.shape} was replaced by another parameter while its "
        "optimizer still updates the old one: build a new optimizer over the model's "
        "parameters"
    )


def check_state(target: Target, kind: Kind, state: dict[str, Any]) -> None:
    """Raise ValueError for state that another configuration has left."""
    found = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor) and v.ndim}
    if "projector" not in found:
        raise ValueError(
            f"the optimizer's state of {target.name} {kind.shape} is full-size Adam state "
            f"{found}, but GaLore projects it to rank {kind.rank}: load a checkpoint of a "
            "projected run, start with a new optimizer, or compile without galore_rank"
        )
    moments = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if kind.amsgrad else [])]
    expected = dict.fromkeys(moments, kind.state_shape)
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
    """Whether the projector waits for a gradient that it can be made from."""
    return STALE in state and bool(state[STALE])


def mark_stale(state: dict[str, Any], stale: bool) -> None:
    """Say so in the state: a resumed run tries again as this one would."""
    if STALE not in state or bool(state[STALE]) is not stale:
        state[STALE] = torch.tensor(float(stale))


def prepare(state: dict[str, Any], kind: Kind, grad: Tensor, capturable: bool) -> int:
    """The state of a parameter, made where there is none: the number of its steps so far."""
    if not state:
        _initialise(state, kind, grad, capturable)
        return 0
    if state["step"].device.type != "cpu" and not capturable:
        state["step"] = state["step"].cpu()  # load_state_dict moves it for fused=True
    if STALE in state and state[STALE].device.type != "cpu":
        state[STALE] = state[STALE].cpu()  # reading it in each step must wait for no device
    return int(state["step"])


def refresh_if_due(
    target: Target, kind: Kind, state: dict[str, Any], grad: Tensor, group: dict[str, Any]
) -> str | None:
    """Make the state at the first step; a new P where one is due.

    Returns why that failed, where it did; a gradient of zeros has no basis and is no failure.
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
    kind: Kind,
    state: dict[str, Any],
    new: range_finder.Refreshed,
    group: dict[str, Any],
    done: int,
) -> None:
    """Put a new P in the state, and the moments into its coordinates where that is asked for."""
    if target.galore.moments == "rotate" and done:
        beta1, beta2 = group["betas"]
        bias1, bias2 = 1 - beta1**done, 1 - beta2**done
        old = state["projector"]
        range_finder.rotate_moments(state, new.projector, old, kind.left, bias1, bias2)
    state["projector"] = new.projector
    target.refreshed, target.energy = done + 1, new.energy


def _initialise(state: dict[str, Any], kind: Kind, grad: Tensor, capturable: bool) -> None:
    device = grad.device if capturable else torch.device("cpu")
    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    moments = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if kind.amsgrad else [])]
    for name in moments:
        state[name] = torch.zeros(kind.state_shape, dtype=kind.dtype, device=kind.device)
    shape = kind.side, kind.rank
    state["projector"] = torch.eye(*shape, dtype=kind.dtype, device=kind.device)
    mark_stale(state, True)  # until it is made from a gradient
