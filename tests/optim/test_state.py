"""Optimizer state and checkpoints of GaLore: what goes on, and what is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from galore_net import EXACT, compiled, fit, gradients, net, weights
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import memrewrite
from memrewrite import GaLore


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("moments", ["keep", "rotate"])
def test_resuming_between_refreshes_is_bit_exact(fused: bool, moments: Any) -> None:
    galore = GaLore(rank=2, update_every=4, moments=moments)
    straight = net(galore)
    optimizer = AdamW(straight.parameters(), lr=0.05, fused=fused)
    scheduler = CosineAnnealingLR(optimizer, 20)
    file = io.BytesIO()
    for step in range(14):
        if step == 6:
            saved = {"model": straight.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(saved | {"scheduler": scheduler.state_dict()}, file)
        fit(straight, optimizer, range(step, step + 1))
        scheduler.step()
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed = net(galore, seed=9)
    resumed.load_state_dict(loaded["model"])
    second = AdamW(resumed.parameters(), lr=0.05, fused=fused)
    again = CosineAnnealingLR(second, 20)
    second.load_state_dict(loaded["optimizer"])
    again.load_state_dict(loaded["scheduler"])
    for step in range(6, 14):
        fit(resumed, second, range(step, step + 1))
        again.step()
    for name, value in weights(straight).items():
        assert torch.equal(value, resumed.get_parameter(name)), name
        for key, held in optimizer.state[straight.get_parameter(name)].items():
            assert torch.equal(held, second.state[resumed.get_parameter(name)][key]), (name, key)


def stepped(galore: GaLore | None, **kwargs: Any) -> dict[str, Any]:
    model = net(galore)
    optimizer = AdamW(model.parameters(), **kwargs)
    fit(model, optimizer, range(1))
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("saved", "loaded", "words"),
    [
        (None, EXACT, r"up \(16, 8\) is full-size Adam state"),
        (GaLore(rank=3), EXACT, "rank 2 needs"),
        (GaLore(rank=2, side="long"), EXACT, "rank 2 needs"),
    ],
)
def test_state_of_another_configuration_is_refused(
    saved: GaLore | None, loaded: GaLore, words: str
) -> None:
    model = net(loaded)
    optimizer = AdamW(model.parameters())
    optimizer.load_state_dict(stepped(saved))
    before = weights(model)
    gradients(model, 0)
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    assert model.up.weight.grad is not None


def test_projected_state_in_a_model_without_galore_is_refused() -> None:
    model = compiled(net(None))
    optimizer = AdamW(model.parameters())
    optimizer.load_state_dict(stepped(EXACT))
    gradients(model, 0)
    with pytest.raises(ValueError, match=r"projected state .*\(16, 8\) \(rank 2\)"):
        optimizer.step()


def test_amsgrad_turned_on_midway_is_refused() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    fit(model, optimizer, range(2))
    optimizer.param_groups[0]["amsgrad"] = True
    gradients(model, 0)
    with pytest.raises(ValueError, match="max_exp_avg_sq"):
        optimizer.step()


def test_a_restored_model_with_projected_state_is_refused() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    fit(model, optimizer, range(1))
    memrewrite.restore(model)
    gradients(model, 1)
    with pytest.raises(ValueError, match="is not projected now"):
        optimizer.step()
    fit(model, AdamW(model.parameters()), range(1))  # a new one trains it in full


def test_a_first_gradient_of_zeros_is_silent_and_survives_a_checkpoint() -> None:
    galore = GaLore(rank=2, update_every=50)
    straight, resumed = net(galore), net(galore)
    one, two = AdamW(straight.parameters()), AdamW(resumed.parameters())
    for p in straight.parameters():
        p.grad = torch.zeros_like(p)
    one.step()  # silent: LoRA's A has this gradient at its first step
    resumed.load_state_dict(straight.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for model, optimizer in ((straight, one), (resumed, two)):
        fit(model, optimizer, range(1, 4))
    for name, value in weights(straight).items():
        assert torch.equal(value, resumed.get_parameter(name)), name
    state = two.state[resumed.mix.weight]
    assert not bool(state["projector_stale"])
    assert not torch.equal(state["projector"], torch.eye(16, 2).double())
    assert memrewrite.report(straight).optimizer[0].failed_refreshes == 0


def test_a_weight_of_another_dtype_than_its_state_is_refused_by_name() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    fit(model, optimizer, range(1))
    model.float()
    gradients(model, 1)
    with pytest.raises(ValueError, match=r"state of \w+ is torch.float64, but .* torch.float32"):
        optimizer.step()
