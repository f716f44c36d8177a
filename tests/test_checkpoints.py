"""Checkpoints that earlier versions wrote still load, and the run goes on as it did there.

`checkpoints/0.1.0.pt` is of the code before it was divided into rooms: per mode the model's, the
optimizer's and memrewrite's state after four steps, and the weights after five more.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memrewrite
from memrewrite import GaLore, VeLoRA

SAVED = Path(__file__).parent / "checkpoints" / "0.1.0.pt"
COORDINATES: dict[str, Any] = {"update_every": 3, "gradients": "coordinates"}
MODES: dict[str, dict[str, Any]] = {
    "velora": {"velora": VeLoRA(4, "all")},
    "dense": {"velora": VeLoRA(4, "all", gradients="dense")},
    "running": {"velora": VeLoRA(4, "all", init="running_mean")},
    "galore": {"galore": GaLore(2, update_every=3)},
    "pushed": {"galore": GaLore(2, **COORDINATES)},
    "both": {"velora": VeLoRA(4, ["0"]), "galore": GaLore(2, sites="all", **COORDINATES)},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ours", [True, False], ids=["with memrewrite's", "without"])
def test_a_checkpoint_of_before_goes_on(mode: str, ours: bool) -> None:
    saved = torch.load(SAVED, weights_only=True)[mode]
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    memrewrite.compile(model, backend="aot_eager", **MODES[mode])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if ours:
        memrewrite.load_state_dict(model, saved["memrewrite"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing starts anew, nothing becomes full-size
        for step in range(4, 9):
            x = torch.randn(6, 16, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, expected in saved["after"].items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-6, atol=1e-7)
