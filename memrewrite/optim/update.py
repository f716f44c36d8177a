"""One parameter's Adam update: captured from torch's own, rewritten, compiled once per kind.

The graph is traced through `torch.optim.adam.adam(..., fused=True)` on fake full-size
tensors, so its semantics are torch's and no full-size state exists. Every parameter of
one shape, dtype and flag set shares one compiled update: compile time does not grow with
depth. Learning rate, betas, eps, decay and step are tensors: no scheduler recompiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.optim.adam import adam

from memrewrite.compiler import pipeline
from memrewrite.compiler.backend import Engine, compile_update
from memrewrite.compiler.pipeline import Step
from memrewrite.record.listing import listing
from passes.base import Pass
from passes.lower import lower_ir_ops
from passes.update.accumulate import accumulate_in_place
from passes.update.adam import HYPERPARAMETERS, hyperparameters_as_inputs, lower_fused_adam
from passes.update.galore import Projection, project_updates
from passes.update.pieces import Pieces, cut

W = 0  # the argument that is the weight; see `capture` for the others


@dataclass(frozen=True)
class Kind:
    """All that distinguishes one compiled update from another."""

    shape: tuple[int, ...]  # of W
    dtype: torch.dtype
    device: torch.device
    rank: int
    left: bool
    scale: float
    amsgrad: bool
    maximize: bool
    decays: bool  # weight decay other than zero
    decoupled: bool
    given: bool = False  # the gradient comes as R

    @property
    def side(self) -> int:
        """Rows of P: the length of the projected side."""
        rows = self.shape[0]
        return rows if self.left else _columns(self.shape)

    @property
    def state_shape(self) -> tuple[int, int]:
        """Of m and v."""
        rows, columns = self.shape[0], _columns(self.shape)
        return (self.rank, columns) if self.left else (rows, self.rank)


def _columns(shape: Sequence[int]) -> int:
    return torch.Size(shape[1:]).numel()


class AdamKind(Protocol):
    """What any kind of update says of torch's own."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def amsgrad(self) -> bool: ...
    @property
    def maximize(self) -> bool: ...
    @property
    def decays(self) -> bool: ...
    @property
    def decoupled(self) -> bool: ...


@dataclass(frozen=True)
class Update:
    """A compiled update and the graphs it came from.

    numbers(step, hyperparameters) counts the step and returns the scalars of the update;
    apply(tensors, numbers) writes W, m and v, given W (O, D, ...), its gradient, m, v,
    (the maximum,) and P. Hyperparameters are those of `passes.update.adam`, 0-d float64 each.
    """

    kind: AdamKind
    traced: list[tuple[str, str]]  # (stage, listing), from torch's update to the last pass
    steps: list[Step]  # what each pass did
    pieces: Pieces
    body: Callable[..., Any]  # pieces.body, compiled

    def stages(self) -> list[tuple[str, str]]:
        """(stage, listing) of every graph on the way."""
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
    """Capture, rewrite, lower and compile the update of one kind of parameter."""
    gm = capture(kind)
    projection = Projection(_add_projector(gm, kind), kind.left, kind.scale, kind.given)
    traced = [("captured", listing(gm.graph))]

    def after(one: Pass, graph: Graph) -> None:
        traced.append((one.name, listing(graph)))

    todo = [hyperparameters_as_inputs(), project_updates({W: projection}), *LOWERING]
    steps = pipeline.run(gm, todo, after)
    dtype = torch.float64 if kind.dtype == torch.float64 else torch.float32
    pieces = cut(gm, dtype)
    body = compile_update(pieces.body, engine)
    return Update(kind, traced, steps, pieces, body)


LOWERING: list[Pass] = [lower_fused_adam(), lower_ir_ops(), accumulate_in_place()]


def capture(kind: AdamKind, dynamic: bool = False) -> GraphModule:
    """torch's fused update of one parameter, (W, G, m, v[, maximum], step), on fake tensors.

    dynamic: the number of rows is a symbol.
    """
    count = 5 if kind.amsgrad else 4
    example = [torch.empty(kind.shape, dtype=kind.dtype, device="meta") for _ in range(count)]
    step = torch.empty((), device="meta")
    return trace(adam_update(kind), [*example, step], dynamic)


def adam_update(kind: AdamKind) -> Callable[..., Any]:
    """torch's own update of one parameter as a function of tensors alone."""

    def write(largest: list[Tensor], *tensors: Tensor) -> tuple[()]:
        param, grad, exp_avg, exp_avg_sq, step = tensors
        adam(
            [param],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            largest,
            [step],
            fused=True,
            amsgrad=kind.amsgrad,
            maximize=kind.maximize,
            weight_decay=0.01 if kind.decays else 0.0,
            decoupled_weight_decay=kind.decoupled,
            lr=1e-3,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
        )
        return ()

    # Their names become those of the graph's inputs.
    def plain(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Tensor) -> Any:
        return write([], weight, grad, m, v, step)

    def amsgrad(
        weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, largest: Tensor, step: Tensor
    ) -> Any:
        return write([largest], weight, grad, m, v, step)

    return amsgrad if kind.amsgrad else plain


def trace(
    update: Callable[..., Any], examples: Sequence[Tensor], dynamic: bool = False
) -> GraphModule:
    """The aten graph of a function of tensors, on fake ones: nothing is allocated."""
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


def _add_projector(gm: GraphModule, kind: Kind) -> int:
    """P (side, r) as one more argument, behind step."""
    return add_input(gm, "projector", (kind.side, kind.rank), None)


def add_input(gm: GraphModule, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> int:
    """One more argument behind step, of the weight's dtype where none is given; its position."""
    places = gm.graph.find_nodes(op="placeholder")
    example: Any = places[W].meta["val"]
    with gm.graph.inserting_after(places[-1]):
        node = gm.graph.placeholder(name)
    with example.fake_mode:
        node.meta["val"] = example.new_empty(shape, dtype=dtype or example.dtype)
    node.meta["argument"] = len(places)
    return len(places)


def hyperparameters(group: dict[str, Any], decays: bool) -> list[Tensor]:
    """A parameter group's numbers in the order that `Update` takes them."""
    beta1, beta2 = group["betas"]
    values = {**group, "beta1": beta1, "beta2": beta2}
    names = [n for n in HYPERPARAMETERS if decays or n != "weight_decay"]
    return [_scalar(values[name]) for name in names]


def _scalar(value: float | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64).reshape(())
    return torch.tensor(value, dtype=torch.float64)
