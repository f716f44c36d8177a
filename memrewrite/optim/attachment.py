"""What memrewrite does around the steps of one optimizer, and the updates that it compiled."""

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
    """What memrewrite does around the steps of one optimizer."""

    targets: dict[Tensor, Target] = field(default_factory=dict)
    ported: dict[Tensor, Session] = field(default_factory=dict)  # gradients that may be small
    scaled: dict[Tensor, Session] = field(default_factory=dict)  # gradients A (x) v, in any form
    stored: dict[Tensor, Session] = field(default_factory=dict)  # moments in a form of their own
    expected: dict[Tensor, Vector] = field(default_factory=dict)  # small ones to come; v is zeros
    factored: dict[Tensor, FactoredKind] = field(default_factory=dict)  # in the latest step
    dense: dict[Tensor, Session] = field(default_factory=dict)  # in it, dense ones of `scaled`
    collected: bool = False  # in the latest step: gradients and parameters, by torch's own code
    traced: bool = False  # a compiled step never steps ours itself, whatever their gradients are
    serves: bool = False  # whether any of its parameters is a compiled model's
    key: tuple[Any, ...] = ()  # the sessions and parameters that `targets` was made from
    post_hook: Any = None
    state_hooks: list[Any] = field(default_factory=list)
    told: set[str] = field(default_factory=set)  # kinds of warning that were given
    compared: dict[Tensor, tuple[Tensor, Tensor]] = field(default_factory=dict)  # (state's v, v)
    kinds: dict[Tensor, StoredKind] = field(default_factory=dict)  # of `stored`, in the last step
    checked: dict[Tensor, Tensor] = field(default_factory=dict)  # of `stored`: a tensor in order

    def warn_once(self, kind: str, message: str) -> None:
        """One warning of a kind for an optimizer."""
        if kind not in self.told:
            self.told.add(kind)
            warn(message)


def members(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
    """(group, parameter) of every parameter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield group, parameter


def name_of(optimizer: Optimizer) -> str:
    """Of its class, with the module: others than torch have an AdamW too."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def update_of(kind: Kind, session: Session) -> Update:
    """The compiled update of a kind, built where there is none."""
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
    """Count a step; the scalars of its update, the same for all weights of a kind and group.

    scale: factor on the step, see `slowed`.
    """
    key = (update.kind, id(group), scale, float(step) if step.device.type == "cpu" else None)
    if key in shared and step.device.type == "cpu":  # reading another would wait for its device
        step += 1
        return shared[key]
    kind = update.kind
    shared[key] = update.numbers(step, kind.row.numbers(slowed(group, scale), kind.flags))
    return shared[key]


def slowed(group: dict[str, Any], scale: float) -> dict[str, Any]:
    """A parameter group with the step scaled, and its decoupled decay, (1 - lr wd) W, as it was.

    An L2 decay is a part of the gradient, and Adam divides its size out again.
    """
    if scale == 1.0:
        return group
    decay = group["weight_decay"] / scale if group["decoupled_weight_decay"] else None
    return {
        **group,
        "lr": group["lr"] * scale,
        "weight_decay": group["weight_decay"] if decay is None else decay,
    }
