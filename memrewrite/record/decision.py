"""The decisions of one compile: plain data, stored next to torch's cache.

Sizes are bytes at the shapes of the compile; formulas have them symbolically where shapes
are dynamic. Positions count the captured graph's arguments.
"""

from __future__ import annotations

import base64
import contextlib
import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

GRAPHS = ("forward", "backward")

IN_CHUNKS = "its gradient is computed with the loss, in chunks"


@dataclass
class InputRecord:
    """One activation that weight gradients read, and what is saved of it."""

    compressed: dict[str, list[int]]  # method: weights that read its z in place of x, leader first
    exact_weights: list[int]  # the others
    features: int  # D
    bytes: int  # of the activation
    small_bytes: dict[str, int] = field(default_factory=dict)  # method -> bytes of its z
    before: int = 0  # bytes saved by torch.compile's default partition
    after: int = 0  # bytes saved by ours: the activation, or its compressed form, or nothing
    # "chunked": its weight gradient is computed with the loss, in the forward
    outcome: Literal["recomputed", "replaced", "kept", "chunked"] = "recomputed"
    kept_by: list[str] = field(default_factory=list)
    declined: dict[int, str] = field(default_factory=dict)  # weight -> why a method declined it

    @property
    def weights(self) -> list[int]:
        """All weights that read a compressed form."""
        return sorted(weight for weights in self.compressed.values() for weight in weights)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> InputRecord:
        declined = {int(weight): reason for weight, reason in data["declined"].items()}
        return cls(**{**data, "declined": declined})


@dataclass
class KeptRecord:
    """One tensor that a forward saves for its backward, in the order of the graph."""

    name: str
    module: str
    operation: str
    shape: list[int | str]  # str where it is symbolic
    dtype: str
    bytes: int  # of its storage, at the first record that has it; else 0
    lives_anyway: bool  # a parameter, a buffer or a v
    compressed: bool
    used_by: list[str]  # operations in backward

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor has this shape and dtype; a symbolic size fits any."""
        return (
            str(tensor.dtype) == self.dtype
            and tensor.ndim == len(self.shape)
            and all(
                isinstance(w, str) or w == n for w, n in zip(self.shape, tensor.shape, strict=True)
            )
        )


@dataclass
class RoundedRecord:
    """One large saved tensor of floats, where rounding is asked for."""

    name: str
    bits: int | None
    reason: str  # why it is exact, or ""
    before: int  # bytes
    after: int


@dataclass
class Culprit:
    """A buffer that is live at the peak."""

    name: str
    module: str
    operation: str
    bytes: int
    kind: str  # saved, temporary, gradient, incoming, output, input


@dataclass
class MemoryRecord:
    """Bytes over time of one forward and backward; see `memrewrite.compiler.liveness`."""

    forward: list[tuple[str, int]]  # (operation, live bytes while it runs)
    backward: list[tuple[str, int]]
    forward_peaks: list[str]  # formulas; the largest is the peak
    backward_peaks: list[str]
    gradients: int = 0  # bytes that backward returns
    peak_bytes: int = 0
    peak_half: str = "forward"
    peak_index: int = 0
    culprits: list[Culprit] = field(default_factory=list)  # the largest at the peak
    composition: list[tuple[str, int]] = field(default_factory=list)  # all of it, by module

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MemoryRecord:
        pairs = {key: [(str(o), int(b)) for o, b in data[key]] for key in (*GRAPHS, "composition")}
        return cls(**{**data, **pairs, "culprits": [Culprit(**c) for c in data["culprits"]]})


@dataclass
class GraphRecord:
    """One captured graph: the decisions for its activations, and its totals."""

    inference: bool = False
    inputs: list[InputRecord] = field(default_factory=list)
    kept: list[KeptRecord] = field(default_factory=list)
    rounded: list[RoundedRecord] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    # Method -> weights whose whole gradient has its small form; those that return only that form.
    whole: dict[str, list[int]] = field(default_factory=dict)
    returned: dict[str, list[int]] = field(default_factory=dict)
    absent: dict[int, int] = field(default_factory=dict)  # output -> bytes of zeros
    kept_before: int = 0
    kept_after: int = 0
    formula_before: str = ""
    formula_after: str = ""
    memory: dict[str, MemoryRecord] = field(default_factory=dict)  # "before", "after"
    symbols: dict[str, str] = field(default_factory=dict)  # dynamic sizes: s77 -> "0.1"
    failure: str = ""  # why the rewrite was undone, if it was
    passes: list[dict[str, Any]] = field(default_factory=list)
    stages: list[tuple[str, str]] = field(default_factory=list)  # name, packed listing

    def show(self, stage: str, text: str) -> None:
        """Keep a graph's listing, compressed to about a sixth."""
        packed = base64.b64encode(zlib.compress(text.encode(), 6)).decode()
        self.stages.append((stage, packed))

    def listings(self) -> list[tuple[str, str]]:
        """(stage, listing) in the order of the compile."""
        unpacked = []
        for stage, packed in self.stages:
            text = zlib.decompress(base64.b64decode(packed)).decode()
            unpacked.append((stage, text))
        return unpacked

    def store(self, path: Path) -> None:
        """Write to `path`; an OSError is ignored, as the graph can be compiled again."""
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{id(self)}.tmp")
            temporary.write_text(json.dumps(asdict(self)))
            temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> GraphRecord | None:
        """The record that `store` wrote there, or None."""
        try:
            data = json.loads(path.read_text())
            inputs = [InputRecord.from_json(item) for item in data["inputs"]]
            kept = [KeptRecord(**item) for item in data["kept"]]
            refused = {int(weight): reason for weight, reason in data["refused"].items()}
            rounded = [RoundedRecord(**item) for item in data["rounded"]]
            absent = {int(output): size for output, size in data["absent"].items()}
            stages = [(stage, packed) for stage, packed in data["stages"]]
            memory = {k: MemoryRecord.from_json(v) for k, v in data["memory"].items()}
            read: dict[str, Any] = {"inputs": inputs, "kept": kept, "refused": refused}
            read |= {"absent": absent, "rounded": rounded}
            read |= {"stages": stages, "memory": memory}
            return cls(**{**data, **read})
        except (OSError, ValueError, TypeError, KeyError):
            return None
