"""The default loss of transformers, without a break of the graph.

A class whose name tells transformers no type of loss (GPT2LMHeadModel) has `loss_type` None. Its
loss is then that of causal language models, after a warning: Dynamo breaks the graph there, and
the loss is in another graph than the head. With the type named, the loss is the same one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

DEFAULT = "ForCausalLM"


def name_losses(model: nn.Module) -> list[nn.Module]:
    """Name the default loss of every module that has one; returns these modules."""
    found: list[Any] = [m for m in model.modules() if hasattr(type(m), "loss_function")]
    found = [m for m in found if getattr(m, "loss_type", DEFAULT) is None]
    for module in found:
        module.loss_type = DEFAULT
    return found


def forget_names(modules: Iterable[Any]) -> None:
    """Undo `name_losses`."""
    for module in modules:
        if module.loss_type == DEFAULT:
            module.loss_type = None
