"""The optimizers of the configurations, with comparable settings."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memrewrite.bench.configurations import Configuration
from memrewrite.bench.run.subject import weights_of
from memrewrite.sites.eligible import sites_of
from memrewrite.sites.options import GaLore

DECAY = 0.01


def make(
    configuration: Configuration, model: nn.Module, lr: float, rank: int, refresh: int
) -> Optimizer:
    """The configuration's optimizer over the model's trained parameters.

    galore-torch and apollo-torch project the same weights as memrewrite. Raises ImportError,
    naming the package, if one is missing.
    """
    kind = configuration.optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "adamw":
        groups = _groups(configuration, model, trained, lr, rank)
        return torch.optim.AdamW(groups, lr=lr, weight_decay=DECAY, fused=True)
    if kind == "adafactor":
        return torch.optim.Adafactor(trained, lr=lr, weight_decay=DECAY)
    if kind == "adamw8bit-torchao":
        from torchao.optim import AdamW8bit

        return AdamW8bit(trained, lr=lr, weight_decay=DECAY)  # type: ignore[no-any-return]
    if kind == "adamw8bit-bitsandbytes":
        bits: Any = importlib.import_module("bitsandbytes.optim")
        made: Optimizer = bits.AdamW8bit(trained, lr=lr, weight_decay=DECAY)
        return made
    projected = {site.weight.parameter for site in sites_of(model, GaLore(rank)).projected}
    plain = [p for p in trained if p not in projected]
    small = [p for p in trained if p in projected]
    how: dict[str, Any] = {"rank": rank, "update_proj_gap": refresh, "proj_type": "std"}
    if kind == "galore-torch":
        from galore_torch import GaLoreAdamW

        how |= {"scale": 0.25}
        return GaLoreAdamW(  # type: ignore[no-any-return]
            [{"params": plain}, {"params": small, **how}],
            lr=lr,
            eps=1e-8,
            weight_decay=DECAY,
            no_deprecation_warning=True,
        )
    from apollo_torch import APOLLOAdamW

    how |= {
        "proj": "random",
        "scale_type": "channel",
        "scale": 1.0,
    }  # the main setting of its paper
    return APOLLOAdamW(  # type: ignore[no-any-return]
        [{"params": plain}, {"params": small, **how}], lr=lr, eps=1e-8, weight_decay=DECAY
    )


def _groups(
    configuration: Configuration, model: nn.Module, trained: Sequence[Tensor], lr: float, rank: int
) -> list[dict[str, Any]]:
    """One group; two for a slowed control, which scales decoupled decay with the step."""
    if configuration.slowed is None:
        return [{"params": trained}]
    slowed = set(weights_of(model, configuration.slowed, rank))
    rest = [p for p in trained if p not in slowed]
    slow = [p for p in trained if p in slowed]
    return [{"params": rest}, {"params": slow, "lr": lr * configuration.slowdown}]


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Every tensor of its state, including projectors inside of objects."""
    found: dict[int, Tensor] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            inner = getattr(value, "__tensor_flatten__", None)
            if inner is None:
                found[id(value)] = value
            else:  # torchao's quantised state
                for name in inner()[0]:
                    walk(getattr(value, name))
        elif isinstance(value, dict):
            for each in value.values():
                walk(each)
        elif hasattr(value, "__dict__") and "projector" in type(value).__name__.lower():
            walk(vars(value))

    for state in optimizer.state.values():
        walk(state)
    return list(found.values())
