"""compile() and its inverse restore(); state_dict() and load_state_dict()."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from memrewrite.compiler.backend import Engine
from memrewrite.errors import UnsupportedError, warn
from memrewrite.inspect import autodump, strays
from memrewrite.methods import methods_for
from memrewrite.methods.method import METHODS, Method
from memrewrite.methods.velora import SubTokens
from memrewrite.moments import int8 as int8  # registers it
from memrewrite.moments.moment import MOMENTS, Moment, moment_of
from memrewrite.optim import hook
from memrewrite.parallel.data_parallel import foresee
from memrewrite.parallel.wrapped import inner
from memrewrite.session.call import call_of
from memrewrite.session.calls import watched
from memrewrite.session.session import (
    Session,
    _sessions,
    known_session,
    live_sessions,
    parts_of,
    session_of,
)
from memrewrite.sites.eligible import SHARDED, sites_of
from memrewrite.sites.options import GaLore, VeLoRA, galore_options, velora_options
from memrewrite.sites.weights import candidates

M = TypeVar("M", bound=nn.Module | Optimizer)
N = TypeVar("N", bound=nn.Module)
BACKENDS = ("inductor", "aot_eager")


def compile(
    model: M,
    *,
    velora: bool | VeLoRA = False,
    galore_rank: int | None = None,
    galore: GaLore | None = None,
    activations: Method | str | None = None,
    moments: Moment | str | None = None,
    loss_chunks: int | Literal["auto"] = "auto",
    **torch_compile_kwargs: Any,
) -> M:
    """Compile `model` in place so that training it needs less memory; returns `model`.

    It stays the same nn.Module: isinstance, state_dict keys, hooks and the training loop do not
    change. A DistributedDataParallel may wrap the model before or after.

    velora: compress saved activations, arXiv 2405.17991; exact rewrites are always on.
    galore_rank: short for `galore=GaLore(rank=...)`: project the state of torch's Adam or AdamW,
        arXiv 2403.03507. The optimizer is rewritten at its first step.
    activations: another method for activations that weight gradients read (a `Compressor`, or
        the name of a registered one), for the weights that velora does not select.
    moments: a storage format for Adam's moments: "int8", a `Moment`, or the name of a registered
        one. GaLore's are stored in it too, unless backward returns coordinates; those of VeLoRA's
        small gradients, and of backward's coordinates, stay as they are.
    loss_chunks: the head and its cross entropy run in chunks of rows, exactly, and the logits
        that the model returns are computed when something reads their values. "auto": where
        the logits take 16 MiB and at least two chunks; a number: always; False: never.
    mode, options, dynamic, fullgraph, disable: as in torch.compile.
    backend: "inductor", or "aot_eager" to run the rewritten graphs without code generation.

    A second call with equal options does nothing. `compile(optimizer)`, for an optimizer over a
    model compiled with GaLore, attaches it before its first step.

    Raises TypeError for arguments of a wrong type (or a model wrapped by torch.compile),
    ValueError for values out of range, sites that match nothing or a second call with other
    options, and UnsupportedError for what this version does not support. The model is then
    unchanged.
    """
    if isinstance(model, Optimizer):
        hook.attach(model)
        return model
    if inner(model) is not model:
        more: dict[str, Any] = {"activations": activations, "moments": moments}
        more |= {"loss_chunks": loss_chunks}
        more |= {"velora": velora, "galore_rank": galore_rank, "galore": galore}
        compile(inner(model), **more, **torch_compile_kwargs)
        return model
    options, projection = velora_options(velora), galore_options(galore_rank, galore)
    methods, form = methods_for(options, projection, activations), moment_of(moments)
    _check_model(model)
    request = {"velora": options, "galore": projection, **torch_compile_kwargs}
    request |= {"activations": activations} if activations is not None else {}
    request |= {"moments": moments} if moments is not None else {}
    chunks = _chunks(loss_chunks)
    request |= {"loss_chunks": loss_chunks} if chunks != 0 else {}
    known = _sessions.get(model)
    if known is not None and model._compiled_call_impl is not None:
        if known.request == request:
            return model
        raise ValueError(
            f"the model is compiled with {known.request}; call memrewrite.restore(model) "
            f"before compiling it with {request}"
        )
    _check_untaken(model)
    for method in methods:
        if method.compresses:
            _check_sites(model, method)
    whole = _check_projection(model, projection) if projection is not None else frozenset()
    call_kwargs = dict(torch_compile_kwargs)
    engine = _engine(call_kwargs)
    session = Session(weakref.ref(model), engine, methods, request, options, projection)
    session.whole, session.moments = whole, form
    session.setting.loss_chunks = chunks
    foresee(session)
    call = call_of(model)
    compiled = torch.compile(call, backend=session, **call_kwargs)
    model._compiled_call_impl = watched(session.model, session.calls, call, compiled)
    _sessions[model] = session
    strays.follow(session, model)
    autodump.follow(session)
    hook.install()
    return model


def register(name: str, make: Callable[[], Method | Moment]) -> None:
    """Make `activations=name`, or `moments=name` for a Moment, mean `make()` in `compile`.

    Raises ValueError for a name that is taken, TypeError where `make()` is neither.
    """
    made = make()
    if not isinstance(made, Method | Moment):
        raise TypeError(
            f"{name!r} makes a {type(made).__name__}: neither a memrewrite.Compressor nor a "
            "memrewrite.Moment"
        )
    registry: dict[str, Any] = METHODS if isinstance(made, Method) else MOMENTS
    if name in registry:
        raise ValueError(f"{name!r} is registered already; choose another name")
    registry[name] = make


def restore(model: N) -> N:
    """Undo `compile`: the model runs eagerly again. Raises ValueError if it was not compiled."""
    session = session_of(model)
    strays.forget(session, inner(model))
    session.unname()
    del _sessions[inner(model)]
    inner(model)._compiled_call_impl = None
    return model


def state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state that memrewrite keeps for this model, as plain tensors.

    `velora.v.<weight>` (M,), and with GaLore(gradients="coordinates") `galore.p.<weight>`
    (side, r), the projector of the next gradient, or, where a refresh is next,
    `galore.warm.<weight>` or `galore.cold.<weight>` (other side, r + 16). Empty before the first
    training step. If submodules were compiled separately, the keys of each begin with `<path>/`.
    """
    own = known_session(model)
    if own is not None:
        return own.state_dict()
    parts = ((path, part.state_dict()) for path, part in parts_of(model))
    return {f"{path}/{key}": tensor for path, state in parts for key, tensor in state.items()}


