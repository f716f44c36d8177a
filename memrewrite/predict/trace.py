"""Capture, rewrite and partition a model on fake tensors; bytes of its small gradients."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from memrewrite.compiler.backend import Engine
from memrewrite.errors import UnsupportedError
from memrewrite.gradients.packing import packed_bytes
from memrewrite.methods import methods_for
from memrewrite.methods.bases import Bases
from memrewrite.methods.vectors import Vectors
from memrewrite.predict.fake import fake_mode, without_memory
from memrewrite.session.call import call_of
from memrewrite.session.session import Session, known_session


def trace(
    model: nn.Module, args: Any, kwargs: dict[str, Any], dynamic: bool, settled: bool = True
) -> tuple[Session, nn.Module]:
    """Capture, rewrite and partition a fake copy of a model; returns its session and the copy.

    The options are those of the model's compile, or none. settled: for a step between two
    refreshes of GaLore's projectors, not of a refresh. Raises UnsupportedError where capture fails.
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
    try:
        with mode, torch.enable_grad():
            compiled: Any = torch.compile(call_of(fake), backend=session, dynamic=dynamic)
            compiled(*inputs, **keywords)
    except Exception as error:
        raise UnsupportedError(f"{type(model).__name__} could not be captured: {error}") from error
    return session, fake


def factored_gradients(session: Session, model: nn.Module) -> dict[str, tuple[int, int]]:
    """Weight's name -> bytes of its small VeLoRA gradient and of its v."""
    vectors = session.vectors
    if vectors is None:
        return {}
    size, small = vectors.options.subtoken_size, _small(session, model, Vectors)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    return {name: (taken, packed_bytes(size, dtypes[name])) for name, taken in small.items()}


def projected_gradients(session: Session, model: nn.Module) -> dict[str, int]:
    """Weight's name -> bytes of its gradient in a projector's coordinates."""
    return _small(session, model, Bases)


def _small(session: Session, model: nn.Module, state: Any) -> dict[str, int]:
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        names[parameter]: part.method.small_bytes(part.sites[ask.position])
        for parameter, (part, ask) in session.returned(state).items()
    }
