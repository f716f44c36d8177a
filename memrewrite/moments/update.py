"""One weight's optimizer update: captured from torch, rewritten, compiled once per kind.

The graph is traced through the functional form of a row (`moments.optimizers`) on fake full-size
tensors, so that its semantics are torch's and no full-size state is allocated. All weights of
one shape, dtype and set of flags share one compiled update: compile time does not grow with
depth. Learning rate, betas, eps, decay and step are tensors, so that no scheduler recompiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from memrewrite.compiler import pipeline
from memrewrite.compiler.backend import Engine, compile_update
from memrewrite.compiler.pipeline import Step
from memrewrite.moments.optimizers import Flags, Row
from memrewrite.record.listing import listing
from passes.base import Pass
from passes.update.pieces import Pieces, cut

W = 0  # argument position of the weight; see `capture` for the others
EXAMPLE = 7  # rows of the example that a dynamic update is captured on


class Captured(Protocol):
    """What an update is captured from: the weight, the flags of its group, the row."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def flags(self) -> Flags: ...
    @property
    def row(self) -> Row: ...


class Kind(Captured, Protocol):
    """Everything that identifies a compiled update, and how the state of its weights is kept.

    Hashable. `zeros` is a weight's state before its first step, excluding `step`. `rewrite` adds
    inputs to the captured update, and returns the passes that make it read and write that state.
    """

    @property
    def dynamic(self) -> bool:
        """Whether the weight's number of rows is symbolic."""
        ...

    def zeros(self, weight: Tensor) -> dict[str, Tensor]: ...
    def rewrite(self, gm: GraphModule) -> list[Pass]: ...


@dataclass(frozen=True)
class Update:
    """A compiled update and the graphs that it was made from.

    numbers(step, hyperparameters) increments the step and returns the scalars of the update;
    hyperparameters are those of the row, 0-d float64. apply(tensors, numbers) writes the weight
    and its moments, given the weight (O, D, ...), its gradient, the moments, and the kind's inputs.
    """

    kind: Kind
    traced: list[tuple[str, str]]  # (stage, listing), from torch's update to the last pass
    steps: list[Step]  # what each pass did
    pieces: Pieces
    body: Callable[..., Any]  # pieces.body, compiled

    def stages(self) -> list[tuple[str, str]]:
        """(stage, listing) of every graph, in order."""
        pieces = ("scalars", "body", "writes")
        return self.traced + [(name, listing(getattr(self.pieces, name).graph)) for name in pieces]

    def numbers(self, step: Tensor, hyper: Sequence[Tensor]) -> tuple[Any, ...]:
        found: tuple[Any, ...] = self.pieces.scalars(step, *hyper)
        return found

    def apply(self, tensors: Sequence[Tensor], numbers: Sequence[Any]) -> None:
        pieces = self.pieces
        produced = self.body(*tensors, *(numbers[i] for i in pieces.body_reads))
        pieces.writes(
            *(tensors[i] for i in pieces.write_inputs),
            *produced,
            *(numbers[i] for i in pieces.write_reads),
        )


def build(kind: Kind, engine: Engine) -> Update:
    """Capture, rewrite, lower and compile the update of one kind of weight."""
    gm = capture(kind, kind.dynamic)
    todo = kind.rewrite(gm)
    traced = [("captured", listing(gm.graph))]

    def after(one: Pass, graph: Graph) -> None:
        traced.append((one.name, listing(graph)))

    steps = pipeline.run(gm, todo, after)
    pieces = cut(gm, wide(kind.dtype))
    body = compile_update(pieces.body, engine, kind.dynamic)
    return Update(kind, traced, steps, pieces, body)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an update computes in: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def capture(kind: Captured, dynamic: bool = False) -> GraphModule:
    """The graph of torch's update of one weight, of (W, G, moments..., step).

    Hyperparameters follow, unless passes of the row (`Row.inputs`) make inputs of them.
    dynamic: the number of rows is symbolic.
    """
    row, count = kind.row, 2 + len(kind.row.moments_of(kind.flags))
    example = [torch.empty(kind.shape, dtype=kind.dtype, device="meta") for _ in range(count)]
    example.append(torch.empty((), device="meta"))
    if not row.inputs:
        numbers = row.names(kind.flags)
        example += [torch.empty((), dtype=torch.float64, device="meta") for _ in numbers]
    return trace(row.functional(kind.flags), example, dynamic)


def trace(
    update: Callable[..., Any], examples: Sequence[Tensor], dynamic: bool = False
) -> GraphModule:
    """The aten graph of a function, traced on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    if dynamic:
        fakes = [_with_dynamic_rows(mode, e) for e in examples]
    else:
        with mode:
            fakes = [torch.empty(e.shape, dtype=e.dtype) for e in examples]
    with mode:
        gm: GraphModule = make_fx(update)(*fakes)
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        node.meta["argument"] = position
    for node in gm.graph.nodes:
        node.meta.setdefault("val", None)  # of ops that only write
    return gm


def _with_dynamic_rows(mode: Any, example: Tensor) -> Any:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    dims = [DimDynamic.DYNAMIC, DimDynamic.STATIC] if example.ndim else []
    real = torch.empty(example.shape, dtype=example.dtype)
    return mode.from_tensor(real, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims))


def add_input(
    gm: GraphModule, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> int:
    """Append an input, of the weight's dtype unless given; returns its argument position."""
    places = gm.graph.find_nodes(op="placeholder")
    example: Any = places[W].meta["val"]
    with gm.graph.inserting_after(places[-1]):
        node = gm.graph.placeholder(name)
    with example.fake_mode:
        node.meta["val"] = example.new_empty(shape, dtype=dtype or example.dtype)
    node.meta["argument"] = len(places)
    return len(places)


def rows_of(tensor: Tensor, columns: int) -> Tensor:
    """A contiguous tensor as (rows, columns); see `same_storage`."""
    return same_storage(tensor, (tensor.numel() // columns, columns), tensor.dtype)


def same_storage(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The bytes of a contiguous tensor, not as a view: a compiler guards a view's base."""
    start = tensor.storage_offset() * tensor.itemsize // dtype.itemsize
    found = torch.empty(0, dtype=dtype, device=tensor.device)
    strides = torch.empty(shape, device="meta").stride()
    return found.set_(tensor.untyped_storage(), start, shape, strides)
