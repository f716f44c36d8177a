"""Replay, without gradients, only the part of a captured graph that some of its values need.

Excluded is what must not run twice (hooks, custom operations that log or count) and layers
after the last needed value. Included are the ancestors of those values, the nodes that write to
an ancestor's storage before it is read, and the nodes that set a state (autocast, a functorch
level), which is restored if the replay fails. What an included node writes to is cloned.

Storages are identified by the fake tensors that Dynamo left at the nodes; a node without one
may share its storage with any other.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from passes.base import copy_graph

BODIES = {  # operations that run one subgraph -> the positions of it and of its arguments
    "tag_activation_checkpoint": (0, 1),
    "wrap_activation_checkpoint": (0, 1),
    "wrap": (0, 1),
    "autograd_function_apply": (0, 2),
    "invoke_subgraph": (0, 2),
}
IN_PLACE = {
    operator.setitem,
    operator.delitem,
    *(getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv")),
    *(getattr(operator, f"i{name}") for name in ("mod", "pow", "matmul", "and", "or", "xor")),
}
STATISTICS = ("batch_norm", "instance_norm")  # write running means, arguments 1 and 2
OURS = ("torch", "_operator", "operator", "builtins", "math")


@dataclass
class Read:
    """What to read at a node: the values of its inputs, or the node run by a watcher."""

    inputs: tuple[Node, ...] = ()  # read when the node would run
    show: Callable[..., None] | None = None  # called with these
    watch: Callable[[Any], Any] | None = None  # called with a function that runs the node


@dataclass
class Part:
    """The nodes of one graph that a replay runs."""

    reads: Mapping[Node, Read]
    values: set[Node] = field(default_factory=set)  # nodes whose results are read
    kept: set[Node] = field(default_factory=set)
    written: list[int] = field(default_factory=list)  # placeholders that it writes to


def copy_module(gm: GraphModule) -> GraphModule:
    """A copy of a Dynamo graph, with the attributes that AOTAutograd expects."""
    copied = GraphModule(gm, copy_graph(gm.graph))
    copied.meta.update(gm.meta)
    places = (g.graph.find_nodes(op="placeholder") for g in (gm, copied))
    for old, new in zip(*places, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return copied


def name_of(node: Node) -> str:
    """The name of a node's operation."""
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def body_of(node: Node) -> tuple[GraphModule, tuple[Any, ...]] | None:
    """The subgraph of a higher-order operation, and the arguments of the subgraph."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    places = BODIES.get(name_of(node))
    if places is None or len(node.args) <= places[0]:
        return None
    found = _module(node.args[places[0]])
    return None if found is None else (found, tuple(node.args[places[1] :]))


def needed(graph: Graph, reads: Mapping[Node, Read], outputs: bool) -> Part:
    """The nodes that must run for `reads`, and for the graph's outputs if `outputs`."""
    part = Part(reads)
    values = part.values
    for node in reversed(graph.nodes):
        read = reads.get(node)
        wanted = node in values or (node.op == "output" and outputs) or _sets_state(node)
        if wanted or (read and read.watch) or _shared(writes(node), values):
            part.kept.add(node)
            values.update(node.all_input_nodes)
        if read is not None:
            values.update(read.inputs)
    touched = [w for node in part.kept for w in (*writes(node), *_unknown_writes(node))]
    places = graph.find_nodes(op="placeholder")
    part.written = [i for i, p in enumerate(places) if _shared(touched, {p})]
    return part


class ReplayError(RuntimeError):
    """A node that cannot be run a second time; the cause is the error that it raised."""

    def __init__(self, node: Node | None) -> None:
        super().__init__(str(node))
        self.node = node

    def __str__(self) -> str:
        where = "" if self.node is None else f"{self.node.name}, a {name_of(self.node)}"
        stack = {} if self.node is None else self.node.meta.get("nn_module_stack") or {}
        inside = next((str(path) for path, _ in reversed([*stack.values()])), "")
        cause = (str(self.__cause__).strip().splitlines() or [""])[0]
        place = f" in {inside}" if inside else ""
        return f"{where}{place}, raised {type(self.__cause__).__name__}: {cause}"


def differentiates(gm: GraphModule) -> bool:
    """Whether a forward computes gradients itself, so that it cannot run without them."""
    names = ("_autograd_grad", "_grad_increment_nesting", "_jvp_increment_nesting")
    return any(
        name_of(n) in names or n.target is torch.autograd.grad
        for module in gm.modules()
        if isinstance(module, GraphModule)
        for n in module.graph.nodes
        if n.op == "call_function"
    )


