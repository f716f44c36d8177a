"""What "auto" selects: documented names first, structure where there are none."""

from __future__ import annotations

import pytest
from models import Stack
from torch import nn

from memrewrite.sites.select import select
from memrewrite.sites.weights import candidates


def named(*names: str) -> nn.Module:
    """A model whose linears have exactly these dotted names."""
    root = nn.Module()
    for name in names:
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(16, 16))
    return root


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["l.0.self_attn.q_proj", "l.0.self_attn.v_proj", "l.0.mlp.down_proj"], {1, 2}),
        (["l.0.attn.c_attn", "l.0.attn.c_proj", "l.0.mlp.c_fc", "l.0.mlp.c_proj"], {3}),
        (
            ["l.0.attention.self.value", "l.0.attention.output.dense", "l.0.output.dense"],
            {0, 2},
        ),
        (["b.0.SelfAttention.v", "b.0.SelfAttention.o", "b.1.DenseReluDense.wo"], {0, 2}),
        (["h.0.attention.dense", "h.0.mlp.dense_h_to_4h", "h.0.mlp.dense_4h_to_h"], {2}),
        (["l.0.attention.wo", "l.0.feed_forward.w1", "l.0.feed_forward.w2"], {2}),
        (
            ["l.0.v_proj.base_layer", "l.0.v_proj.lora_A.default", "l.0.v_proj.lora_B.default"],
            {0, 1},
        ),
        (["v_proj", "fc1", "fc2"], {0, 2}),
    ],
)
def test_auto_by_name(names: list[str], chosen: set[int]) -> None:
    assert select(candidates(named(*names)), "auto") == {names[i] for i in chosen}


def test_auto_by_structure() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8), nn.Linear(8, 3))
    assert select(candidates(model), "auto") == {"2"}
    gated = nn.ModuleDict({"both": nn.Linear(8, 64), "out": nn.Linear(32, 8)})
    assert select(candidates(gated), "auto") == {"out"}
    with pytest.raises(ValueError, match="sites='all'"):
        select(candidates(nn.Sequential(nn.Linear(8, 8))), "auto")


def test_all_patterns_and_callables() -> None:
    found = candidates(Stack(2))
    assert select(found, "all") == {c.name for c in found}
    assert select(found, ("*.up_proj", "head")) == {
        "blocks.0.up_proj",
        "blocks.1.up_proj",
        "head",
    }
    wide = select(found, lambda name, module: getattr(module, "in_features", 0) > 32)
    assert wide == {"blocks.0.down_proj", "blocks.1.down_proj"}


def test_candidates_are_weights() -> None:
    experts = nn.Parameter(nn.Linear(8, 32).weight.detach().reshape(4, 8, 8))
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2),
            "embedding": nn.Embedding(5, 8),
            "conv": nn.Conv1d(4, 4, 3),
            "experts": nn.ParameterDict({"down_proj": experts}),
        }
    )
    kinds = {c.name: c.kind for c in candidates(model)}
    assert kinds == {
        "attention.in_proj_weight": "raw",
        "attention.out_proj": "linear",
        "experts.down_proj": "stack",
    }
