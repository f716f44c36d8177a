"""Compile through torch: with `session.skipping`, the only file that uses private torch APIs.

`capture` is called once per captured graph. It never edits Dynamo's graph (Dynamo reads
it again): it copies it, appends a placeholder per extra input of the methods, and compiles
the copy by Inductor with two hooks that are set for this compile only:

    joint_custom_pre_pass   the passes, on the joint graph that AOTAutograd traced
    custom_partitioner_fn   the partition into forward and backward

On a hit in AOTAutograd's cache neither hook runs. The record of their decisions is therefore
stored next to torch's cache, under a key of everything that decides it; where it is missing,
the graph is compiled again without the cache.

The private torch APIs here were run on torch 2.11, 2.12 and 2.13.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.source import ConstantSource
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.fx import Graph, GraphModule, Node

from memrewrite.calibration.replay import copy_module
from memrewrite.compiler.annotate import annotate
from memrewrite.compiler.order import passes_for
from memrewrite.compiler.partition import Compile, Split, divide, places_of, rewrite
from memrewrite.errors import MemrewriteWarning
from memrewrite.gradients.port import attach_ports
from memrewrite.methods.request import Request, extra_inputs, source_hash
from memrewrite.record.decision import GraphRecord
from passes.joint.absent import write_in_place
from passes.split.late import is_random

EYES = {torch.ops.aten.eye.default, torch.ops.aten.eye.m}
# Whether Dynamo recompiles when a parameter's requires_grad changes: torch 2.11 skips the guard
# on it as long as its module's dictionary is the same.
GUARDS_TRAINED = torch.__version__ >= "2.12"  # compares as versions do
# Next to none: under 0 itself torch saves no result, so that backward draws another dropout mask.
LEAST_BUDGET = 1e-9
FP8_PASS = "activation_quantization_aten_pass"  # in `post_grad_fusion_options`

Extra = Sequence[tuple[str, Tensor]]
_current: ContextVar[Compile | None] = ContextVar("memrewrite_compile", default=None)


@contextlib.contextmanager
def _compiling() -> Iterator[Compile]:
    """Hold the results of this compile's hooks, which must be stateless."""
    state = Compile()
    token = _current.set(state)
    try:
        yield state
    finally:
        _current.reset(token)


# --- the two hooks -------------------------------------------------------------------


@dataclass(frozen=True)
class JointPasses(CustomGraphPass):
    """Inductor's joint_custom_pre_pass: ours, then the user's (a list, from torch 2.13 on)."""

    request: Request
    theirs: tuple[Any, ...] = ()

    def uuid(self) -> Any:
        """The cache key; None, so no cache, where a pass of the user has no uuid."""
        theirs = [isinstance(one, CustomGraphPass) and one.uuid() for one in self.theirs]
        return ("memrewrite", source_hash(), self.request, *theirs) if all(theirs) else None

    def __call__(self, graph: Graph) -> None:
        assert graph.owning_module is not None
        _rewrite_joint(graph.owning_module, self.request)
        for one in self.theirs:
            one(graph)


