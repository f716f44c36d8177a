"""The default loss of transformers, without a break of the graph.

A class whose name tells transformers no type of loss (GPT2LMHeadModel) has `loss_type` None. Its
loss is then that of causal language models, after a warning: Dynamo breaks the graph there, and
the loss is in another graph than the head. With the type named, the loss is the same one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

DEFAULT, BASE = "ForCausalLM", "PreTrainedModel"


def name_losses(model: nn.Module) -> list[nn.Module]:
    """Name the default loss of every module that has one; returns these modules."""
    found: list[Any] = [m for m in model.modules() if _takes_the_default(m)]
    for module in found:
        module.loss_type = DEFAULT
    return found


def _takes_the_default(module: Any) -> bool:
    """Whether transformers itself, and not an override, chooses the loss of a module."""
    line = type(module).__mro__
    known = (c for c in line if c.__name__ == BASE and c.__module__.startswith("transformers."))
    base = next(known, None)
    if base is None or type(module).loss_function is not vars(base).get("loss_function"):
        return False
    return getattr(module, "loss_type", DEFAULT) is None and not hasattr(module, "_loss_function")


def forget_names(modules: Iterable[Any]) -> None:
    """Undo `name_losses`."""
    for module in modules:
        if module.loss_type == DEFAULT:
            module.loss_type = None
