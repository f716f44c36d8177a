"""Read the inputs of chosen weights in the captured graph.

From one batch, for a v that is then frozen (`subtoken_sums`), or from every batch, for a running
mean (`observe_inputs`).

For one batch, the part of the graph that the inputs depend on is replayed eagerly on the
arguments of the call, without gradients unless the forward computes some itself
(`memrewrite.calibration.replay`). A visible linear is not run: its x is read. Any other operation
on the weight (packed attention projections, einsum) runs under an observer, since it ends in an
aten matmul that reads the weight's storage, whose other factor is x. The replay has no side
effects: the RNG state is restored, what it writes to is a clone, and autocast's weight cache is
off. Inputs that are read while gradients are disabled do not count.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode

from memrewrite.calibration.replay import (
    Read,
    Replay,
    ReplayError,
    body_of,
    copy_module,
    differentiates,
    grad_modes,
    name_of,
    needed,
)

aten = torch.ops.aten
MATMULS = {  # op -> positions of its two factors
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
}
SAME_VALUES = {aten._to_copy.default, aten.clone.default}
LINEARS: dict[Any, tuple[int, int]] = {  # functions in Dynamo's graph -> positions of x, weight
    F.linear: (0, 1),
    torch._C._nn.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.mm: (0, 1),
    torch.matmul: (0, 1),
    operator.matmul: (0, 1),
    "matmul": (0, 1),
    "mm": (0, 1),
}
VIEWS = {  # names of methods and functions whose result is the weight or a part of it
    *("t", "transpose", "permute", "view", "reshape", "getitem", "chunk", "split", "narrow"),
    *("unbind", "to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous"),
    *("clone", "requires_grad_", "register_hook"),
}
ATTRIBUTES = ("T", "mT")


def subtoken_sum(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """The sum of all sub-tokens: (..., D) -> (size,), the last one padded with zeros."""
    padded = F.pad(x.detach(), (0, -x.shape[-1] % size))  # (..., G*M)
    return padded.reshape(-1, size).sum(0, dtype=dtype)  # (M,)


@dataclass
class Found:
    """The results of a replay, by argument position of the weight."""

    sizes: Mapping[int, int]  # M of each
    sums: dict[int, Tensor] = field(default_factory=dict)  # (M,), float64
    absolute: dict[int, Tensor] = field(default_factory=dict)  # sum of |x|, ()
    failure: str = ""  # why it stopped early; "" if it did not
    gradients: bool = False  # whether the forward computes gradients itself

    def add(self, position: int, x: Tensor) -> None:
        total = subtoken_sum(x, self.sizes[position], torch.float64)
        absolute = x.detach().abs().sum(dtype=torch.float64)
        known = position in self.sums
        self.sums[position] = self.sums[position] + total if known else total
        self.absolute[position] = self.absolute[position] + absolute if known else absolute

    def row(self, position: int, device: torch.device) -> Tensor:
        """(M + 2,) to add over ranks: the sum, the sum of |x|, and 1; zeros if x was not seen."""
        if position not in self.sums:
            return torch.zeros(self.sizes[position] + 2, dtype=torch.float64, device=device)
        total = self.sums[position].to(device)
        return torch.cat([total, self.absolute[position].to(device)[None], total.new_ones(1)])


class _Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `seen(position, x)` for every matmul of a watched weight with an x."""

    supports_higher_order_operators = True

    def __init__(self, seen: Callable[[int, Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner: dict[int, int] = {}
        self.alive: list[Any] = []  # the address of a freed cast could be reused
        self.seen = seen

    def look_for(self, positions: Sequence[int], *weights: Tensor) -> None:
        """Watch only these weights."""
        self.alive = [*weights]
        pairs = zip(weights, positions, strict=True)
        self.owner = {w.untyped_storage().data_ptr(): position for w, position in pairs}

    def run(self, node: Callable[[], Any]) -> Any:
        with self:
            return node()

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


def subtoken_sums(gm: GraphModule, args: Sequence[Any], sizes: Mapping[int, int]) -> Found:
    """Per watched weight, the sum (M,) of all sub-tokens of all its inputs.

    sizes: argument position of a weight -> M. The result excludes weights whose input is not
    visible, and those after a node that cannot be run twice, which `failure` names. Sums are in
    float64, so that their order hardly matters, and q, k and v of one input get equal v.
    """
    found = Found(sizes, gradients=differentiates(gm))
    places = gm.graph.find_nodes(op="placeholder")
    run = _runner(gm, {places[i]: i for i in sizes}, False, found)
    devices = {a.device for a in args if isinstance(a, Tensor) and a.device.type == "cuda"}
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with (
            torch.random.fork_rng(devices=sorted(devices, key=str)),
            torch.set_grad_enabled(found.gradients),
        ):
            run(*args)
    except ReplayError as error:
        found.failure = str(error)
    finally:
        torch.set_autocast_cache_enabled(cached)
    return found


def _runner(
    gm: GraphModule,
    watched: Mapping[Node, int],
    outputs: bool,
    found: Found,
    function: bool = False,
) -> Callable[..., Any]:
    """A function that replays the needed part of a graph, or of the body of a region."""
    weights = _carriers(gm.graph, watched)
    part = needed(gm.graph, _reads(gm.graph, weights, found, function), outputs)

    def inner(node: Node) -> Callable[..., Any]:
        body = body_of(node)
        assert body is not None
        inside, places = body[0], body[0].graph.find_nodes(op="placeholder")
        pairs = zip(places, body[1], strict=False)
        mine = {place: weights[a] for place, a in pairs if isinstance(a, Node) and a in weights}
        own = name_of(node) == "autograd_function_apply"
        return _runner(inside, mine, node in part.values, found, function or own)

    return Replay(gm, part, inner, found.gradients).replay


def _reads(
    graph: Graph, weights: Mapping[Node, int], found: Found, function: bool
) -> dict[Node, Read]:
    """What to read at each node that takes a watched weight.

    function: the graph is the forward of an autograd.Function, which runs without gradients
    but has its own backward.
    """
    observer = _Observer(found.add)
    reads: dict[Node, Read] = {}
    for node, enabled in grad_modes(graph):
        mine = [n for n in node.all_input_nodes if n in weights]
        if not mine or node in weights or node.op == "output" or not (enabled or function):
            continue
        linear = _linear_operands(node, weights)
        if linear is not None:
            reads[node] = Read((linear[0],), partial(found.add, weights[linear[1]]))
        elif body_of(node) is not None:
            reads[node] = Read(watch=lambda run: run())
        elif not _is_custom(node):
            positions = [weights[n] for n in mine]
            look = partial(observer.look_for, positions)
            reads[node] = Read(tuple(mine), look, observer.run)
    return reads


def _carriers(graph: Graph, watched: Mapping[Node, int]) -> dict[Node, int]:
    """The nodes that carry a watched weight: itself, transposed, cast, or a part of it."""
    found = dict(watched)
    for node in graph.nodes:
        of = node.args[0] if node.args else None
        if node.op not in ("call_method", "call_function") or not isinstance(of, Node):
            continue
        name = name_of(node)
        if of in found and (name in VIEWS or (name == "getattr" and node.args[1] in ATTRIBUTES)):
            found[node] = found[of]
    return found


def _linear_operands(node: Node, weights: Mapping[Node, int]) -> tuple[Node, Node] | None:
    """(x, weight) of a linear with a watched weight; else None."""
    if node.op not in ("call_function", "call_method") or node.target not in LINEARS:
        return None
    at_x, at_weight = LINEARS[node.target]
    if len(node.args) <= at_weight:
        return None
    x, weight = node.args[at_x], node.args[at_weight]
    if not isinstance(x, Node) or not isinstance(weight, Node) or weight not in weights:
        return None
    # Inside a functorch transform, values are wrapped tensors, which cannot be read.
    return None if type(x.meta.get("example_value")) is Tensor else (x, weight)


def _is_custom(node: Node) -> bool:
    """Whether it is a custom operation, whose matmuls an observer cannot see."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace not in ("aten", "prims")
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target).split(".")[0] not in ("aten", "prims")
    return False


# --- every batch: a graph that also returns the sums of its linears' inputs -----------------


def observe_inputs(gm: GraphModule, sizes: Mapping[int, int]) -> tuple[GraphModule, int, list[int]]:
    """A copy that also returns, per visible linear, the sum (M,) of its input's sub-tokens.

    sizes: argument position of a weight -> M. Returns the copy, the number of original outputs,
    and the weight of each new output. A linear in a checkpointed region, or in a larger call of
    Dynamo's graph, is not visible: its v stays the mean of the first usable batch.
    """
    copied = copy_module(gm)
    places = copied.graph.find_nodes(op="placeholder")
    weights = _carriers(copied.graph, {places[position]: position for position in sizes})
    output = copied.graph.output_node()
    own: Any = output.args[0]
    observed, sums = [], []
    for node, x, weight in list(_linears(copied.graph, weights)):
        arguments = (x, sizes[weights[weight]], torch.float64)
        with copied.graph.inserting_before(node):  # later nodes may write to x
            sums.append(copied.graph.call_function(subtoken_sum, arguments))
        observed.append(weights[weight])
    output.args = ((*own, *sums),)
    copied.recompile()
    return copied, len(own), observed


def _linears(graph: Graph, weights: Mapping[Node, int]) -> Iterator[tuple[Node, Node, Node]]:
    """(node, x, weight) of each linear whose weight requires a gradient."""
    for node, enabled in grad_modes(graph):
        linear = _linear_operands(node, weights) if enabled else None
        if linear is not None:
            yield node, *linear