@dataclass(frozen=True)
class ExactFirst(CustomPartitionerFn):
    """Inductor's custom_partitioner_fn; `inner` is the user's, or None."""

    request: Request
    inner: CustomPartitionerFn | None = None

    def uuid(self) -> Any:
        return ("memrewrite", source_hash(), self.request, self.inner and self.inner.uuid())

    def __call__(self, gm: GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Split:
        return _split_joint(gm, joint_inputs, self.request, self.inner, **kwargs)


def _rewrite_joint(gm: GraphModule, request: Request) -> None:
    state = _current.get() or Compile()
    if annotate(gm.graph):
        rewrite(gm, request, passes_for(request, _decompositions()), state)
    elif state.record is None:
        state.record = GraphRecord(inference=True)


def _split_joint(
    gm: GraphModule,
    joint_inputs: Sequence[object],
    request: Request,
    inner: Callable[..., Any] | None,
    *,
    num_fwd_outputs: int,
    **kwargs: Any,
) -> Split:
    def default(joint: GraphModule, outputs: int) -> Split:
        cut: Callable[..., Split] = inner or min_cut_rematerialization_partition
        return cut(joint, joint_inputs, num_fwd_outputs=outputs, **kwargs)

    def ours(joint: GraphModule, outputs: int) -> Split:
        with functorch_config.patch(patches):  # for one partition, never globally
            return default(joint, outputs)

    if FP8_PASS in inductor_config.post_grad_fusion_options:  # weights are not to be rounded
        kwargs["static_lifetime_input_indices"] = places_of(gm.graph, request.free)
    patches: dict[str, bool | float]
    state, patches = _current.get() or Compile(), {"aggressive_recomputation": True}
    state.table = _decompositions()
    if (budget := functorch_config.activation_memory_budget) != 1.0:
        state.freed, state.spare = 0.0, 0.0  # the user's budget decides what is recomputed
        none = budget == 0 and any(map(is_random, gm.graph.nodes))
        patches = {"activation_memory_budget": LEAST_BUDGET if none else budget}
    return divide(gm, request, num_fwd_outputs, state, default, ours)


# --- the two engines -------------------------------------------------------------------


class Engine:
    """The code generator: Inductor, or none.

    "aot_eager" runs the rewritten graphs op by op; so does "trace", for estimates, after
    Inductor's simplifications.
    """

    def __init__(self, backend: str, mode: str | None, options: Any, dynamic: bool | None) -> None:
        self.backend = backend
        wrapper: Any = torch._TorchCompileInductorWrapper
        config = dict(wrapper(mode, options, dynamic).config)  # torch.compile's checks
        self.config: dict[str, Any] = config if backend == "inductor" else {}

    @property
    def branches(self) -> bool:
        """Whether compiled code may branch when it runs; a CUDA graph cannot."""
        return not self.config.get("triton.cudagraphs", inductor_config.triton.cudagraphs)

    def option(self, name: str) -> Any:
        """One of Inductor's: as given to `compile`, else as torch has it."""
        return self.config.get(name, getattr(inductor_config, name))

    def compile(
        self, gm: GraphModule, inputs: Sequence[Any], request: Request
    ) -> Callable[..., Any]:
        if self.backend != "inductor":
            return _compile_eager(gm, inputs, request, self.backend == "trace")
        # imported late: it loads the code generators
        from torch._inductor.compile_fx import compile_fx

        theirs = _listed(self.option("joint_custom_pre_pass"))
        patches = {
            # A freed buffer that waits for another use is memory that is taken.
            **{"allow_buffer_reuse": False, **self.config},
            "joint_custom_pre_pass": JointPasses(request, theirs),
            "custom_partitioner_fn": ExactFirst(request, self.option("custom_partitioner_fn")),
        }
        return compile_fx(gm, inputs, config_patches=patches)  # type: ignore[return-value]


def _listed(passes: Any) -> tuple[Any, ...]:
    return tuple(passes) if isinstance(passes, list | tuple) else (passes,) if passes else ()


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions, which all engines trace with."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def _compile_eager(
    gm: GraphModule, inputs: Sequence[Any], request: Request, simplify: bool
) -> Callable[..., Any]:
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V

    left = () if simplify else EYES  # Inductor's counts in uint16, which few operations take
    table = {op: f for op, f in _decompositions().items() if op not in left}

    def split(joint: GraphModule, joint_inputs: Any, **kwargs: Any) -> Split:
        _rewrite_joint(joint, request)
        if simplify:
            with V.set_fake_mode(torch._guards.detect_fake_mode(joint_inputs)):
                joint_graph_passes(joint)
        return _split_joint(joint, joint_inputs, request, None, **kwargs)

    backend: Any = aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=_op_by_op,
        partition_fn=split,
        decompositions=table,
        keep_inference_input_mutations=True,
    )
    return backend(gm, inputs)  # type: ignore[no-any-return]


def _op_by_op(gm: GraphModule, inputs: Sequence[Any]) -> Any:
    write_in_place(gm.graph)
    gm.recompile()
    return boxed_nop(gm, [*inputs])


