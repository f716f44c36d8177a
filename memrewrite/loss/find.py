"""Find a head and its cross entropy in a captured graph.

The graph is Dynamo's, of torch functions. Between the linear and the cross entropy there may be
casts to float32, scales by a number, tanh, and operations on rows: slices, views, contiguous.
Autocast shows in the dtypes of the linear and the loss, which Dynamo has computed under it.
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

from memrewrite.loss.autocast import autocast_at

LINEAR = {torch._C._nn.linear, F.linear}
SCALES: dict[Any, Callable[[float], float]] = {
    operator.mul: lambda c: c,
    torch.mul: lambda c: c,
    operator.truediv: lambda c: 1 / c,
    torch.div: lambda c: 1 / c,
}
NAMES = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction")
PRODUCTS = {operator.mul, torch.mul}
NORMS = {torch.logsumexp, "logsumexp"}
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
    upcast: bool  # to float32, before the loss or by it
    compute: torch.dtype  # of the linear
    made: list[Node]  # from the linear, included, to the node that the graph returns; or none
    norms: list[Node]  # logsumexp of the logits that the loss reads
    rounded: bool = False  # whether what the forward saves is rounded: dW would be

    @property
    def by_rows(self) -> bool:
        """Whether backward computes the logits again; see `passes.chunked_rows`."""
        options = options_of(self.loss)
        each = options["reduction"] == "none" or options["weight"] is not None
        return each or bool(self.norms) or self.rounded

    @property
    def logits(self) -> Tensor:
        """Those that the loss reads, in the dtype that it is computed in; fake; (N, V)."""
        half = self.compute == torch.float16
        dtype = torch.float32 if half else value_of(self.loss).dtype
        return value_of(options_of(self.loss)["input"]).to(dtype)


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
    if options["weight"] is not None and value_of(options["weight"]).requires_grad:
        return "the loss has class weights that are trained"
    if options["size_average"] is not None or options["reduce"] is not None:
        return "the loss has a deprecated reduction"
    logits, target = value_of(options["input"]), value_of(options["target"])
    if logits.ndim != 2 or target.ndim != 1 or target.is_floating_point():
        return "the loss is not one of rows of logits and labels"
    node, chain = options["input"], []
    while node.target not in LINEAR:
        chain.append(node)
        node = _read_by(node)
        if not isinstance(node, Node) or node.op == "placeholder":
            return "the loss does not read a linear"
    chain = [node, *reversed(chain)]
    return _checked(graph, chain, loss)


def _checked(graph: Graph, chain: list[Node], loss: Node) -> Head | str:
    compute = _compute_of(chain[0])
    if compute is None:
        return "the head's input and weight differ in dtype, outside of autocast"
    steps = _steps(chain, value_of(loss).dtype)
    if isinstance(steps, str):
        return steps
    norms = _norms(chain, loss)
    made = norms if isinstance(norms, str) else _made(graph, chain, [loss, *norms])
    if isinstance(norms, str) or isinstance(made, str):
        return str(made)
    h, *weights = operands_of(chain[0])
    if any(str(n.target).endswith("_") for n in h.users):
        return "the head's input may be written to"
    if any(p is not None and p.op != "placeholder" for p in weights):
        return "the head's weight is computed in the graph"
    places = [n for n in graph.nodes if n.op == "placeholder"]
    positions = [places.index(p) for p in weights if p is not None]
    upcast = value_of(loss).dtype != compute
    return Head(positions, chain[0], chain, loss, steps, upcast, compute, made, norms)


def _compute_of(linear: Node) -> torch.dtype | None:
    """The dtype that a linear computes in, or None if it cannot."""
    made = value_of(linear)
    if all(value_of(p).dtype == made.dtype for p in operands_of(linear) if p is not None):
        return made.dtype
    # A fake linear of mixed dtypes does not raise as a true one would.
    return made.dtype if autocast_at(linear, made.device.type) == made.dtype else None


def _steps(chain: list[Node], dtype: torch.dtype) -> list[float] | str:
    """The scales and tanh between the linear and a loss that is computed in `dtype`.

    One that the model computes in the dtype of the linear is computed in that of the loss, without
    its rounding, as compiled code does too.
    """
    steps: list[float] = []
    for node in chain[1:]:
        step = step_of(node)
        if step is None:
            return f"{node.name} stands between the head and the loss"
        if step not in ("rows", "upcast"):
            steps.append(float(step))
            if value_of(node).dtype not in (dtype, value_of(chain[0]).dtype):
                return f"{node.name} is computed in {value_of(node).dtype}, the loss in {dtype}"
    if torch.float64 in (value_of(chain[0]).dtype, dtype) and dtype != value_of(chain[0]).dtype:
        return "the loss casts from float64"
    kinds = [n.target for n in chain if step_of(n) == "rows"]
    viewed = next((i for i, kind in enumerate(kinds) if kind in VIEWS), len(kinds))
    return "rows are sliced after a view" if operator.getitem in kinds[viewed:] else steps


def _norms(chain: list[Node], loss: Node) -> list[Node] | str:
    """The nodes that take the logsumexp of just what the loss reads."""
    found = []
    for i, node in enumerate(chain):
        for reader in node.users:
            if reader.target in NORMS and _over_columns(reader, value_of(node).ndim):
                viewed = any(n.target in VIEWS for n in chain[: i + 1])
                later = all(step_of(n) == "rows" and n.target in ROWS for n in chain[i + 1 :])
                rounded = value_of(reader).dtype != value_of(loss).dtype
                if not later or rounded or (viewed and value_of(node).ndim > 2):
                    return f"{reader.name} reads logits that are not those of the loss"
                found.append(reader)
    if not found:
        return found
    if any(n.target not in {*ROWS, operator.getitem} for n in given_after(loss, found)):
        return f"{found[0].name} reads the logits before the labels are made"
    return found


def given_after(loss: Node, norms: list[Node]) -> list[Node]:
    """What makes labels and class weights of a loss, but after the first of `norms`, in order."""
    order = {node: i for i, node in enumerate(loss.graph.nodes)}
    options, start = options_of(loss), min(order[n] for n in (loss, *norms))
    stack = [n for n in (options["target"], options["weight"]) if n is not None]
    found: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in found and order[node] > start:
            found.add(node)
            stack += node.all_input_nodes
    return sorted(found, key=order.__getitem__)


def _over_columns(reader: Node, ndim: int) -> bool:
    names = dict(zip(("input", "dim", "keepdim"), reader.args, strict=False)) | reader.kwargs
    dim: Any = names.get("dim")
    last = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    return last in (-1, ndim - 1) and not names.get("keepdim", False)


def _made(graph: Graph, chain: list[Node], readers: list[Node]) -> list[Node] | str:
    """The nodes from the linear to the only one that the graph returns, or none."""
    output = graph.output_node()
    returned: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    paths = []
    for i, node in enumerate(chain):
        paths += [chain[: i + 1]] * returned.count(node)
        for reader in node.users.keys() - {*chain, *readers, output}:
            side = _side(reader, output)
            if isinstance(side, str):
                return side
            paths += [chain[: i + 1] + side] * returned.count(side[-1])
    if len(paths) > 1 or any(step_of(node) == "rows" for path in paths for node in path[1:]):
        return "the logits are returned more than once, or as a view"
    return paths[0] if paths else []


def _side(node: Node, output: Node) -> list[Node] | str:
    """Casts and scales from a reader of the logits to the output, which alone reads the last."""
    side: list[Node] = []
    while node is not output:
        side.append(node)
        if step_of(node) in (None, "rows") or len(node.users) != 1:
            return f"{node.name} reads the logits too"
        (node,) = node.users
    return side


def step_of(node: Node) -> Any:
    """A number to scale by, 0.0 for tanh, "rows", "upcast", or None for anything else."""
    if node.target in SCALES and len(node.args) == 2 and not node.kwargs:
        number = node.args[0] if node.args[1] is _read_by(node) else node.args[1]
        return SCALES[node.target](number) if isinstance(number, int | float) and number else None
    if node.target in (torch.tanh, "tanh"):
        return 0.0
    given = (*node.args, *node.kwargs.values())
    if node.target == "float" or (node.target == "to" and torch.float32 in given):
        same = value_of(node).device == value_of(node.args[0]).device
        return "upcast" if same else None
    if node.op == "call_method" and node.target in ROWS:
        same = value_of(node).shape[-1] == value_of(node.args[0]).shape[-1]
        return "rows" if same else None
    if node.target is operator.getitem and _keeps_columns(node):
        return "rows"
    return None


def _read_by(node: Node) -> Any:
    """The operand that a step reads: the second one in `2 * z`."""
    if node.target in PRODUCTS and len(node.args) == 2 and isinstance(node.args[0], int | float):
        return node.args[1]
    return node.args[0] if node.args else None


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
