"""Builders of graphs, joint ones and any others, and what the tests do with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from passes.base import aten, call


def joint_graph(
    fn: Callable[..., Tensor],
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    dynamic: bool = False,
) -> GraphModule:
    """The joint graph of y = fn(*weights, *inputs): outputs (y, d weights..., d inputs...).

    Arguments are weights, inputs and dy, annotated as `passes.base` wants them.
    """
    count = len(weights) + len(inputs)

    def joint(*args: Tensor) -> tuple[Tensor | None, ...]:
        *values, dy = args
        primals = [a.detach().requires_grad_(a.is_floating_point()) for a in values]
        y = fn(*primals)
        wanted = [p for p in primals if p.requires_grad]
        grads = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True))
        return y, *(next(grads) if p.requires_grad else None for p in primals)

    dy = torch.ones_like(fn(*weights, *inputs))
    fake_mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    fakes = [fake_mode.from_tensor(w.detach(), static_shapes=True) for w in weights]
    fakes += [fake_mode.from_tensor(t.detach(), static_shapes=not dynamic) for t in (*inputs, dy)]
    with fake_mode:
        gm = make_fx(joint, tracing_mode="real")(*fakes)
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        node.meta["argument"] = position if position < count else None
        node.meta["tangent"] = position == count
    gm.graph.output_node().meta["gradient_of"] = [None, *range(count)]
    detaches = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default)
    for node in reversed(detaches):
        node.replace_all_uses_with(node.args[0])  # autograd's bookkeeping, no computation
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def add_vector(gm: GraphModule, v: Tensor, position: int) -> None:
    """One more argument behind all others: the v of a weight."""
    last = gm.graph.find_nodes(op="placeholder")[-1]
    fake_mode = last.meta["val"].fake_mode
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(f"v_{position}")
    node.meta.update(val=fake_mode.from_tensor(v, static_shapes=True), argument=position)
    gm.recompile()


def execute(gm: GraphModule, *args: Any) -> tuple[Any, ...]:
    """Run a joint graph on real tensors, IR ops included."""
    with torch.no_grad():
        return tuple(Interpreter(gm).run(*args))


def show(gm: GraphModule) -> str:
    """One line a node: name, shape, operation and operands."""
    lines = []
    for node in gm.graph.nodes:
        named = [f"{key}={value}" for key, value in node.kwargs.items() if value is not None]
        operands = ", ".join([*map(str, node.args), *named])
        if node.op == "output":
            lines.append(f"return {operands}")
        elif node.op != "placeholder":
            shape = list(node.meta["val"].shape) if isinstance(node.meta["val"], Tensor) else ""
            target = str(node.target).removeprefix("aten.")
            lines.append(f"{node.name}: {shape} = {target}({operands})")
    return "\n".join(lines)


class Builder:
    """A graph under construction, with values."""

    def __init__(self) -> None:
        self.graph, self.mode, self.count = Graph(), FakeTensorMode(), 0

    def place(self, name: str, *shape: int) -> Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = self.mode.from_tensor(torch.empty(*shape))
        node.meta["argument"] = self.count
        self.count += 1
        return node

    def op(self, target: Any, *args: Any) -> Node:
        return call(next(a for a in args if isinstance(a, Node)), target, *args)

    def returns(self, *nodes: Node) -> Graph:
        self.graph.output(tuple(nodes))
        self.graph.lint()
        return self.graph


def forward() -> tuple[Graph, dict[str, Node]]:
    """One linear over tanh, and what it hands over: outputs (y, h, a view of h, W^T, x, y)."""
    b = Builder()
    w, x = b.place("w", 6, 8), b.place("x", 5, 8)
    h = b.op(aten.tanh.default, x)
    wt = b.op(aten.t.default, w)
    y = b.op(aten.mm.default, h, wt)
    view = b.op(aten.view.default, h, [40])
    graph = b.returns(y, h, view, wt, x, y)
    return graph, {"w": w, "x": x, "h": h, "wt": wt, "y": y, "view": view}
