"""A graph as text: one line per node, with shape, dtype, module and source line."""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes.provenance import module_of, source_of

VALUE = re.compile(r"[^:=]+: (\w+)\[([^\]]*)\] = ")
SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "b8",
}
ITEMSIZE = {short: dtype.itemsize for dtype, short in SHORT.items()}


def listing(graph: Graph) -> str:
    """The whole graph as text, which a line-by-line diff can compare."""
    return "\n".join(line_of(node) for node in graph.nodes) + "\n"


def line_of(node: Node) -> str:
    """`mm_3: f32[64, 16] = mm(view_7, permute_2)  # model.up_proj: h = self.up_proj(x)`"""
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    kind = f": {value_of(node)}" if value_of(node) else ""
    if node.op == "placeholder":
        return f"{node.name}{kind} = input{_note(node)}"
    named = [f"{key}={_argument(value)}" for key, value in node.kwargs.items() if value is not None]
    operands = ", ".join([*map(_argument, node.args), *named])
    return f"{node.name}{kind} = {_target(node)}({operands}){_note(node)}"


def value_of(node: Node) -> str:
    """The dtype and shape of a node's value: `bf16[8, 256]`."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        sizes = ", ".join(map(str, value.shape))
        return f"{SHORT.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{sizes}]"
    return "" if value is None or isinstance(value, list | tuple) else type(value).__name__


def difference(before: str, after: str, names: tuple[str, str]) -> str:
    """A unified diff of two listings; empty for equal ones."""
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), *names, n=2
    )
    return "".join(lines)


def changed(before: str, after: str) -> tuple[dict[str, str], dict[str, str]]:
    """(inserted, removed): node name -> line, for nodes that only one listing has."""
    old, new = _lines(before), _lines(after)
    inserted = {name: line for name, line in new.items() if name not in old}
    return inserted, {name: line for name, line in old.items() if name not in new}


def described(name: str, line: str) -> dict[str, Any]:
    """A line as data: node, module, source line, and bytes (None where symbolic)."""
    module, _, source = line.partition("  # ")[2].partition(": ")
    value = VALUE.match(line)
    size: int | None = 0
    if value is not None:
        dtype, lengths = value.groups()
        known = all(length.isdigit() for length in lengths.split(", ") if length)
        size = ITEMSIZE.get(dtype) if known else None
        if size is not None:
            size *= math.prod(int(length) for length in lengths.split(", ") if length)
    return {"name": name, "line": line, "module": module, "source": source, "bytes": size}


def _lines(text: str) -> dict[str, str]:
    lines = (line for line in text.splitlines() if not line.startswith("return "))
    return {line.split(":")[0].split(" =")[0]: line for line in lines}


def _target(node: Node) -> str:
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return str(getattr(target, "__name__", target))
    return str(packet).removeprefix("aten.")


def _argument(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_argument, value))}]"
    return str(value)


def _note(node: Node) -> str:
    parts = [part for part in (module_of(node), source_of(node)) if part]
    return f"  # {': '.join(parts)}" if parts else ""