def capture(
    gm: GraphModule, inputs: Sequence[Any], request: Request, engine: Engine
) -> tuple[Callable[..., Any], GraphRecord]:
    """Compile a copy of Dynamo's graph that takes the request's extra inputs after its own."""
    extra = extra_inputs(request)

    def compile_copy() -> tuple[Callable[..., Any], GraphRecord | None]:
        copied = copy_module(gm)
        examples = [_append(copied, name, value) for name, value in extra]
        added = zip(_places(copied)[len(inputs) :], examples, strict=True)
        ports = [node for node, example in added if example.requires_grad]
        if ports:
            attach_ports(copied, ports)
        copied.recompile()
        with _compiling() as state:
            return engine.compile(copied, [*inputs, *examples], request), state.record

    path = Path(cache_dir()) / "memrewrite" / f"{_key(gm, inputs, request, extra, engine)}.json"
    compiled, record = compile_copy()
    record = record or GraphRecord.load(path)
    if record is None:
        with inductor_config.patch(force_disable_caches=True):
            compiled, record = compile_copy()
        record = record or GraphRecord(inference=True)
    record.store(path)
    return compiled, record


def _places(gm: GraphModule) -> list[Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def _append(gm: GraphModule, name: str, value: Tensor) -> Tensor:
    """Append an input after the others; returns its example."""
    places = _places(gm)
    if torch._guards.TracingContext.try_get() is not None:  # called by Dynamo
        examples: Any = (node.meta.get("example_value") for node in places)
        fake_mode = next(e.fake_mode for e in examples if hasattr(e, "fake_mode"))
        value = fake_mode.from_tensor(value, static_shapes=True)
    with gm.graph.inserting_after(places[-1]):
        node = gm.graph.placeholder(name)
    node.meta["example_value"] = value
    node._dynamo_source = ConstantSource(node.name)
    return value


def _key(
    gm: GraphModule, inputs: Sequence[Any], request: Request, extra: Extra, engine: Engine
) -> str:
    """A digest of everything that decides a record, to find it again on a cache hit."""
    described = [
        (str(i.shape), str(i.dtype), str(i.stride()), i.device.type, i.requires_grad)
        if isinstance(i, Tensor)
        else str(i)
        for i in inputs
    ]
    facts = (
        gm.code,
        described,
        request,
        [(name, str(value.shape), str(value.dtype)) for name, value in extra],
        source_hash(),
        engine.backend,
        sorted((k, str(v)) for k, v in engine.config.items()),
        functorch_config.get_hash(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def compile_update(gm: GraphModule, engine: Engine, dynamic: bool = False) -> Callable[..., Any]:
    """Compile a graph that writes its inputs; `dynamic`: for any number of rows."""
    if engine.backend == "aot_eager":
        return gm
    from torch._dynamo.exc import TorchDynamoException

    compiled = torch.compile(gm, fullgraph=True, dynamic=dynamic, options=_fused_throughout())
    current: list[Callable[..., Any]] = [compiled]

    def run(*tensors: Tensor) -> Any:
        for matrix in (t for t in tensors if dynamic and t.ndim == 2):
            torch._dynamo.mark_static(matrix, 1)
        try:
            return current[0](*tensors)
        except TorchDynamoException as error:  # before anything ran, so nothing was written
            current[0] = gm
            warnings.warn(
                f"an optimizer update could not be compiled and runs op by op: {error}",
                MemrewriteWarning,
                stacklevel=2,
            )
            return gm(*tensors)

    return run


def _fused_throughout() -> dict[str, Any]:
    """Options by which Inductor computes a moment again where it is read, and stores none."""
    return {"realize_reads_threshold": 64, "realize_opcount_threshold": 400}


def in_compiled_autograd() -> bool:
    """Whether compiled autograd traces backward: it calls no Function's `backward`."""
    wanted: bool = torch._dynamo.config.compiled_autograd
    return wanted or getattr(torch._dynamo.compiled_autograd, "compiled_autograd_enabled", False)


def set_torch(functorch: Mapping[str, Any], inductor: Mapping[str, Any]) -> None:
    """Set torch's functorch and Inductor options for the rest of this process."""
    for config, wanted in ((functorch_config, functorch), (inductor_config, inductor)):
        for name, value in wanted.items():
            setattr(config, name, value)


def graphs_compiled() -> int:
    """How many graphs Dynamo has captured in this process, recompiles included."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
