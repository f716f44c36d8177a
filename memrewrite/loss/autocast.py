"""The autocast that holds at a node of a captured graph: ambient, or entered in the graph."""

from __future__ import annotations

import torch
from torch.fx import Node


def autocast_at(node: Node, device: str) -> torch.dtype | None:
    """The dtype that autocast casts to at `node` on a type of device; None where it is off.

    To be called in the autocast state that the graph is called in: Dynamo guards on that.
    """
    live: dict[Node, torch.dtype | None] = {}
    for other in node.graph.nodes:
        if other is node:
            break
        if other.target is torch.amp.autocast_mode._enter_autocast and other.args[0] == device:
            _, dtype, enabled, *_ = other.args
            live[other] = (dtype or torch.get_autocast_dtype(device)) if enabled else None
        elif other.target is torch.amp.autocast_mode._exit_autocast:
            live.pop(other.args[0], None)
    ambient = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return next(reversed(live.values()), ambient)
