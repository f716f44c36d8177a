"""When a projector is refreshed, and what becomes of the moments."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from galore_net import BODY, fit, gradients, net, weights
from torch import Tensor
from torch.optim import AdamW

import memrewrite
from memrewrite import GaLore, MemrewriteWarning


def test_the_projector_changes_every_update_every_steps_and_only_then() -> None:
    model = net(GaLore(rank=2, update_every=3))
    optimizer = AdamW(model.parameters())
    seen = []
    for step in range(8):
        fit(model, optimizer, range(step, step + 1))
        seen.append(optimizer.state[model.mix.weight]["projector"].clone())
    changed = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert changed == [False, False, True, False, False, True, False]


def test_staggered_refreshes_fall_on_different_steps() -> None:
    model = net(GaLore(rank=2, update_every=6, stagger=True))
    optimizer = AdamW(model.parameters())
    when: dict[str, list[int]] = {name: [] for name in BODY}
    old: dict[str, Tensor] = {}
    for step in range(13):
        fit(model, optimizer, range(step, step + 1))
        for name in BODY:
            new = optimizer.state[model.get_parameter(name)]["projector"]
            if step and not torch.equal(new, old[name]):
                when[name].append(step)
            old[name] = new.clone()
    assert when == {"up.weight": [6, 12], "mix.weight": [4, 10], "down.weight": [2, 8]}


def test_rotated_moments_take_another_path_than_kept_ones() -> None:
    paths = []
    for moments in ("keep", "rotate"):
        model = net(GaLore(rank=2, update_every=3, moments=moments))  # type: ignore[arg-type]
        fit(model, AdamW(model.parameters()), range(3))
        first = weights(model)
        fit(model, AdamW(model.parameters()), range(3))
        optimizer = AdamW(model.parameters())
        fit(model, optimizer, range(6))
        paths.append((first, weights(model)))
    assert torch.equal(paths[0][0]["mix.weight"], paths[1][0]["mix.weight"])
    assert not torch.equal(paths[0][1]["mix.weight"], paths[1][1]["mix.weight"])


def test_a_gradient_with_nan_keeps_the_projector_warns_once_and_is_counted() -> None:
    model = net(GaLore(rank=2, update_every=2))
    optimizer = AdamW(model.parameters(), lr=0.0)
    fit(model, optimizer, range(2))
    kept = optimizer.state[model.mix.weight]["projector"].clone()
    gradients(model, 2)
    for p in (model.mix.weight, model.up.weight):
        p.grad[0, 0] = float("nan")  # type: ignore[index]
    with pytest.warns(MemrewriteWarning, match=r"projector of \w+ .*NaN") as caught:
        optimizer.step()
    assert len(caught) == 1
    assert torch.equal(optimizer.state[model.mix.weight]["projector"], kept)
    rows = {r["name"]: r for r in memrewrite.report(model).to_dict()["optimizer"]}
    assert (rows["mix"]["failed_refreshes"], rows["down"]["failed_refreshes"]) == (1, 0)
    assert rows["mix"]["last_refresh"] == 1 and rows["down"]["last_refresh"] == 3
    assert "2 refreshes of a projector failed" in str(memrewrite.report(model))
