"""The MODEL argument of the command line: models and inputs by description.

A MODEL is a Hugging Face config.json, one of the GaLore paper's LLaMA shapes by name
(llama-60m, 130m, 350m, 1b, 7b; and llama-70b), gpt2-small, vit-small, a model with real weights
(`memrewrite.predict.pretrained`: smollm2, minilm, a folder or a GGUF file), or `module:function`, a
callable that returns (model, args, kwargs).
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memrewrite.predict import pretrained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# hidden, intermediate, layers, heads, key-value heads; vocabulary 32000. GaLore: arXiv
# 2403.03507, table 5 and its configs; 70b: arXiv 2307.09288.
LLAMA = {
    "llama-tiny": (128, 352, 4, 4, 4),  # not from a paper: trains in a minute
    "llama-60m": (512, 1376, 8, 8, 8),
    "llama-130m": (768, 2048, 12, 12, 12),
    "llama-350m": (1024, 2736, 24, 16, 16),
    "llama-1b": (2048, 5461, 24, 32, 32),
    "llama-7b": (4096, 11008, 32, 32, 32),
    "llama-70b": (8192, 28672, 80, 64, 8),
}
NAMES = (*LLAMA, "gpt2-small", "vit-small", *pretrained.PACKAGES)
UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6, "": 1}
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer] | None] = {
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "adam": functools.partial(torch.optim.Adam, fused=True),
    "sgd": functools.partial(torch.optim.SGD, lr=1e-3),
    "none": None,
}


def from_config(
    name: str,
    vocab: int | None = None,
    layers: int | None = None,
    device: str = "meta",
    dtype: torch.dtype | None = None,
    dropout: bool = True,
) -> nn.Module:
    """A causal language model or an image classifier, by its config.

    dropout: False sets every dropout rate to 0. Raises ValueError for an unknown config.
    """
    if pretrained.is_pretrained(name):
        if vocab is not None or layers is not None:
            raise ValueError(f"{name} is pretrained: its vocabulary and its layers are given")
        return pretrained.load(name, dtype, dropout)
    config = config_of(name)
    if vocab is not None:
        config.vocab_size = vocab
    if layers is not None:
        config.num_hidden_layers = layers
    if not dropout:
        pretrained.stop_dropout(config)
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    images = "image_size" in vars(config)
    architectures: Any = AutoModelForImageClassification if images else AutoModelForCausalLM
    with torch.device(device):
        model: nn.Module = architectures.from_config(config, **({"dtype": dtype} if dtype else {}))
    return model.train()


def takes_images(model: Any) -> bool:
    """Whether a model's config is that of an image classifier."""
    return "image_size" in vars(model.config)


def inputs(model: Any, batch: int, sequence: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch of random tokens with labels, or of images for a model that takes images.

    A classifier of sequences gets one label each.
    """
    config = model.config
    if takes_images(model):
        size = (batch, config.num_channels, config.image_size, config.image_size)
        labels = torch.zeros(batch, dtype=torch.int64)
        return {"pixel_values": torch.randn(size, dtype=dtype), "labels": labels}
    ids = torch.randint(config.vocab_size, (batch, sequence))
    if type(model).__name__.endswith("ForSequenceClassification"):
        return {"input_ids": ids, "labels": torch.randint(config.num_labels, (batch,))}
    return {"input_ids": ids, "labels": ids}


def config_of(name: str) -> Any:
    """The Hugging Face config of a known shape or a file. Raises ValueError for anything else."""
    try:
        from transformers import AutoConfig, GPT2Config, LlamaConfig, ViTConfig
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'memrewrite[hf]'") from error
    config: Any
    if name in LLAMA:
        hidden, intermediate, depth, heads, kv_heads = LLAMA[name]
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=32000,
            max_position_embeddings=4096,
        )
    elif name == "gpt2-small":
        config = GPT2Config()
    elif name == "vit-small":  # Touvron et al., arXiv 2012.12877, table 1 (DeiT-S)
        config = ViTConfig(hidden_size=384, intermediate_size=1536, num_attention_heads=6)
        config.num_labels = 1000
    elif Path(name).exists():
        config = AutoConfig.from_pretrained(name)
    else:
        raise ValueError(f"{name!r} is neither a file nor one of {', '.join(NAMES)}")
    config.use_cache = False
    return config


def called(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The (model, args, kwargs) that `module:function` returns. Raises ValueError if it is not."""
    module, _, function = name.partition(":")
    made = getattr(importlib.import_module(module), function)()
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module)):
        raise ValueError(f"{name} must return (model, args, kwargs)")
    return made


def optimizer(name: str) -> Callable[[Iterable[nn.Parameter]], Optimizer] | None:
    """An optimizer by name. Raises ValueError for an unknown one."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is none of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def parse_bytes(text: str) -> int:
    """`24GiB` as bytes; GB, MiB, MB and plain numbers too. Raises ValueError for others."""
    for unit, size in UNITS.items():
        number = text.removesuffix(unit)
        if text.endswith(unit) and number.replace(".", "", 1).isdigit():
            value = float(number) * size
            if math.isfinite(value) and value >= 1:
                return int(value)
    raise ValueError(f"{text!r} is no amount of memory; write 24GiB, 24GB, 800MiB or bytes")
