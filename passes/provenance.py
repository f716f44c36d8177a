"""Where a node comes from in the user's program.   (reads only)"""

from __future__ import annotations

import re

from torch.fx import Node

ROOT = re.compile(r"^L\['\w+'\]\.?")
NO_CODE = ("File ", "^", "~", "Gradient addition node")
INDEX = re.compile(r"_modules\['([^']+)'\]|\[(?:'([^']+)'|(\d+))\]")


def module_of(node: Node) -> str:
    """The module whose forward made the node, or that its gradient belongs to; "" for none."""
    for key in ("nn_module_stack", "fwd_nn_module_stack"):
        stack = node.meta.get(key)
        if stack:
            path = str(list(stack.values())[-1][0])
            path = INDEX.sub(lambda m: "." + next(filter(None, m.groups())), ROOT.sub("", path))
            return path.replace("..", ".").strip(".")
    return ""


def source_of(node: Node) -> str:
    """The user's line of code, without its file; "" where tracing kept none."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    code = [line for line in lines if line and not line.startswith(NO_CODE)]
    return code[-1] if code else ""


def operation_of(node: Node) -> str:
    """The name of what a node computes, as users write it: "mm", "embedding"; "argument"."""
    if node.op == "placeholder":
        return "argument"
    target = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(target, "__name__", target)).removeprefix("aten.")
