"""Write the `meta` entries of `passes.base` into a joint graph traced by AOTAutograd."""

from __future__ import annotations

from torch.fx import Graph


def annotate(graph: Graph) -> bool:
    """Write the entries of `passes.base` into meta. Returns False for a graph without backward."""
    output = graph.output_node()
    tangents = False
    for node in graph.find_nodes(op="placeholder"):
        desc = node.meta.get("desc")
        node.meta["argument"] = getattr(desc, "idx", None) if _is(desc, "PlainAOTInput") else None
        node.meta["tangent"] = _is(desc, "TangentAOTInput")
        of = getattr(desc, "output", None)
        node.meta["output"] = getattr(of, "idx", None) if _is(of, "PlainAOTOutput") else None
        tangents |= node.meta["tangent"]
    descs = output.meta.get("desc") or [None] * len(output.args[0])  # type: ignore[arg-type]
    output.meta["gradient_of"] = [
        getattr(desc.grad_of, "idx", None) if _is(desc, "GradAOTOutput") else None for desc in descs
    ]
    return tangents


def _is(desc: object, name: str) -> bool:
    return type(desc).__name__ == name
