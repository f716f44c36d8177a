"""Which weights the option `sites` selects.

"auto" follows VeLoRA's paper (value and MLP down projections) by these names:

    value   v_proj value value_proj v_lin to_v, T5's Attention.v
    down    down_proj fc2 dense_4h_to_h fc_out lin2 linear2 ffn_output, T5's Dense*.wo,
            mlp.c_proj, feed_forward.w2, experts.*.w2, output.dense outside attention

A fused projection (GPT-2's c_attn) contains the value projection and two others, so it
stays exact. Where no down projection has one of these names, it is found by structure: a
linear F -> D, F > D, with a linear D -> F (or D -> 2F, gated) in the same parent module.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from memrewrite.sites.options import Sites
from memrewrite.sites.weights import Weight

VALUE = ("*.v_proj", "*.value", "*.value_proj", "*.v_lin", "*.to_v", "*Attention.v")
DOWN = (
    "*.down_proj",
    "*.fc2",
    "*.dense_4h_to_h",
    "*.fc_out",
    "*.lin2",
    "*.linear2",
    "*.ffn_output",
    "*Dense*.wo",
    "*.mlp.c_proj",
    "*.feed_forward.w2",
    "*.experts.*.w2",
    "*.output.dense",
)
NOT_DOWN = ("*attention*.output.dense",)
ADAPTER = re.compile(r"\.(base_layer|lora_A\.[^.]+)$")  # PEFT's wrappers of a named linear


def select(found: list[Weight], sites: Sites) -> set[str]:
    """The names that `sites` selects. Raises ValueError if it selects nothing."""
    if not found:
        raise ValueError("the model has no linear layer, so there is nothing to compress")
    remedy = "memrewrite.VeLoRA(sites='all')"
    if sites == "auto":
        return _nonempty(_auto(found), "value or down projection by name or structure", remedy)
    return choose(found, sites, remedy)


def choose(found: list[Weight], sites: Sites, remedy: str) -> set[str]:
    """The names that "all", patterns or a callable select. Raises ValueError for none."""
    if sites == "all":
        return {c.name for c in found}
    if callable(sites):
        chosen = {c.name for c in found if sites(c.name, c.module)}
        return _nonempty(chosen, "site that the callable accepts", remedy)
    for pattern in sites:
        if not any(fnmatchcase(c.name, pattern) for c in found):
            raise ValueError(
                f"sites pattern {pattern!r} matches no module; the candidates are "
                f"{_shortened([c.name for c in found])}"
            )
    return {c.name for c in found if any(fnmatchcase(c.name, p) for p in sites)}


def _nonempty(chosen: set[str], what: str, remedy: str) -> set[str]:
    if not chosen:
        raise ValueError(
            f"found no {what}; pass {remedy} or a list of patterns such as sites=['*.fc2']"
        )
    return chosen


def _auto(found: list[Weight]) -> set[str]:
    named = {c.name: "." + ADAPTER.sub("", c.name) for c in found if ".lora_B." not in c.name}
    values = {name for name, path in named.items() if _matches(path, VALUE)}
    downs = {
        name
        for name, path in named.items()
        if _matches(path, DOWN) and not _matches(path.lower(), NOT_DOWN)
    }
    stacks = {c.name for c in found if c.kind == "stack" and c.name.endswith("down_proj")}
    return values | (downs or _down_by_structure(found)) | stacks


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _down_by_structure(found: list[Weight]) -> set[str]:
    linears = [c for c in found if c.kind == "linear"]
    return {
        down.name
        for down in linears
        if down.shape[1] > down.shape[0]
        for up in linears
        if _parent(up.name) == _parent(down.name)
        and up.shape in ((down.shape[1], down.shape[0]), (2 * down.shape[1], down.shape[0]))
    }


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _shortened(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def why_exact(weight: Weight) -> str | None:
    """The reason why no method may apply to a selected weight, as far as no graph is needed."""
    if weight.kind == "stack":
        return (
            f"a stack of {weight.shape[0]} expert weights: grouped and indexed matmuls "
            "are not rewritten"
        )
    if not weight.parameter.requires_grad:
        return "not trained"
    if not weight.parameter.dtype.is_floating_point:
        return f"{weight.parameter.dtype} weights are not rewritten"
    return None
