"""The record of one optimizer: which parameters memrewrite updates, and by which updates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from memrewrite.errors import warn
from memrewrite.gradients.basis import Vector
from memrewrite.moments.factored import FactoredKind
from memrewrite.moments.projected import Target
from memrewrite.moments.stored import StoredKind
from memrewrite.moments.update import Kind, Update, build
from memrewrite.session.session import Session

compiled: dict[tuple[Kind, str], Update] = {}


@dataclass
class Attachment:
    """The parameters of one optimizer that memrewrite updates, and what it knows of their steps."""

    targets: dict[Tensor, Target] = field(default_factory=dict)
    ported: dict[Tensor, Session] = field(default_factory=dict)  # gradients that may be small
    scaled: dict[Tensor, Session] = field(default_factory=dict)  # gradients A (x) v, in any form
    stored: dict[Tensor, Session] = field(default_factory=dict)  # moments in a storage format
    expected: dict[Tensor, Vector] = field(default_factory=dict)  # small, no graph yet; v is zeros
    factored: dict[Tensor, FactoredKind] = field(default_factory=dict)  # in the latest step
    dense: dict[Tensor, Session] = field(default_factory=dict)  # of `scaled`, dense in it
    collected: bool = False  # whether `_init_group` ran in the latest step
    traced: bool = False  # compiled: it never steps our parameters, whatever their gradients
    serves: bool = False  # whether any of its parameters belongs to a compiled model
    key: tuple[Any, ...] = ()  # the sessions and parameters that `targets` was made from
    post_hook: Any = None
    state_hooks: list[Any] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)  # kinds of warning that were given
    compared: dict[Tensor, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (state's v, v)
    kinds: dict[Tensor, StoredKind] = field(default_factory=dict)  # of `stored`, in the last step
    checked: dict[Tensor, Tensor] = field(default_factory=dict)  # of `stored`: a tensor that passed

    def warn_once(self, kind: str, message: str) -> None:
        """Warn at most once per kind and optimizer."""
        if kind not in self.warned:
            self.warned.add(kind)
            warn(message)


def members(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
    """(group, parameter) for every parameter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield group, parameter


def name_of(optimizer: Optimizer) -> str:
    """The class name with its module, as other libraries have an AdamW too."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def update_of(kind: Kind, session: Session) -> Update:
    """The compiled update of a kind, built on first use."""
    key = (kind, session.engine.backend)
    if key not in compiled:
        compiled[key] = build(kind, session.engine)
    return compiled[key]


def numbers_of(
    update: Update,
    step: Tensor,
    group: dict[str, Any],
    shared: dict[Any, tuple[Any, ...]],
    scale: float = 1.0,
) -> tuple[Any, ...]:
    """Increment the step; returns the scalars of the update, shared per kind and group.

    scale: factor on the step, see `slowed`.
    """
    key = (update.kind, id(group), scale, float(step) if step.device.type == "cpu" else None)
    if key in shared and step.device.type == "cpu":  # reading it synchronises no device
        step += 1
        return shared[key]
    kind = update.kind
    shared[key] = update.numbers(step, kind.row.numbers(slowed(group, scale), kind.flags))
    return shared[key]


def slowed(group: dict[str, Any], scale: float) -> dict[str, Any]:
    """The parameter group with lr scaled, and an unchanged decoupled decay (1 - lr wd) W.

    An L2 decay is part of the gradient, whose scale Adam normalises away.
    """
    if scale == 1.0:
        return group
    decay = group["weight_decay"] / scale if group["decoupled_weight_decay"] else None
    return {
        **group,
        "lr": group["lr"] * scale,
        "weight_decay": group["weight_decay"] if decay is None else decay,
    }