def load_state_dict(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Restore what `state_dict` returned; a loaded v is not calibrated again.

    Raises ValueError, changing nothing, where names or sizes differ.
    """
    own = known_session(model)
    if own is not None:
        own.load_state_dict(state)
        return
    parts = dict(parts_of(model))
    split: dict[str, dict[str, torch.Tensor]] = {path: {} for path in parts}
    for key, tensor in state.items():
        path, _, name = key.rpartition("/")
        if path not in split:
            raise ValueError(f"{key!r} is of no part that is compiled: {', '.join(parts)}")
        split[path][name] = tensor
    before = {path: part.state_dict() for path, part in parts.items()}
    try:
        for path, part in parts.items():
            part.load_state_dict(split[path])
    except ValueError:
        for path, part in parts.items():
            part.load_state_dict(before[path])
        raise


def _chunks(asked: Any) -> int | None:
    """The number of chunks, 0 for "auto"; None for whole logits."""
    if asked is None or asked is False:
        return None
    if asked == "auto":
        return 0
    if type(asked) is not int:
        raise TypeError(f"loss_chunks={asked!r}: pass 'auto', a number of chunks, or False")
    if asked < 1:
        raise ValueError(f"loss_chunks={asked}: at least 1, or False")
    return asked


def _engine(kwargs: dict[str, Any]) -> Engine:
    backend = kwargs.pop("backend", "inductor")
    if backend not in BACKENDS:
        raise UnsupportedError(
            f"backend={backend!r}: memrewrite compiles with {' or '.join(map(repr, BACKENDS))}"
        )
    mode, options = kwargs.pop("mode", None), kwargs.pop("options", None)
    if mode is not None and options is not None:
        raise ValueError("pass mode= or options=, not both, as in torch.compile")
    engine = Engine(backend, mode, options, kwargs.get("dynamic"))
    if backend != "inductor" and (options or mode not in (None, "default")):
        dropped = f"options={options!r}" if options else f"mode={mode!r}"
        warn(f"{dropped} is Inductor's, so backend={backend!r} ignores it; leave one out")
    return engine


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; memrewrite compiles a torch.nn.Module")
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "the model is already wrapped by torch.compile; pass the module inside it, "
            "memrewrite.compile(model._orig_mod, ...), and drop the wrapper"
        )


def _check_untaken(model: nn.Module) -> None:
    for session in live_sessions():
        whole = session.model()
        if whole is not None and whole is not model and any(m is model for m in whole.modules()):
            raise TypeError(
                f"this {type(model).__name__} is part of a {type(whole).__name__} that is compiled "
                "by memrewrite already; select parts of it with sites=, or restore it first"
            )
    for name, module in model.named_modules():
        if module._compiled_call_impl is None:
            continue
        where = f"its submodule {name!r}" if name else "the model"
        raise TypeError(
            f"{where} is already compiled in place by nn.Module.compile; undo that first: "
            f"module._compiled_call_impl = None, or memrewrite.restore(module)"
        )


def _check_sites(model: nn.Module, method: Method) -> None:
    found = candidates(model)
    chosen = method.select(found)
    reasons = {w.name: method.why_not(w) for w in found if w.name in chosen}
    if not all(reasons.values()):
        return
    name, reason = next(iter(reasons.items()))
    if isinstance(method, SubTokens) and any(r and "too small" in r for r in reasons.values()):
        raise ValueError(
            f"subtoken_size={method.options.subtoken_size} compresses none of the {len(reasons)} "
            f"selected layers (for one, {name}: {reason}); choose a size from 2 up to the "
            "input features of the layers"
        )
    warn(
        f"{method.name} compresses nothing: every selected layer stays exact ({name}: {reason}); "
        f"select others with {method.remedy}"
    )


def _check_projection(model: nn.Module, galore: GaLore) -> frozenset[str]:
    """The names of the projected weights. Raises ValueError if there are none."""
    selection = sites_of(model, galore)
    plain = [(w, r) for w, r in selection.plain if w.parameter.requires_grad]  # QLoRA's base is not
    refused = [f"{w.name} {w.shape} ({r})" for w, r in plain if "projected:" in r]
    if refused:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        warn(
            f"GaLore leaves selected weights on plain Adam: {', '.join(refused[:3])}{more}; "
            "exclude them from sites if this is intended"
        )
    if selection.projected:
        return frozenset(site.weight.name for site in selection.projected)
    weight, reason = next(
        (pair for pair in selection.plain if pair[1].startswith("too small")), selection.plain[0]
    )
    remedy = "choose a smaller rank" if reason.startswith("too small") else "select others"
    if SHARDED in reason:
        remedy = "compile without galore_rank, or train with DistributedDataParallel"
    if any(reason == "not trained" for _, reason in selection.plain):
        remedy = "unfreeze the weights first"
    raise ValueError(
        f"GaLore at rank {galore.rank} projects no weight of the model (for one, "
        f"{weight.name} {weight.shape}: {reason}); {remedy}, or name weights with "
        "memrewrite.GaLore(rank, sites=[...])"
    )
