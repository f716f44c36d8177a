"""What the optimizers of this process hold of a weight: where a resumed run goes on from.

Trainers save `model.state_dict()` and `optimizer.state_dict()` and nothing of ours. What a run
needs besides is therefore in the optimizer's state of each weight, as plain tensors:

    vector              v (M,) of a factored state, along which its moments are
    calibrated_vector   v (M,) of a compressed weight whose moments are full-size
    calibrated_sum      the sum (M,) behind the running mean of one
    projector, step     of a projected one: the basis of the next gradient follows from them

It is read back the first time that a graph needs a v or a basis and there is none, and whenever
an optimizer that has stepped is given another state (`optim.resume`).
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

Held = Mapping[str, Any]  # an optimizer's state of one weight


def states_of(parameters: Iterable[Tensor]) -> dict[Tensor, Held]:
    """What the optimizers of this process hold of each parameter.

    An optimizer knows its parameters, and nobody knows all optimizers but the garbage
    collector. It is asked when a run starts, never in a step. Where one of those that have a
    parameter has no state of it, a new run starts: another one may be left over from the last.
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
    """None of one that is not made yet."""
    return {p for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
