"""Find the optimizer state of a weight, from which a resumed run restores its v or basis.

Trainers save only `model.state_dict()` and `optimizer.state_dict()`. What a resumed run also
needs is therefore stored in the optimizer's state of each weight, as plain tensors:

    vector              v (M,) of a factored state
    calibrated_vector   v (M,) of a compressed weight whose moments are full-size
    calibrated_sum      the sum (M,) of the running mean of such a weight
    projector, step     of a projected weight: they determine the basis of its next gradient

It is read when a graph needs a v or a basis that does not exist yet, and when an optimizer that
has stepped loads a state (`optim.resume`).
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

Held = Mapping[str, Any]  # an optimizer's state of one weight


def states_of(parameters: Iterable[Tensor]) -> dict[Tensor, Held]:
    """Parameter -> its state in the optimizers of this process.

    Optimizers are found by the garbage collector, when a run starts, never in a step. If one of
    several optimizers of a parameter has no state for it, the result excludes the parameter: a new
    run starts, and the others may be left from the last run.
    """
    optimizers = [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]
    known = [(_members(o), getattr(o, "state", None)) for o in optimizers]
    tables = [(members, state) for members, state in known if isinstance(state, dict)]
    found: dict[Tensor, Held] = {}
    for parameter in parameters:
        held = [state.get(parameter) for members, state in tables if parameter in members]
        states = [state for state in held if isinstance(state, dict) and state]
        if states and len(states) == len(held):
            found[parameter] = states[0]
    return found


def _members(optimizer: Optimizer) -> set[Tensor]:
    """The parameters of an optimizer; empty if it is not yet initialized."""
    return {p for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
