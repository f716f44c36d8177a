"""Tasks made of what ships with Python: labels, held-out parts, and which model takes which."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

from memrewrite.bench.tasks import docstrings, task
from memrewrite.bench.tasks.digits import digits, rotated
from memrewrite.bench.tasks.docstrings import IGNORED, Entry
from memrewrite.bench.tasks.task import Examples

S = 48  # tokens of an example


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    letters = {letter: i for i, letter in enumerate(["<end>", *ByteLevel.alphabet()])}
    bytewise = Tokenizer(BPE(letters, []))
    bytewise.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bytewise.decoder = Decoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<end>", pad_token="<end>", padding_side="right"
    )


def test_entries_are_documented_and_each_docstring_is_there_once() -> None:
    found = docstrings.entries()
    assert len(found) > 3000 == len({e.docstring for e in found[:3000]})
    assert (
        Entry(
            "def dedent(text):",
            next(e.docstring for e in found if e.signature == "def dedent(text):"),
            "textwrap",
        )
        in found
    )
    assert all(e.signature.endswith(":") and "\n" not in e.package for e in found)


def test_a_package_is_told_by_its_docstrings_alone(tokenizer: Any) -> None:
    arguments, trained = docstrings.packages(tokenizer, S)
    labels, ids, mask = (arguments[k] for k in ("labels", "input_ids", "attention_mask"))
    assert set(labels.tolist()) == set(range(docstrings.PACKAGES))
    assert ids.shape == mask.shape == (len(labels), S)
    assert torch.equal(mask == 0, (ids == 0) & (mask == 0)) and (mask[:, 0] == 1).all()
    assert set(labels[trained:].tolist()) == set(range(docstrings.PACKAGES))
    rows = {tuple(row) for row in ids[:trained].tolist()}
    again = sum(tuple(row) in rows for row in ids[trained:].tolist())
    assert again / (len(labels) - trained) < 0.2  # equal only in their first S bytes


def test_only_docstrings_have_labels(tokenizer: Any) -> None:
    arguments, trained = docstrings.instructions(tokenizer, 2 * S)
    ids, labels = arguments["input_ids"], arguments["labels"]
    assert ids.shape == labels.shape == (len(ids), 2 * S) and 0 < trained < len(ids)
    counted = labels != IGNORED
    assert torch.equal(labels[counted], ids[counted]) and counted.any(1).all()
    first = tokenizer.decode(ids[0][~counted[0] & (ids[0] != 0)])
    assert first.startswith("Write the docstring.") and first.rstrip().endswith(":")
    known = {e.docstring for e in docstrings.entries()}
    said = tokenizer.decode(ids[0][counted[0] & (ids[0] != 0)])
    assert any(docstring.startswith(said) for docstring in known)


def test_digits_are_turned_with_the_number_of_quarters() -> None:
    arguments, trained = digits()
    images, labels = arguments["pixel_values"], arguments["labels"]
    assert images.shape == (1797, 1, 8, 8) and 0 <= images.min() < images.max() == 1
    assert set(labels[:trained].tolist()) == set(range(10)) and trained == 200
    batch = rotated(images[:9], torch.Generator().manual_seed(0))
    for image, turned, k in zip(images, *batch.values(), strict=False):
        assert torch.equal(turned[0].rot90(-int(k)), image[0])


def test_an_epoch_has_every_example_once_in_an_order_of_its_own() -> None:
    examples = Examples({"x": torch.arange(11)}, trained=7)
    seen = [batch["x"].tolist() for batch in islice(examples.train(2, seed=0), 6)]
    assert seen == [batch["x"].tolist() for batch in islice(examples.train(2, seed=0), 6)]
    one, other = [*chain(*seen[:3])], [*chain(*seen[3:])]
    assert len(set(one)) == len(set(other)) == 6 and {*one, *other} <= set(range(7))
    assert one != other
    assert [b["x"].tolist() for b in examples.held_out(3)] == [[7, 8, 9], [10]]
    assert len(list(Examples({"x": torch.arange(11)}, 7, most=1).held_out(3))) == 1
    with pytest.raises(ValueError, match="7 examples"):
        next(examples.train(8, seed=0))


def test_a_task_fits_its_model(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_attention_heads": 1, "intermediate_size": 16}
    config = BertConfig(vocab_size=300, num_hidden_layers=1, **small)
    BertModel(config).save_pretrained(tmp_path / "bert")
    BertForSequenceClassification(config).save_pretrained(tmp_path / "two")
    assert task.check(None, str(tmp_path / "bert")) == "packages"
    assert task.check(None, "llama-tiny") == "text"
    shape = {"image_size": 8, "patch_size": 4, "num_channels": 1, **small}
    ViTModel(ViTConfig(num_hidden_layers=1, **shape)).save_pretrained(tmp_path / "vit")
    assert task.check(None, str(tmp_path / "vit")) == "digits"
    ViTModel(ViTConfig(num_hidden_layers=1, **shape | {"image_size": 16})).save_pretrained(
        tmp_path / "large"
    )
    with pytest.raises(ValueError, match="16 pixels"):
        task.check(None, str(tmp_path / "large"))
    with pytest.raises(ValueError, match="2 labels"):
        task.check(None, str(tmp_path / "two"))
    with pytest.raises(ValueError, match="it takes text"):
        task.check("instructions", "llama-tiny")  # random weights have no tokenizer
    with pytest.raises(ValueError, match="it takes packages"):
        task.check("text", str(tmp_path / "bert"))
