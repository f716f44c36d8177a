"""The docstrings of Python's standard library, as instructions and as texts to classify."""

from __future__ import annotations

import ast
import functools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memrewrite.bench.tasks.text import sources

SPLIT_SEED = 0
HELD_OUT_SHARE = 0.2
PACKAGES = 20  # classes: the packages with the most docstrings
SHORTEST = 20  # characters
IGNORED = -100  # label of a token that counts for no loss: PyTorch's default


@dataclass(frozen=True)
class Entry:
    """A documented function or class: its first line of code, docstring, top-level package."""

    signature: str
    docstring: str
    package: str


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All entries in a random order that is always the same; of equal docstrings the first."""
    found: dict[str, Entry] = {}
    for path, text in sources():
        package = path.parts[0].removesuffix(".py")
        for entry in _documented(text, package):
            found.setdefault(entry.docstring, entry)
    shuffled = list(found.values())
    random.Random(SPLIT_SEED).shuffle(shuffled)
    return tuple(shuffled)


def packages(tokenizer: Any, sequence: int) -> tuple[dict[str, Tensor], int]:
    """Docstrings (N, S) with their package as the label (N,); how many are for training."""
    known = entries()
    common = Counter(entry.package for entry in known).most_common(PACKAGES)
    label = {package: i for i, (package, _) in enumerate(common)}
    chosen = [entry for entry in known if entry.package in label]
    how = {"padding": "max_length", "truncation": True, "max_length": sequence}
    read = tokenizer([entry.docstring for entry in chosen], return_tensors="pt", **how)
    arguments = {key: read[key] for key in ("input_ids", "attention_mask")}
    arguments["labels"] = torch.tensor([label[entry.package] for entry in chosen])
    return arguments, _trained(len(chosen))


def instructions(tokenizer: Any, sequence: int) -> tuple[dict[str, Tensor], int]:
    """Signatures, each followed by its docstring (N, S); only the docstrings have labels.

    Those whose signature leaves no room for half of `sequence` are left out. Padding is at the
    end, where a causal model needs no mask.
    """
    ids, labels = [], []
    end, bare = tokenizer.eos_token_id, {"add_special_tokens": False}
    for entry in entries():
        asked = f"Write the docstring.\n\n{entry.signature}\n\n"
        prompt = tokenizer(asked, **bare).input_ids
        answer = [*tokenizer(entry.docstring, **bare).input_ids, end]
        if len(prompt) > sequence // 2:
            continue
        row = [*prompt, *answer][:sequence]
        rest = sequence - len(row)
        ids.append(row + [end] * rest)
        labels.append([IGNORED] * len(prompt) + row[len(prompt) :] + [IGNORED] * rest)
    arguments = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    return arguments, _trained(len(ids))


def _trained(count: int) -> int:
    return count - max(1, round(count * HELD_OUT_SHARE))


def _documented(text: str, package: str) -> Iterator[Entry]:
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a file for another version
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            docstring = ast.get_docstring(node)
            if docstring is not None and len(docstring) >= SHORTEST:
                yield Entry(_signature(node), docstring, package)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """The line that opens the definition, without decorators and body."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{word} {node.name}({ast.unparse(node.args)}){returns}:"