class Replay(Interpreter):
    """Runs a part of a Dynamo graph; enables gradients only if asked to."""

    def __init__(
        self, gm: GraphModule, part: Part, inner: Callable[[Node], Any], gradients: bool = False
    ) -> None:
        super().__init__(gm)
        self.part, self.inner, self.gradients = part, inner, gradients
        self.entered: list[Any] = []  # autocast regions
        self.at: Node | None = None

    def replay(self, *args: Any) -> Any:
        """The outputs, or None if they are not needed. Raises ReplayError."""
        own = [_copy(a) if i in self.part.written else a for i, a in enumerate(args)]
        try:
            return self.run(*own, enable_io_processing=False)
        except ReplayError:
            raise  # from a subgraph
        except Exception as error:
            raise ReplayError(self.at) from error
        finally:
            while self.entered:
                self.entered.pop().__exit__(None, None, None)

    def run_node(self, n: Node) -> Any:
        self.at = n
        read = self.part.reads.get(n)
        if read is not None and read.show is not None:
            read.show(*(self.env[node] for node in read.inputs))
        if n.op != "placeholder" and n not in self.part.kept:
            return None
        if read is not None and read.watch is not None:
            return read.watch(lambda: super(Replay, self).run_node(n))
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(target, "__name__", "")
        if target is torch._C._set_grad_enabled and not self.gradients:
            return None
        if isinstance(target, torch._ops.HigherOrderOperator) and name == "register_hook":
            return args[0]
        if self.at is not None and body_of(self.at) is not None:
            run, places = self.inner(self.at), BODIES[name]
            result = run(*args[places[1] :])
            function = name == "autograd_function_apply"  # (outputs, saved for backward)
            return result[0] if function and result is not None else result
        result = super().call_function(target, args, kwargs)
        if name == "_enter_autocast":
            self.entered.append(result)
        elif name == "_exit_autocast":
            self.entered.remove(args[0])
        return result


def grad_modes(graph: Graph) -> Iterator[tuple[Node, bool]]:
    """Each node, and whether gradients are enabled at it, as they are at the first."""
    enabled = True
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        yield node, enabled


# --- side effects of a node -------------------------------------------------------------------


def writes(node: Node) -> list[Node]:
    """The inputs that a node writes to, as far as its operation is known."""
    if node.op == "call_method":
        name = str(node.target)
        in_place = name.endswith("_") and not name.endswith("__")
        return _nodes(node.args[:1]) if in_place else []
    if node.op != "call_function":
        return []
    found = _nodes([node.kwargs.get("out")])
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return found + (node.all_input_nodes if _body_writes(node) else [])
    name = name_of(node)
    if node.target in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        found += _nodes(node.args[:1])
    if name == "_set_tensor_requires_grad" or _is_in_place(node):
        found += _nodes(node.args[:1])
    if name in STATISTICS:
        found += _nodes([*node.args[1:3], *map(node.kwargs.get, ("running_mean", "running_var"))])
    return found + _written_by_schema(node)


def _sets_state(node: Node) -> bool:
    """Whether a node sets a state for later ones, even if nothing reads it."""
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is torch._C._set_grad_enabled:
        return True
    name, module = name_of(node), str(getattr(node.target, "__module__", ""))
    if "functorch" in module and not any(isinstance(_fake(n), Tensor) for n in _all(node)):
        return True
    return name.startswith(("_enter_", "_exit_", "_saved_tensors_hooks_", "_grad_", "_vmap_"))


def _all(node: Node) -> list[Node]:
    return [node, *node.all_input_nodes]


def _is_in_place(node: Node) -> bool:
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    target: Any = node.target
    if not inspect.isfunction(target):
        return False
    bound = inspect.signature(inspect.unwrap(target)).parameters
    if "inplace" not in bound:
        return False
    at = list(bound).index("inplace")
    return len(node.args) > at and bool(node.args[at])


def _written_by_schema(node: Node) -> list[Node]:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        names: list[str] = target.overloads()  # type: ignore[no-untyped-call]
        overloads = [getattr(target, name) for name in names]
    else:
        overloads = [target] if isinstance(target, torch._ops.OpOverload) else []
    found: list[Node] = []
    for overload in overloads:
        for i, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found += _nodes([*node.args[i : i + 1], node.kwargs.get(argument.name)])
    return found


def _body_writes(node: Node) -> bool:
    if "mutation" in name_of(node):
        return True
    bodies = [body for arg in node.args if (body := _module(arg)) is not None]
    return any(writes(inner) for body in bodies for inner in body.graph.nodes)


def _unknown_writes(node: Node) -> list[Node]:
    """All inputs of a function that is not torch's, which may write to any."""
    if node.op != "call_function" or hasattr(node.target, "_schema"):
        return []
    if isinstance(node.target, torch._ops.OpOverloadPacket | torch._ops.HigherOrderOperator):
        return []
    module = str(getattr(node.target, "__module__", None) or "builtins")
    return [] if module.split(".")[0] in OURS else node.all_input_nodes


# --- storages -----------------------------------------------------------------------------------


def _shared(written: Sequence[Node], values: set[Node]) -> bool:
    if not written or not values:
        return False
    if not values.isdisjoint(written):
        return True
    mine, theirs = _storages(written), _storages(values)
    return mine is None or theirs is None or not mine.isdisjoint(theirs)


def _storages(nodes: Iterable[Node]) -> set[int] | None:
    """The storages of all nodes; None if one is not known."""
    found: set[int] = set()
    for node in nodes:
        value = _fake(node)
        if value is None and node.op != "get_attr" and not _sets_state(node):
            return None
        for one in value if isinstance(value, tuple | list) else [value]:
            if isinstance(one, Tensor):
                try:
                    found.add(one.untyped_storage()._cdata)
                except (RuntimeError, NotImplementedError):  # a functorch wrapper has none
                    return None
    return found


def _fake(node: Node) -> Any:
    return node.meta.get("example_value")


def _nodes(values: Iterable[Any]) -> list[Node]:
    flat = [v for value in values for v in (value if isinstance(value, tuple | list) else [value])]
    return [value for value in flat if isinstance(value, Node)]


def _module(value: Any) -> GraphModule | None:
    if not isinstance(value, Node) or value.op != "get_attr":
        return None
    found: Any = value.graph.owning_module
    for name in str(value.target).split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, GraphModule) else None


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
