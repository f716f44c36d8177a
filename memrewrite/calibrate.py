"""Read the inputs of chosen weights, from the captured graph itself.

A first batch, for a v that is then frozen (`subtoken_sums`); or every batch, for a
running mean (`observe_inputs`).

The graph is replayed once, eagerly, without gradients, on the very arguments of the
first call. Whatever the model calls its linear (F.linear, addmm, x @ W, packed
attention projections), it ends in an aten matmul that reads the weight's memory, and
there its other factor is x. The replay leaves no trace: the random state is put back,
every argument that is not a parameter is a clone (the graph may write to buffers), and
autocast's weight cache stays off.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import TorchDispatchMode

from memrewrite.backend import copy_module
from memrewrite.plan import Weight

aten = torch.ops.aten
MATMULS = {  # op -> positions of its two factors
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}
SAME_VALUES = {aten._to_copy.default, aten.clone.default}


def subtoken_sum(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """The sum of all sub-tokens: (..., D) -> (size,), the last one padded with zeros."""
    padded = F.pad(x.detach(), (0, -x.shape[-1] % size))  # (..., G*M)
    return padded.reshape(-1, size).sum(0, dtype=dtype)  # (M,)


class _Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `seen(position, x)` for every matmul of a watched weight with some x."""

    supports_higher_order_operators = True

    def __init__(self, watched: Mapping[int, Tensor], seen: Callable[[int, Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner = {t.untyped_storage().data_ptr(): i for i, t in watched.items()}
        self.alive: list[Any] = []  # a freed cast's address could be given out again
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in SAME_VALUES and (owner := self._owner(args[0])) is not None:
            self.owner[out.untyped_storage().data_ptr()] = owner
            self.alive.append(out)
        elif func in MATMULS:
            left, right = (args[i] for i in MATMULS[func])
            if (owner := self._owner(right)) is not None:
                self.seen(owner, left)
            elif (owner := self._owner(left)) is not None:
                self.seen(owner, right.transpose(-1, -2))
        return out

    def _owner(self, value: Any) -> int | None:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return None
        return self.owner.get(value.untyped_storage().data_ptr())


class _Replay(Interpreter):
    """Runs a Dynamo graph without letting it turn gradients back on."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch._C._set_grad_enabled:
            return None
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            return _Replay(args[0]).run(*args[1:])
        return super().call_function(target, args, kwargs)


def subtoken_sums(
    gm: GraphModule, args: Sequence[Any], sizes: Mapping[int, int]
) -> dict[int, Tensor]:
    """Per watched argument, the sum of all sub-tokens of all its inputs: (M,) each.

    `sizes` maps the argument position of a weight to M. A weight whose input no matmul
    shows is missing from the result. Sums run in float64: they are order-independent
    enough that q, k and v of one input get one v.
    """
    sums: dict[int, Tensor] = {}

    def seen(position: int, x: Tensor) -> None:
        total = subtoken_sum(x, sizes[position], torch.float64)
        sums[position] = sums[position] + total if position in sums else total

    own = [
        a.detach().clone() if isinstance(a, Tensor) and not isinstance(a, torch.nn.Parameter) else a
        for a in args
    ]
    devices = {a.device for a in args if isinstance(a, Tensor) and a.device.type == "cuda"}
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with (
            torch.random.fork_rng(devices=sorted(devices, key=str)),
            torch.no_grad(),
            _Observer({i: args[i] for i in sizes}, seen),
        ):
            _Replay(gm).run(*own)
    finally:
        torch.set_autocast_cache_enabled(cached)
    return sums


# --- every batch: a graph that also returns what its linears read ---------------------------

LINEARS: dict[Any, tuple[int, int]] = {  # Dynamo's calls -> positions of x and of the weight
    F.linear: (0, 1),
    torch._C._nn.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.mm: (0, 1),
    torch.matmul: (0, 1),
    operator.matmul: (0, 1),
    "matmul": (0, 1),
    "mm": (0, 1),
}


def observe_inputs(
    gm: GraphModule, selected: Sequence[Weight]
) -> tuple[GraphModule, int, list[Weight]]:
    """A copy that appends, per visible linear, the sum of its input's sub-tokens: (M,).

    Returns the copy, the number of its own outputs, and whose sum each new output is. A
    linear inside a checkpointed region, or one that Dynamo shows as part of a larger
    call, is not visible: its v stays the mean of the first batch.
    """
    copied = copy_module(gm)
    places = copied.graph.find_nodes(op="placeholder")
    watched = {places[w.position]: w for w in selected}
    output = copied.graph.output_node()
    own: Any = output.args[0]
    observed, sums = [], []
    for node in list(copied.graph.nodes):
        for x, weight in _linear_operands(node, watched):
            arguments = (x, weight.size, torch.float64)
            with copied.graph.inserting_before(output):
                sums.append(copied.graph.call_function(subtoken_sum, arguments))
            observed.append(weight)
    output.args = ((*own, *sums),)
    copied.recompile()
    return copied, len(own), observed


def _linear_operands(node: Node, watched: Mapping[Node, Weight]) -> list[tuple[Node, Weight]]:
    """The input and the weight of a linear over a watched weight; else nothing."""
    if node.op not in ("call_function", "call_method") or node.target not in LINEARS:
        return []
    at_x, at_weight = LINEARS[node.target]
    if len(node.args) <= at_weight:
        return []
    x, weight = node.args[at_x], node.args[at_weight]
    while isinstance(weight, Node) and weight not in watched and weight.op == "call_method":
        weight = weight.args[0]  # .t(), .transpose(0, 1), .to(dtype)
    if not isinstance(x, Node) or not isinstance(weight, Node) or weight not in watched:
        return []
    return [(x, watched[weight])]
