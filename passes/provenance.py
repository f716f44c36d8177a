"""The module and the line of the user's program that a node comes from.   (reads only)"""

from __future__ import annotations

import re

from torch.fx import Node

ROOT = re.compile(r"^L\['\w+'\]\.?")
NO_CODE = ("File ", "^", "~", "Gradient addition node")
INDEX = re.compile(r"_modules\['([^']+)'\]|\[(?:'([^']+)'|(\d+))\]")


def module_of(node: Node) -> str:
    """The path of the module that computed the node, in forward or backward; "" for none."""
    for key in ("nn_module_stack", "fwd_nn_module_stack"):
        stack = node.meta.get(key)
        if stack:
            path = str(list(stack.values())[-1][0])
            path = INDEX.sub(lambda m: "." + next(filter(None, m.groups())), ROOT.sub("", path))
            return path.replace("..", ".").strip(".")
    return ""


def source_of(node: Node) -> str:
    """The source line that computed the node, without its file; "" where none is known."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    code = [line for line in lines if line and not line.startswith(NO_CODE)]
    return code[-1] if code else ""


def operation_of(node: Node) -> str:
    """The name of a node's operation without overload: "mm"; "argument" for a placeholder."""
    if node.op == "placeholder":
        return "argument"
    target = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(target, "__name__", target)).removeprefix("aten.")
