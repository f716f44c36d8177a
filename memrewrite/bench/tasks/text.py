"""Text that every machine has: the source of Python's standard library, as token ids.

The files are split into train and validation. The tokenizer is that of a pretrained model, or a
byte-level BPE that is trained on the training files. The ids are cached as .npy files.
"""

from __future__ import annotations

import random
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from memrewrite.predict import pretrained

Ids = NDArray[np.uint16]
END = "<|endoftext|>"
VOCABULARIES = range(257, 65_537)  # from 256 bytes and END, to the range of uint16
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SPLIT_SEED = 0
VALIDATION_SHARE = 0.05
TOKENIZER_CHARACTERS = 3_000_000  # more take longer, and hardly change the merges


def stdlib_ids(output: Path, vocabulary: int, model: str | None = None) -> tuple[Ids, Ids]:
    """Train and validation ids, uint16 (tokens,) each, cached under `output`.

    model: a pretrained one, whose tokenizer has that vocabulary; None: a tokenizer is trained.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    digest = f"-{pretrained.source(model).digest()[:16]}" if model else ""
    folder = output / f"stdlib-{python}-vocab{vocabulary}{digest}"
    if not folder.is_dir():
        _tokenise(folder, vocabulary, model)
    return np.load(folder / "train.npy"), np.load(folder / "validation.npy")


def batches(ids: Ids, batch: int, sequence: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches (B, S) of windows at random places, equal for equal seeds."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(len(ids) - sequence, size=batch)
        rows = np.stack([ids[s : s + sequence] for s in starts])  # (B, S)
        yield torch.from_numpy(rows.astype(np.int64))


def _tokenise(folder: Path, vocabulary: int, model: str | None) -> None:
    train, validation = _split([text for _, text in sources()])
    tokenizer = _backend(model) if model else _trained_tokenizer(train, vocabulary)
    # Renamed only when complete, so that an interrupted run leaves no partial cache.
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial.", dir=folder.parent))
    tokenizer.save(str(partial / "tokenizer.json"))
    np.save(partial / "train.npy", _encode(tokenizer, train))
    np.save(partial / "validation.npy", _encode(tokenizer, validation))
    try:
        partial.rename(folder)
    except OSError:  # another process was first, with the same ids
        shutil.rmtree(partial)


def sources() -> Iterator[tuple[Path, str]]:
    """(path below the library, text) of each module, in order, excluding what is not UTF-8."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if EXCLUDED.isdisjoint(path.relative_to(root).parts):
            try:
                yield path.relative_to(root), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def _split(files: list[str]) -> tuple[list[str], list[str]]:
    random.Random(SPLIT_SEED).shuffle(files)
    held_out = max(1, round(len(files) * VALIDATION_SHARE))
    return files[held_out:], files[:held_out]


def _backend(model: str) -> Tokenizer:
    tokenizer: Tokenizer = pretrained.tokenizer(model).backend_tokenizer
    if tokenizer.get_vocab_size() > VOCABULARIES[-1]:
        raise ValueError(f"{model} has {tokenizer.get_vocab_size():,} tokens; at most 65,536 fit")
    return tokenizer


def _trained_tokenizer(files: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_head(files, TOKENIZER_CHARACTERS), trainer)
    return tokenizer


def _head(files: list[str], characters: int) -> Iterator[str]:
    for file in files:
        if characters <= 0:
            return
        characters -= len(file)
        yield file


def _encode(tokenizer: Tokenizer, files: list[str]) -> Ids:
    encoded = tokenizer.encode_batch([file + END for file in files])
    return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in encoded])  # (tokens,)
