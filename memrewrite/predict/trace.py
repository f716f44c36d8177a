"""A model captured, rewritten and split without memory, and what its gradients will take."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from memrewrite.api import call_of, passes_for
from memrewrite.compiler.backend import Engine
from memrewrite.errors import UnsupportedError
from memrewrite.gradients.packing import packed_bytes
from memrewrite.predict.fake import fake_mode, without_memory
from memrewrite.session.session import Session, known_session


def trace(
    model: nn.Module, args: Any, kwargs: dict[str, Any], dynamic: bool, settled: bool = True
) -> tuple[Session, nn.Module]:
    """Capture, rewrite and split a model without memory: its session, and the copy it is of.

    settled: as between two refreshes of GaLore's projectors, not on the step of one.

    The options are those that the model was compiled with, none where it was not.
    """
    known = known_session(model)
    velora = known.velora if known else None
    if velora is not None:
        velora = replace(velora, init="ones")  # the same bytes, and no calibration
    mode = fake_mode(dynamic)
    fake, inputs, keywords = without_memory(mode, model, args, kwargs)
    engine = Engine("trace", None, None, dynamic)
    galore = known.galore if known else None
    session = Session(weakref.ref(fake), velora, engine, passes_for, {}, galore, settled=settled)
    try:
        with mode, torch.enable_grad():
            compiled: Any = torch.compile(call_of(fake), backend=session, dynamic=dynamic)
            compiled(*inputs, **keywords)
    except Exception as error:
        raise UnsupportedError(f"{type(model).__name__} could not be captured: {error}") from error
    return session, fake


def factored_gradients(session: Session, model: nn.Module) -> dict[str, tuple[int, int]]:
    """Bytes of the gradients that come as coordinates, and of their v, by the weight's name."""
    if session.velora is None:
        return {}
    names = {id(p): name for name, p in model.named_parameters()}
    size, shapes = session.velora.subtoken_size, session.coordinates()
    return {
        names[id(p)]: (
            math.prod(shapes[id(p)]) * p.element_size(),
            packed_bytes(size, p.dtype),
        )
        for p in session.ported()
    }


def projected_gradients(session: Session, model: nn.Module) -> dict[str, int]:
    """Bytes of the gradients that come in a projector's coordinates, by the weight's name."""
    names = {id(p): name for name, p in model.named_parameters()}
    kept = {id(p) for p in session.pushed()}
    choices = [choice for graph in session.graphs for choice in graph.choices.values()]
    sites = [site for choice in choices for _, site in choice.sites]
    return {
        names[id(p)]: site.rank * p.shape[1 if site.left else 0] * p.element_size()
        for site in sites
        if id(p := site.candidate.parameter) in kept
    }
