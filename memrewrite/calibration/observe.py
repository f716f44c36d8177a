"""Read the inputs of chosen weights, from the captured graph itself.

One batch, for a v that is then frozen (`subtoken_sums`); or every batch, for a running mean
(`observe_inputs`).

For one batch the part of the graph that the inputs need is replayed, eagerly, without
gradients (unless the forward takes some itself), on the very arguments of the call
(`memrewrite.calibration.replay`). A linear that Dynamo shows as one is not run for its own sake:
its x is read. Whatever else takes the weight (packed attention projections, einsum) runs under an
observer, since it ends in an aten matmul that reads the weight's memory, and there its other
factor is x. The replay leaves no trace: the random state is put back, what is written to is a
clone, and autocast's weight cache stays off. Where gradients are off, a weight has none, and
its input does not count.
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
VIEWS = {  # methods and functions, by name, whose result is the weight still, or a part of it
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
    """What a replay saw, by the position of the weight."""

    sizes: Mapping[int, int]  # M of each
    sums: dict[int, Tensor] = field(default_factory=dict)  # (M,), float64
    absolute: dict[int, Tensor] = field(default_factory=dict)  # sum of |x|, ()
    failure: str = ""  # why it stopped, if it did
    gradients: bool = False  # whether the forward needs them

    def add(self, position: int, x: Tensor) -> None:
        total = subtoken_sum(x, self.sizes[position], torch.float64)
        absolute = x.detach().abs().sum(dtype=torch.float64)
        known = position in self.sums
        self.sums[position] = self.sums[position] + total if known else total
        self.absolute[position] = self.absolute[position] + absolute if known else absolute

    def row(self, position: int, device: torch.device) -> Tensor:
        """What ranks add up: the sum, that of |x|, and 1; zeros where nothing was seen."""
        if position not in self.sums:
            return torch.zeros(self.sizes[position] + 2, dtype=torch.float64, device=device)
        total = self.sums[position].to(device)
        return torch.cat([total, self.absolute[position].to(device)[None], total.new_ones(1)])


class _Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `seen(position, x)` for every matmul of a watched weight with some x."""

    supports_higher_order_operators = True

    def __init__(self, seen: Callable[[int, Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner: dict[int, int] = {}
        self.alive: list[Any] = []  # a freed cast's address could be given out again
        self.seen = seen

    def look_for(self, positions: Sequence[int], *weights: Tensor) -> None:
        """Watch these, and no others."""
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
    """Per watched argument, the sum of all sub-tokens of all its inputs: (M,) each.

    `sizes` maps the argument position of a weight to M. A weight whose input nothing shows is
    missing from the result; so are all that come behind a node that cannot be run again,
    which `failure` names. Sums run in float64: they are order-independent enough that q, k
    and v of one input get one v.
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
    """What replays a graph, or the body of one of its regions, as far as it is needed."""
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
    """What to read of each node that takes a watched weight.

    function: the graph is the forward of an autograd.Function, which runs without gradients
    but has a backward of its own.
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
    """The nodes that are a watched weight: itself, transposed, cast, or a part of it."""
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
    """(x, weight) of a linear over a watched weight; else nothing."""
    if node.op not in ("call_function", "call_method") or node.target not in LINEARS:
        return None
    at_x, at_weight = LINEARS[node.target]
    if len(node.args) <= at_weight:
        return None
    x, weight = node.args[at_x], node.args[at_weight]
    if not isinstance(x, Node) or not isinstance(weight, Node) or weight not in weights:
        return None
    # Inside a functorch transform a node stands for a wrapped tensor: no x to read there.
    return None if type(x.meta.get("example_value")) is Tensor else (x, weight)


def _is_custom(node: Node) -> bool:
    """True for an operation in which an observer sees nothing, and that may do anything."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace not in ("aten", "prims")
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target).split(".")[0] not in ("aten", "prims")
    return False


# --- every batch: a graph that also returns what its linears read ---------------------------


def observe_inputs(gm: GraphModule, sizes: Mapping[int, int]) -> tuple[GraphModule, int, list[int]]:
    """A copy that appends, per visible linear, the sum of its input's sub-tokens: (M,).

    `sizes` maps the argument position of a weight to M. Returns the copy, the number of its own
    outputs, and whose sum each new output is. A linear inside a checkpointed region, or one that
    Dynamo shows as part of a larger call, is not visible: its v stays the mean of the first batch
    that was usable.
    """
    copied = copy_module(gm)
    places = copied.graph.find_nodes(op="placeholder")
    weights = _carriers(copied.graph, {places[position]: position for position in sizes})
    output = copied.graph.output_node()
    own: Any = output.args[0]
    observed, sums = [], []
    for node, x, weight in list(_linears(copied.graph, weights)):
        arguments = (x, sizes[weights[weight]], torch.float64)
        with copied.graph.inserting_before(node):  # what comes later may write to x
            sums.append(copied.graph.call_function(subtoken_sum, arguments))
        observed.append(weights[weight])
    output.args = ((*own, *sums),)
    copied.recompile()
    return copied, len(own), observed


def _linears(graph: Graph, weights: Mapping[Node, int]) -> Iterator[tuple[Node, Node, Node]]:
    """(node, x, weight) of each whose weight has a gradient."""
    for node, enabled in grad_modes(graph):
        linear = _linear_operands(node, weights) if enabled else None
        if linear is not None:
            yield node, *linear
