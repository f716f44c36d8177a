"""Capture, rewrite and partition a model on fake tensors; bytes of its small gradients."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from memrewrite.compiler.backend import Engine
from memrewrite.errors import UnsupportedError
from memrewrite.methods import methods_for
from memrewrite.predict.fake import fake_mode, without_memory
from memrewrite.session.call import call_of
from memrewrite.session.session import Session, known_session


def trace(
    model: nn.Module,
    args: Any,
    kwargs: dict[str, Any],
    dynamic: bool,
    settled: bool = True,
    chunked: bool = True,
) -> tuple[Session, nn.Module]:
    """Capture, rewrite and partition a fake copy of a model; returns its session and the copy.

    The options are those of the model's compile, or none. settled: for a step between two
    refreshes of GaLore's projectors, not of a refresh. chunked: with the loss in chunks, if that
    is among the options. Raises UnsupportedError where capture fails.
    """
    known = known_session(model)
    velora, galore = (known.velora, known.galore) if known else (None, None)
    if velora is not None:
        velora = replace(velora, init="ones")  # the same bytes without calibration
    activations = known.request.get("activations") if known else None
    mode = fake_mode(dynamic)
    fake, inputs, keywords = without_memory(mode, model, args, kwargs)
    engine = Engine("trace", None, None, dynamic)
    methods = methods_for(velora, galore, activations, settled)
    session = Session(weakref.ref(fake), engine, methods, {}, velora, galore)
    wanted = known.setting.loss_chunks if known else 0
    session.setting.loss_chunks = wanted if chunked else None
    try:
        with mode, torch.enable_grad():
            compiled: Any = torch.compile(call_of(fake), backend=session, dynamic=dynamic)
            compiled(*inputs, **keywords)
    except Exception as error:
        raise UnsupportedError(f"{type(model).__name__} could not be captured: {error}") from error
    return session, fake


@dataclass(frozen=True)
class SmallGradient:
    """A gradient that backward returns in the small form of a method. Sizes are bytes."""

    size: int
    basis: int  # in the optimizer's state, beside moments of the small gradient
    factored: bool  # whether moments are of the small gradient
    moves: bool  # whether its basis changes from step to step


def small_gradients(session: Session, model: nn.Module) -> dict[str, SmallGradient]:
    """Those of a traced model, by the weight's name."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    found = {}
    for parameter, (part, ask) in session.returned().items():
        method, site = part.method, part.sites[ask.position]
        sizes = method.small_bytes(site), method.basis_bytes(site)
        found[names[parameter]] = SmallGradient(*sizes, method.factors, method.moves)
    return found


def moving_bytes(session: Session) -> int:
    """Bytes of the bases that change from step to step."""
    states = (state for method, state in session.kept if method.moves)
    return sum(t.nbytes for state in states for t in state.state_dict().values())
