"""Find a head and its cross entropy in a captured graph.

The graph is Dynamo's, of torch functions. Between the linear and the cross entropy there may be
casts to float32, scales by a number, tanh, and operations on rows: slices, views, contiguous.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

LINEAR = {torch._C._nn.linear, F.linear}
SCALES: dict[Any, Callable[[float], float]] = {
    operator.mul: lambda c: c,
    torch.mul: lambda c: c,
    operator.truediv: lambda c: 1 / c,
    torch.div: lambda c: 1 / c,
}
NAMES = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction")
VIEWS = {"view", "reshape", "flatten"}
ROWS = {"contiguous", *VIEWS}


@dataclass
class Head:
    """A linear whose output is read by one cross entropy, and perhaps returned."""

    weights: list[int]  # positions of the weight and the bias among the graph's inputs
    linear: Node
    chain: list[Node]  # from the linear, included, to the loss, excluded
    loss: Node
    steps: list[float]
    upcast: bool
    returned: Node | None  # the node of the chain that the graph returns

    @property
    def logits(self) -> Tensor:
        """Those that the loss reads, fake; (N, V)."""
        return value_of(options_of(self.loss)["input"])


def has_loss(graph: Graph) -> bool:
    """Whether the graph calls F.cross_entropy."""
    return any(node.target is F.cross_entropy for node in graph.nodes)


def find_head(graph: Graph) -> Head | str:
    """The head to chunk, or the reason why there is none."""
    losses = [n for n in graph.nodes if n.target is F.cross_entropy]
    if len(losses) != 1:
        return f"the graph has {len(losses)} calls of F.cross_entropy, not one"
    (loss,) = losses
    options = options_of(loss)
    if options["reduction"] not in ("mean", "sum"):
        return f"reduction={options['reduction']!r} needs the gradient of each row"
    if options["weight"] is not None:
        return "the loss has class weights"
    if options["size_average"] is not None or options["reduce"] is not None:
        return "the loss has a deprecated reduction"
    logits, target = value_of(options["input"]), value_of(options["target"])
    if logits.ndim != 2 or target.ndim != 1 or target.is_floating_point():
        return "the loss is not one of rows of logits and labels"
    node, chain = options["input"], []
    while node.target not in LINEAR:
        chain.append(node)
        node = node.args[0] if node.args else None
        if not isinstance(node, Node) or node.op == "placeholder":
            return "the loss does not read a linear"
    chain = [node, *reversed(chain)]
    return _checked(graph, chain, loss)


def _checked(graph: Graph, chain: list[Node], loss: Node) -> Head | str:
    steps: list[float] = []
    upcast = False
    for node in chain[1:]:
        step = step_of(node)
        if step is None:
            return f"{node.name} stands between the head and the loss"
        if step == "upcast":
            given = value_of(node.args[0]).dtype
            if given == torch.float64 or (steps and given != torch.float32):
                return f"{node.name} casts to float32 after a scale, or from float64"
            upcast = True
        elif step != "rows":
            steps.append(float(step))
    kinds = [n.target for n in chain if step_of(n) == "rows"]
    viewed = next((i for i, kind in enumerate(kinds) if kind in VIEWS), len(kinds))
    if operator.getitem in kinds[viewed:]:
        return "rows are sliced after a view"
    if any(str(n.target).endswith("_") for n in operands_of(chain[0])[0].users):
        return "the head's input may be written to"
    output = graph.output_node()
    readers = {reader for node in chain for reader in node.users} - {*chain, loss}
    if readers - {output}:
        return f"{next(iter(readers - {output})).name} reads the logits too"
    returned = [node for node in chain if output in node.users]
    copies = [a for a in output.args[0] if a in returned]  # type: ignore[union-attr]
    if len(copies) > 1 or any(step_of(node) == "rows" for node in _until(chain, returned)):
        return "the logits are returned more than once, or as a view"
    h, w = operands_of(chain[0])[:2]
    if any(p is not None and p.op != "placeholder" for p in operands_of(chain[0])[1:]):
        return "the head's weight is computed in the graph"
    if value_of(h).dtype == torch.float16:
        return "the loss scale must come before rounding to float16"
    mixed = value_of(h).dtype != value_of(w).dtype
    if (
        mixed
        or any("autocast" in str(n.target) for n in graph.nodes)
        or torch.is_autocast_enabled("cpu")
    ):
        return "autocast"
    places = [n for n in graph.nodes if n.op == "placeholder"]
    weights = [places.index(p) for p in operands_of(chain[0])[1:] if p is not None]
    return Head(weights, chain[0], chain, loss, steps, upcast, returned[0] if returned else None)


def _until(chain: list[Node], returned: list[Node]) -> list[Node]:
    return chain[1 : chain.index(returned[0]) + 1] if returned else []


def step_of(node: Node) -> Any:
    """A number to scale by, 0.0 for tanh, "rows", "upcast", or None for anything else."""
    if node.target in SCALES and isinstance(node.args[1], int | float) and node.args[1]:
        return SCALES[node.target](node.args[1])
    if node.target in (torch.tanh, "tanh"):
        return 0.0
    if node.target == "float" or (node.target == "to" and torch.float32 in node.args):
        return "upcast"
    if node.op == "call_method" and node.target in ROWS:
        same = value_of(node).shape[-1] == value_of(node.args[0]).shape[-1]
        return "rows" if same else None
    if node.target is operator.getitem and _keeps_columns(node):
        return "rows"
    return None


def _keeps_columns(node: Node) -> bool:
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    parts = [p for i in index if isinstance(i, slice) for p in (i.start, i.stop, i.step)]
    simple = all(isinstance(i, slice) or i is Ellipsis for i in index)
    simple = simple and all(p is None or isinstance(p, int) for p in parts)
    full = index[-1] in (slice(None, None, None), Ellipsis)
    whole = len(index) < value_of(node.args[0]).ndim and Ellipsis not in index
    return simple and (full or whole)


def operands_of(linear: Node) -> tuple[Node, Node, Node | None]:
    """h, weight and bias of a linear."""
    given = dict(zip(("input", "weight", "bias"), linear.args, strict=False)) | linear.kwargs
    return given["input"], given["weight"], given.get("bias")  # type: ignore[return-value]


def options_of(loss: Node) -> dict[str, Any]:
    defaults = dict.fromkeys(NAMES) | {
        "ignore_index": -100,
        "reduction": "mean",
        "label_smoothing": 0.0,
    }
    names = (*NAMES, "label_smoothing")
    return {**defaults, **dict(zip(names, loss.args, strict=False)), **loss.kwargs}


def value_of(node: Any) -> Tensor:
    return node.meta["example_value"]  # type: ignore[no-any-return]
