"""A task: batches to train on and batches held out, by the name of the task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from memrewrite.bench.tasks import docstrings
from memrewrite.bench.tasks.digits import CLASSES, digits
from memrewrite.bench.tasks.text import Ids, batches, stdlib_ids
from memrewrite.predict import models, pretrained

TASKS = ("text", "instructions", "packages", "digits")
CLASSIFY = ("packages", "digits")
Batch = dict[str, Tensor]  # keyword arguments of a model from transformers, labels among them
HELD_OUT = 16  # batches of text


class Task(Protocol):
    """Batches for training, endless and equal for equal seeds, and batches held out."""

    def train(self, batch: int, seed: int) -> Iterator[Batch]: ...
    def held_out(self, batch: int) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Windows:
    """Windows of a long text: ids and labels (B, S)."""

    ids: Ids
    rest: Ids
    sequence: int

    def train(self, batch: int, seed: int) -> Iterator[Batch]:
        return map(_causal, batches(self.ids, batch, self.sequence, seed))

    def held_out(self, batch: int) -> Iterator[Batch]:
        found = batches(self.rest, batch, self.sequence, 0)
        return (_causal(next(found)) for _ in range(HELD_OUT))


@dataclass(frozen=True)
class Examples:
    """Examples of one shape: for each argument of the model all examples, first train's."""

    arguments: Mapping[str, Tensor]
    trained: int  # as many from the start are for training
    most: int | None = None  # batches to hold out; None: all

    def train(self, batch: int, seed: int) -> Iterator[Batch]:
        """Every epoch in another order, without the incomplete batch at its end."""
        if batch > self.trained:
            raise ValueError(f"--batch {batch}: the task has {self.trained} examples to train on")
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(self.trained, generator=generator)
            for start in range(0, self.trained - batch + 1, batch):
                chosen = order[start : start + batch]
                yield {name: value[chosen] for name, value in self.arguments.items()}

    def held_out(self, batch: int) -> Iterator[Batch]:
        """All that is held out, or the first `most` batches; the last one may be smaller."""
        starts = range(self.trained, len(next(iter(self.arguments.values()))), batch)
        for start in starts[: self.most]:
            yield {name: value[start : start + batch] for name, value in self.arguments.items()}


def check(name: str | None, model: str, layers: int | None = None) -> str:
    """The task of a MODEL; None: its default. Raises ValueError for one that does not fit it."""
    if ":" in model:
        raise ValueError(
            f"{model} brings its own inputs, and bench train reads text: give it a config.json, "
            f"real weights or one of {', '.join(models.LLAMA)}, gpt2-small"
        )
    built: Any = models.from_config(model, layers=layers)
    fit = _fitting(built, model)
    if name is not None and name not in fit:
        kind = type(built).__name__
        raise ValueError(f"--task {name} is not for {model} ({kind}); it takes {', '.join(fit)}")
    return name or fit[0]


def _fitting(built: Any, model: str) -> tuple[str, ...]:
    """The tasks that a model can be trained on, the default first."""
    if not pretrained.is_pretrained(model):
        if getattr(built.config, "vocab_size", None) is None:
            raise ValueError(f"{model} is no language model, and bench train reads text")
        return ("text",)
    if models.takes_images(built):
        size = (built.config.num_channels, built.config.image_size)
        if size != (1, 8):
            raise ValueError(f"{model} takes images of {size[1]} pixels, and digits have 8 x 8")
        return _classifying("digits", CLASSES, built, model)
    if type(built).__name__.endswith("ForSequenceClassification"):
        return _classifying("packages", docstrings.PACKAGES, built, model)
    return ("text", "instructions")


def _classifying(name: str, labels: int, built: Any, model: str) -> tuple[str, ...]:
    if built.config.num_labels != labels:
        raise ValueError(
            f"{model} has a classifier of {built.config.num_labels} labels, and the task {name} "
            f"has {labels}: give it a model without a classifier"
        )
    return (name,)


def load(name: str, model: str, vocabulary: int, sequence: int, data: Path) -> Task:
    """The task for a MODEL with that vocabulary; text is tokenised once, and cached in `data`."""
    if name == "digits":
        return Examples(*digits())
    given = model if pretrained.is_pretrained(model) else None
    if name == "text":
        return Windows(*stdlib_ids(data, vocabulary, given), sequence)
    tokenizer = pretrained.tokenizer(model)
    if name == "instructions":
        return Examples(*docstrings.instructions(tokenizer, sequence), most=2 * HELD_OUT)
    return Examples(*docstrings.packages(tokenizer, sequence))


def _causal(ids: Tensor) -> Batch:
    return {"input_ids": ids, "labels": ids}
