"""Optimizers as rows: the functional form of a step in torch, its state, its hyperparameters.

Adam and AdamW are two rows; to support another optimizer, add one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.adam import adam

from passes.base import Pass
from passes.update.adam import hyperparameters_as_inputs, lower_fused_adam


@dataclass(frozen=True)
class Flags:
    """The options of a parameter group that change the graph of an update."""

    amsgrad: bool = False
    maximize: bool = False
    decays: bool = False  # weight decay other than zero
    decoupled: bool = False


@dataclass(frozen=True, eq=False)
class Row:
    """One optimizer.

    functional: flags -> the step of one weight, a function that writes its arguments: (weight,
        gradient, its moments in order, step), then `hyperparameters` where `inputs` is empty.
        `step` (), float32, includes this step.
    moments: names of the state tensors of the weight's shape, with the flag that each needs.
    hyperparameters: names in the order of the update's inputs, 0-d float64 each.
    inputs: the passes that turn constants of the captured graph into such inputs.
    lowering: the passes that lower the captured graph to plain aten.
    """

    name: str
    functional: Callable[[Flags], Callable[..., Any]]
    moments: Mapping[str, str | None]
    hyperparameters: tuple[str, ...]
    inputs: tuple[Pass, ...] = ()
    lowering: tuple[Pass, ...] = ()
    values: Callable[[dict[str, Any]], dict[str, Any]] = lambda group: group

    def moments_of(self, flags: Flags) -> list[str]:
        """Names of a weight's moments."""
        return [n for n, flag in self.moments.items() if flag is None or getattr(flags, flag)]

    def names(self, flags: Flags) -> list[str]:
        """Names of the hyperparameters of an update; excludes a weight decay of 0."""
        return [n for n in self.hyperparameters if flags.decays or n != "weight_decay"]

    def numbers(self, group: dict[str, Any], flags: Flags) -> list[Tensor]:
        """A parameter group's hyperparameters, as inputs of the update."""
        values = self.values(group)
        return [_scalar(values[name]) for name in self.names(flags)]


def _scalar(value: float | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64).reshape(())
    return torch.tensor(value, dtype=torch.float64)


# --- Adam and AdamW ---------------------------------------------------------------------------


def _adam(decoupled: bool) -> Callable[[Flags], Callable[..., Any]]:
    """torch's fused update of one weight."""

    def functional(flags: Flags) -> Callable[..., Any]:
        def write(largest: list[Tensor], *tensors: Tensor) -> tuple[()]:
            param, grad, exp_avg, exp_avg_sq, step = tensors
            adam(
                [param],
                [grad],
                [exp_avg],
                [exp_avg_sq],
                largest,
                [step],
                fused=True,
                amsgrad=flags.amsgrad,
                maximize=flags.maximize,
                weight_decay=0.01 if flags.decays else 0.0,
                decoupled_weight_decay=decoupled,
                lr=1e-3,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
            )
            return ()

        # The names of these arguments become those of the graph's inputs.
        def plain(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Tensor) -> Any:
            return write([], weight, grad, m, v, step)

        def amsgrad(
            weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, largest: Tensor, step: Tensor
        ) -> Any:
            return write([largest], weight, grad, m, v, step)

        return amsgrad if flags.amsgrad else plain

    return functional


def _adam_values(group: dict[str, Any]) -> dict[str, Any]:
    beta1, beta2 = group["betas"]
    return {**group, "beta1": beta1, "beta2": beta2}


_ADAM: dict[str, Any] = {
    "moments": MappingProxyType({"exp_avg": None, "exp_avg_sq": None, "max_exp_avg_sq": "amsgrad"}),
    "hyperparameters": ("lr", "beta1", "beta2", "weight_decay", "eps"),
    "inputs": (hyperparameters_as_inputs(),),
    "lowering": (lower_fused_adam(),),
    "values": _adam_values,
}
ADAM = Row("Adam", _adam(decoupled=False), **_ADAM)
ADAMW = Row("AdamW", _adam(decoupled=True), **_ADAM)


def row_of(optimizer: Optimizer, group: dict[str, Any]) -> Row | None:
    """The row of an optimizer and a parameter group, or None if it has none."""
    if inspect.unwrap(type(optimizer).step) is not inspect.unwrap(Adam.step):
        return None
    return ADAMW if group["decoupled_weight_decay"] else ADAM


def flags_of(group: dict[str, Any]) -> Flags:
    """The flags of a parameter group."""
    decoupled = bool(group.get("decoupled_weight_decay"))
    amsgrad, maximize = bool(group.get("amsgrad")), bool(group.get("maximize"))
    return Flags(amsgrad, maximize, group.get("weight_decay", 0) != 0, decoupled)
