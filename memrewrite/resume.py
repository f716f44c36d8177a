"""Going on from a checkpoint that holds the model's and the optimizer's state alone.

Trainers save `model.state_dict()` and `optimizer.state_dict()` and nothing of ours. What a run
needs besides is therefore in the optimizer's state of each weight, as plain tensors:

    vector              v (M,) of a factored state, along which its moments are
    calibrated_vector   v (M,) of a compressed weight whose moments are full-size
    calibrated_sum      the sum (M,) behind the running mean of one
    projector, step     of a projected one: the basis of the next gradient follows from them

and is read back the first time that a graph needs a v or a basis and the session has none.
`Optimizer.load_state_dict` casts every tensor to the dtype of its weight, so a v that the
weight's dtype cannot hold is stored in several rows that can: see `pack`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

VECTOR = "vector"
CALIBRATED = "calibrated_vector"
SUM = "calibrated_sum"
BITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}

State = dict[str, Any]


def pack(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (M,) as numbers of `dtype` that say the same: x itself, or (1 + n, M).

    Row 0 is a binary exponent e; the others are pieces, each of as many bits as `dtype` has:
    x = 2^e (piece_1 + 2^-b piece_2 + 2^-2b piece_3 ...).
    """
    bits, step = BITS[x.dtype], BITS[dtype]
    if bits <= step:
        return x
    exponent = math.frexp(float(x.abs().max()))[1] - 15  # float16 has more room above than below
    rows, rest = [torch.full_like(x, exponent)], x * 2.0**-exponent
    for _ in range(-(-bits // step)):
        rows.append(rest.to(dtype).to(x.dtype))
        rest = (rest - rows[-1]) * 2.0**step
    return torch.stack(rows).to(dtype)


def unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The x (M,), of `dtype`, that `pack` was given."""
    if packed.ndim == 1:
        return packed.to(dtype)
    exponent, pieces, step = int(packed[0, 0]), packed[1:].to(dtype), BITS[packed.dtype]
    total = torch.zeros_like(pieces[0])
    for place in reversed(range(len(pieces))):  # smallest first: every partial sum is exact
        total = total + pieces[place] * 2.0 ** (-step * place)
    return total * 2.0**exponent


def packed_bytes(size: int, dtype: torch.dtype) -> int:
    """Of the v (M,) that the state of a weight of `dtype` holds."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = 1 if BITS[wide] <= BITS[dtype] else 1 - (-BITS[wide] // BITS[dtype])
    return rows * size * dtype.itemsize if rows > 1 else size * wide.itemsize


# --- reading -------------------------------------------------------------------------------


def states_of(parameters: Iterable[Tensor]) -> dict[int, list[State]]:
    """By id of a parameter, what the optimizers of this process hold of it.

    An optimizer knows its parameters, and nobody knows all optimizers but the garbage
    collector. It is asked when a run starts, never in a step.
    """
    optimizers = [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]
    states = [getattr(optimizer, "state", None) for optimizer in optimizers]
    tables = [table for table in states if isinstance(table, dict)]
    found: dict[int, list[State]] = {}
    for parameter in parameters:
        held = (table[parameter] for table in tables if parameter in table)
        mine = [state for state in held if isinstance(state, dict) and state]
        if mine:
            found[id(parameter)] = mine
    return found


def vector_in(state: State, size: int, dtype: torch.dtype) -> Tensor | None:
    """The v that an optimizer's state of a weight holds, if it holds one that is in use."""
    return _read(state, (VECTOR, CALIBRATED), size, dtype)


def sum_in(state: State, size: int) -> Tensor | None:
    """The sum behind a running mean."""
    return _read(state, (SUM,), size, torch.float64)


def _read(state: State, keys: Iterable[str], size: int, dtype: torch.dtype) -> Tensor | None:
    for key in keys:
        packed = state.get(key)
        if isinstance(packed, Tensor) and packed.ndim and packed.shape[-1] == size:
            found = unpack(packed.detach(), dtype)
            if bool(found.any()) and math.isfinite(float(found.norm())):
                return found
    return None


# --- writing -------------------------------------------------------------------------------


def store(optimizer: Optimizer, parameter: nn.Parameter, key: str, value: Tensor) -> None:
    """Put a v, or the sum behind one, in the state of a weight that has a state of full size."""
    if isinstance(optimizer, SGD):  # without momentum it keeps nothing, and does not mind
        optimizer.state[parameter]
    state = optimizer.state.get(parameter)
    if not isinstance(state, dict) or VECTOR in state:
        return
    if state or isinstance(optimizer, SGD):  # others take an empty state for one to be made
        state[key] = pack(value.detach(), parameter.dtype)
