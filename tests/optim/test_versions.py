"""Every tensor that an update writes moves its version: autograd refuses a backward over it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quick import only
from torch import Tensor, nn

import memrewrite
from memrewrite import GaLore, VeLoRA


class Halved(memrewrite.Moment):
    """bf16 in place of fp32."""

    name = "halved"

    def write(self, value: Tensor, *, name: str) -> Tensor:
        return value.bfloat16()

    def read(self, stored: Tensor, *, name: str, shape: Any, dtype: torch.dtype) -> Tensor:
        return stored.to(dtype)


MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "velora": {"velora": VeLoRA(8, "all")},
    "velora, D % M": {"velora": VeLoRA(7, "all")},
    "velora dense": {"velora": VeLoRA(8, "all", gradients="dense")},
    "galore": {"galore": GaLore(4, update_every=3, sites="all", moments="rotate")},
    "galore coordinates": {
        "galore": GaLore(4, update_every=3, sites="all", gradients="coordinates")
    },
    "stored": {"moments": Halved()},
    "both": {"velora": VeLoRA(8, ["0"]), "galore": GaLore(4, sites=["2", "4"])},
}


def net(mode: str, backend: str) -> Any:
    model = nn.Sequential(
        nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 32)
    )
    return memrewrite.compile(model, backend=backend, **MODES[mode])


def written(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple[str, str], Tensor]:
    found = {(name, "weight"): p for name, p in model.named_parameters()}
    return found | {  # type: ignore[return-value]
        (name, key): value
        for name, p in model.named_parameters()
        for key, value in optimizer.state[p].items()
    }


def check(mode: str, backend: str, amsgrad: bool) -> None:
    model = net(mode, backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=amsgrad)
    changed: set[str] = set()
    for step in range(4):
        model(torch.randn(8, 64)).square().mean().backward()
        before = {
            k: (t, t._version, t.detach().clone()) for k, t in written(model, optimizer).items()
        }
        optimizer.step()
        optimizer.zero_grad()
        for key, (tensor, version, value) in before.items():
            if not torch.equal(tensor, value):
                changed.add(key[1])
                assert tensor._version > version, (step, key)
    moments = {"exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])}
    assert changed >= {"weight", "step", *moments}


@pytest.mark.parametrize("amsgrad", only([False, True], True))
@pytest.mark.parametrize("mode", only(MODES, "both", "galore coordinates", "stored"))
def test_versions_move_op_by_op(mode: str, amsgrad: bool) -> None:
    check(mode, "aot_eager", amsgrad)


@pytest.mark.inductor
@pytest.mark.parametrize("mode", ["both", "stored"])
def test_versions_move_under_inductor(mode: str) -> None:
    check(mode, "inductor", False)


@pytest.mark.parametrize("mode", only(MODES, "both"))
def test_a_backward_over_weights_that_moved_is_refused(mode: str) -> None:
    model = net(mode, "aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    first, second = (model(torch.randn(8, 64)).square().mean() for _ in range(2))
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()
