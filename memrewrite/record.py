"""What one compile decided: plain data, written once, readable from a warm cache.

Sizes are bytes at the shapes of the compile; `formula` holds them symbolically where
shapes are dynamic. Positions count the captured graph's arguments.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class InputRecord:
    """One saved activation, the weights whose gradients read it, and its fate."""

    weights: list[int]  # compressed through one z
    exact_weights: list[int]  # not selected, same tensor
    leader: int | None  # whose v is used; None where nothing is compressed
    features: int
    bytes: int  # of the activation
    z_bytes: int
    before: int  # kept by torch.compile's default partition
    after: int  # kept by ours: the activation, or z, or nothing
    fate: str  # "z saved" | "rebuilt" | "kept alive"
    kept_by: list[str] = field(default_factory=list)


@dataclass
class GraphRecord:
    """One captured graph: its inputs' fates and its totals."""

    inference: bool = False
    inputs: list[InputRecord] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    kept_before: int = 0
    kept_after: int = 0
    formula_before: str = ""
    formula_after: str = ""
    failure: str = ""  # why the rewrite was undone, if it was
    passes: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GraphRecord:
        inputs = [InputRecord(**item) for item in data["inputs"]]
        refused = {int(weight): reason for weight, reason in data["refused"].items()}
        return cls(**{**data, "inputs": inputs, "refused": refused})
