"""The measured subject: a model and its inputs under one configuration."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import memrewrite
from memrewrite.bench.adapters import HEADS, adapted
from memrewrite.bench.configurations import Configuration, Controlled
from memrewrite.compiler.backend import set_torch
from memrewrite.predict import models
from memrewrite.session.call import call_of
from memrewrite.sites.eligible import sites_of
from memrewrite.sites.options import GaLore
from memrewrite.sites.select import select, why_exact
from memrewrite.sites.weights import candidates

SEED = 0


@dataclass(frozen=True)
class Request:
    """The model and its inputs, as described by flags."""

    model: str
    batch: int = 8
    seq: int | None = 256  # None for a model of images
    vocab: int | None = None
    layers: int | None = None
    dtype: str = "fp32"
    device: str = "cpu"
    rank: int = 128
    refresh: int = 10  # steps between refreshes of a projector: a short bench must include one
    dropout: bool = False  # of a model from a config; module:function keeps its own
    task: str | None = None  # of `bench train`; None: text

    def build(self, seed: int = SEED) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """(model, args, kwargs), equal for equal seeds."""
        torch.manual_seed(seed)
        if ":" in self.model:
            model, args, kwargs = models.called(self.model)
            return model, args, kwargs
        dtype = models.DTYPES[self.dtype]
        model = models.from_config(
            self.model, self.vocab, self.layers, "cpu", dtype, dropout=self.dropout
        )
        torch.manual_seed(seed + 1)
        named = models.inputs(model, self.batch, self.seq or 0, dtype)
        model.to(self.device)
        return model, (), {key: value.to(self.device) for key, value in named.items()}


@dataclass
class Subject:
    """A model under one configuration."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of the given inputs, or of the model's. Raises ValueError if it is no loss."""
        if not (args or kwargs):
            args, kwargs = self.args, self.kwargs
        out = self.model(*args, **kwargs)
        loss = getattr(out, "loss", out)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(
                f"{type(self.model).__name__} returns a {type(out).__name__} without a scalar "
                "loss; return one, or an output with .loss"
            )
        return loss


def prepare(configuration: Configuration, asked: Request) -> Subject:
    """The model of a configuration, before its first step."""
    set_torch(configuration.functorch, configuration.inductor)
    model, args, kwargs = asked.build()
    if configuration.lora:
        model = adapted(model, configuration).to(asked.device)
    model.train()
    if configuration.frozen is not None:
        for parameter in weights_of(model, configuration.frozen, asked.rank):
            parameter.requires_grad_(False)
    if configuration.checkpointing:
        _checkpoint(model)
    _compile(model, configuration, asked)
    return Subject(model, args, kwargs)


def start_over(model: nn.Module, configuration: Configuration, asked: Request, seed: int) -> None:
    """Write the initial weights of a seed into a prepared model: of adapters those for training."""
    fresh, _, _ = asked.build(seed)
    if configuration.lora:
        fresh = adapted(fresh, configuration, trained=True)
    if not configuration.nf4:
        model.load_state_dict(fresh.state_dict())
        return
    values = dict(fresh.named_parameters())  # a linear in NF4 does not load its state dict
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(values[name].data)


def weights_of(model: nn.Module, sites: Controlled, rank: int) -> list[nn.Parameter]:
    """The weights that VeLoRA compresses at these sites; for "galore", those it projects."""
    if sites == "galore":
        return [site.weight.parameter for site in sites_of(model, GaLore(rank)).projected]
    found = candidates(model)
    names = select(found, "auto" if sites == "auto" else "all")
    chosen = [w for w in found if w.name in names and why_exact(w) is None and _has(w.name)]
    return list(dict.fromkeys(weight.parameter for weight in chosen))


def _has(name: str) -> bool:
    """Whether the pretrained model has it, so that it is no new head."""
    return HEADS.isdisjoint(name.split("."))


def _checkpoint(model: Any) -> None:
    switches = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # new name, old
    found = next((getattr(model, s) for s in switches if hasattr(model, s)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no switch for checkpointing")
    found({"use_reentrant": False})


def _compile(model: nn.Module, configuration: Configuration, asked: Request) -> None:
    if configuration.own is not None:
        module, _, function = configuration.own.partition(":")
        getattr(importlib.import_module(module), function)(model)
    elif configuration.engine == "torch.compile":
        model._compiled_call_impl = torch.compile(call_of(model))
    elif configuration.engine == "memrewrite":
        size = configuration.velora
        heads = any(not _has(name) for name, _ in model.named_modules())
        sites: Any = configuration.sites
        if heads and sites == "all":
            sites = lambda name, _: _has(name)  # noqa: E731
        gradients: Any = "dense" if configuration.dense else "coordinates"
        scale: Any = "sqrt" if configuration.lr_sqrt else 1.0
        velora = memrewrite.VeLoRA(size or 16, sites, lr_scale=scale, gradients=gradients)
        how: Any = "coordinates" if configuration.pushed else "dense"
        galore = memrewrite.GaLore(
            asked.rank,
            update_every=asked.refresh,
            stagger=configuration.staggered,
            gradients=how,
        )
        wanted = galore if configuration.galore else None
        other: Any = {"activations": configuration.activations, "moments": configuration.moments}
        other["loss_chunks"] = (
            "auto" if configuration.chunks is None else configuration.chunks or False
        )
        memrewrite.compile(model, velora=velora if size else False, galore=wanted, **other)
