"""Data parallelism: average small gradients outside of the reducer of DistributedDataParallel.

The reducer copies each gradient to a full-size bucket and back, which makes a small one dense.
So a DDP whose model runs rewritten graphs is adopted in the first forward that does: its reducer
is rebuilt, as DDP itself does after unpickling, without the weights whose gradients may be small,
and `Averager` averages theirs:

    a forward with gradients, outside of no_sync, puts a hook on DDP's outputs; the first one
    to run in backward queues a callback for the end of that backward, when all gradients are
    accumulated. It is the outermost backward, even with reentrant checkpointing.

Options of DDP that this does not support are detected before a graph is compiled: gradients then
stay full-size in the reducer, with one warning. The only file that uses private APIs of
torch.distributed; read and run on torch 2.11 and 2.13.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from memrewrite.errors import UnsupportedError
from memrewrite.gradients.basis import Basis
from memrewrite.parallel.averaging import Averager
from memrewrite.parallel.wrapped import active, is_sharded

AVERAGING = ("allreduce_hook", "fp16_compress_hook", "bf16_compress_hook")


class Trained(Protocol):
    """The part of `session.session.Session` that data parallelism uses."""

    model: weakref.ref[nn.Module]

    @property
    def full(self) -> str | None: ...
    def keep_full(self, reason: str) -> None: ...
    def small_weights(self) -> list[nn.Parameter]: ...
    def basis_of(self, parameter: Tensor) -> Basis | None: ...


def obstacle(ddp: Any) -> str | None:
    """Why the gradients of a DDP's model must stay full-size; None if they may be small."""
    if ddp._join_config.enable:
        return "DDP runs with uneven inputs (join), whose other ranks shadow full gradients"
    if ddp.mixed_precision is not None:
        return "DDP's mixed_precision swaps the parameters during a forward"
    if ddp._delay_all_reduce_params:
        return "DDP's delay_all_reduce_named_params owns gradients as parts of one buffer"
    if any(hasattr(p, "_in_backward_optimizers") for p in ddp.module.parameters()):
        return "an optimizer in backward steps on the reducer's buckets"
    hooks = [getattr(hook, "__name__", str(hook)) for hook, _ in ddp._comm_hooks]
    strange = [name for name in hooks if name not in AVERAGING]
    if not hooks and (built_in := ddp._get_ddp_logging_data().get("comm_hook")):
        strange = [str(built_in)]
    if strange:
        return f"DDP's communication hook {strange[0]} decides what happens to gradients"
    return None


# --- one adopted DDP ---------------------------------------------------------------------


class Replica:
    """The averaging of one DDP's small gradients; holds no reference to the DDP."""

    def __init__(self, ddp: Any) -> None:
        self.sessions: weakref.WeakSet[Trained] = weakref.WeakSet()
        self.ddp = weakref.ref(ddp)
        self.averager = Averager([])
        self.handles: list[Any] = []
        self.hooks = len(ddp._comm_hooks)
        self.armed = False  # average after the next backward
        self.queued = False

    def take(self, weights: dict[str, nn.Parameter]) -> None:
        """Average these weights from now on."""
        self.averager = Averager(list(weights.items()), self.averager.sent)
        self.release()
        queue = _weakly(self, outermost=False)  # where `_tensors` finds no output
        plain: list[Any] = list(weights.values())
        self.handles = [w.register_post_accumulate_grad_hook(queue) for w in plain]

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()

    def arm(self, output: Any) -> None:
        """Called after a forward whose gradients are to be averaged."""
        self._check()
        self.armed, self.queued = True, False
        queue = _weakly(self, outermost=True)
        tensor: Any
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(queue)  # returns None: leaves the gradient as it is

    def _check(self) -> None:
        ddp: Any = self.ddp()
        changed = ddp._join_config.enable or len(ddp._comm_hooks) != self.hooks
        if changed and (reason := obstacle(ddp)) is not None:
            weights = self.averager.weights
            raise UnsupportedError(
                f"{reason}; it was set up after the first forward, when the gradients of "
                f"{len(weights)} weights were already small (for one, {weights[0][0]} "
                f"{tuple(weights[0][1].shape)}): set it up before, or pass gradients='dense' "
                "to memrewrite.VeLoRA and GaLore"
            )

    def queue(self) -> None:
        """Average at the end of the running backward."""
        self.queued = True
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(self._finish)

    def _finish(self) -> None:
        ddp = self.ddp()
        if self.armed and ddp is not None:
            self.armed = self.queued = False
            self.averager.average(ddp.process_group, self._basis_of)

    def _basis_of(self, weight: nn.Parameter) -> Basis | None:
        found = (session.basis_of(weight) for session in self.sessions)
        return next((basis for basis in found if basis is not None), None)


def _weakly(replica: Replica, outermost: bool) -> Callable[[Any], None]:
    """A hook that queues the averaging. outermost: it runs in the outermost backward."""
    reference = weakref.ref(replica)

    def queue(_: Any) -> None:
        known = reference()
        if known is not None and known.armed and not known.queued:
            if not outermost:
                _check_outermost()
            known.queue()

    return queue


def _check_outermost() -> None:
    """Raise UnsupportedError within a reentrant checkpoint, after which more gradients follow."""
    frame: Any = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "backward" and code.co_filename.endswith("checkpoint.py"):
            raise UnsupportedError(
                "no tensor is found in the output of a DDP whose model uses reentrant "
                "checkpointing, so the end of its backward cannot be seen: return tensors in "
                "lists, dictionaries or data classes, pass use_reentrant=False, or pass "
                "gradients='dense' to memrewrite.VeLoRA and GaLore"
            )
        frame = frame.f_back


_replicas: weakref.WeakKeyDictionary[Any, Replica] = weakref.WeakKeyDictionary()


def replica_of(ddp: nn.Module) -> Replica | None:
    """The replica of an adopted DDP, or None."""
    return _replicas.get(ddp)


def adopt(session: Trained, all_of_them: Callable[[], Sequence[Trained]]) -> None:
    """Adopt the DDP that the running call of one of this session's graphs is in.

    Also without gradients: a reentrant checkpoint enables them only in backward.
    """
    ddp = active()
    if ddp is None:
        return
    replica = _replicas.get(ddp)
    if session.full is None and (replica is None or session not in replica.sessions):
        _adopt(ddp, session, all_of_them())


def group_of(session: Trained) -> Any:
    """The process group that trains this session's model together; None for a single process."""
    dist, model, ddp = torch.distributed, session.model(), active()
    if model is None or not (dist.is_available() and dist.is_initialized()):
        return None
    if ddp is None:  # a reentrant checkpoint runs in backward, after the forward of its DDP
        first = next(model.parameters(), None)
        ddp = next((d for d in _replicas if any(p is first for p in d.module.parameters())), None)
    if ddp is None:
        return dist.group.WORLD if is_sharded(model) else None
    return None if ddp._join_config.enable else ddp.process_group


def foresee(session: Trained) -> None:
    """Called before a graph is compiled: keep gradients full-size where small ones would fail."""
    model, ddp = session.model(), active()
    if session.full is not None or model is None:
        return
    if ddp is not None and (reason := obstacle(ddp)) is not None:
        session.keep_full(reason)
    if is_sharded(model):
        session.keep_full("fully_shard takes full gradients and keeps a shard of each on a rank")


def _adopt(ddp: Any, session: Trained, others: Sequence[Trained]) -> None:
    """Adopt the weights of all sessions at once, as ranks may call them in different orders."""
    if (reason := obstacle(ddp)) is not None:
        session.keep_full(reason)
        return
    replica = _replicas.get(ddp)
    if replica is None:
        _install()
        replica = _replicas[ddp] = Replica(ddp)
        weakref.finalize(ddp, replica.release)
    replica.sessions |= {session, *others}
    ours = {weight for _, weight in replica.averager.weights}
    known = len(ours)
    ours |= {weight for one in replica.sessions for weight in one.small_weights()}
    weights = {n: p for n, p in ddp.module.named_parameters() if p in ours}
    if len(weights) > known:
        replica.take(weights)
        _rebuild(ddp, ours)


def _rebuild(ddp: Any, ours: set[nn.Parameter]) -> None:
    """Rebuild the reducer, as DDP does after unpickling, without these parameters."""
    ignored = ddp.parameters_to_ignore
    names = {
        f"{path}.{name}"  # as the reducer spells them
        for path, module in ddp.module.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter in ours
    }
    ddp._remove_autograd_hooks()
    try:  # only for this: a copy of the DDP is trained without us
        ddp.parameters_to_ignore = ignored | names
        parameters, sparse = ddp._build_params_for_reducer()
        if parameters:
            mapping = ddp._build_debug_param_to_name_mapping(parameters)
            with torch.enable_grad():
                ddp._ddp_init_helper(parameters, sparse, mapping, ddp.static_graph)
            _restore_settings(ddp)
        else:
            ddp.reducer = _Nothing()
    finally:
        ddp.parameters_to_ignore = ignored


def _restore_settings(ddp: Any) -> None:
    if ddp.static_graph:
        ddp._static_graph_delay_allreduce_enqueued = False
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()
    dist: Any = torch.distributed
    for hook, state in ddp._comm_hooks:
        dist._register_comm_hook(ddp.reducer, state, hook)
    if ddp.require_backward_grad_sync:
        ddp.reducer.prepare_for_forward()  # DDP's forward has done it to the other one


class _Nothing:
    """A reducer of no parameters, which torch's class does not allow."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: None


# --- around DDP's forward -------------------------------------------------------------------


@functools.cache
def _install() -> None:
    """Hook into every DDP's forward; a hook on the module would make Dynamo trace it again."""
    original: Any = DDP._post_forward

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @functools.wraps(original)
    def post_forward(ddp: Any, output: Any) -> Any:
        output = original(ddp, output)
        replica = _replicas.get(ddp)
        if replica is not None and replica.averager.weights:
            if torch.is_grad_enabled() and ddp.require_backward_grad_sync:
                replica.arm(output)
        return output

    DDP._post_forward = post_forward  # type: ignore[method-assign]


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in lists, dictionaries and data classes, which DDP finds too."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for entry in fields(output):
            yield from _tensors(getattr(output, entry.name, None))
