"""What surrounds a step: schedules, hooks, closures, scalers, autocast, errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from galore_net import EXACT, compiled, fit, gradients, net, weights
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from memrewrite import GaLore
from memrewrite.moments.projected import ProjectedKind


@pytest.mark.parametrize("early", [True, False])
def test_schedulers_before_and_after_the_first_step(early: bool) -> None:
    by_hand, scheduled = net(), net()
    one, two = (AdamW(m.parameters(), lr=0.1) for m in (by_hand, scheduled))
    schedule: Callable[[int], float] = lambda step: 1 / (1 + step)  # noqa: E731
    if not early:
        for model, optimizer in ((by_hand, one), (scheduled, two)):
            fit(model, optimizer, range(1))
    scheduler = LambdaLR(two, schedule)
    for step in range(6):
        one.param_groups[0]["lr"] = 0.1 * schedule(step)
        fit(by_hand, one, range(step, step + 1))
        fit(scheduled, two, range(step, step + 1))
        scheduler.step()
    for name, value in weights(by_hand).items():
        assert torch.equal(value, scheduled.get_parameter(name)), name


def test_a_schedule_of_lr_and_betas_builds_one_update_per_shape() -> None:
    from memrewrite.optim.attachment import compiled

    model = net(GaLore(rank=5, update_every=3))
    optimizer = AdamW(model.parameters(), lr=0.1)
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=12)  # cycles beta1 as well
    fit(model, optimizer, range(1))
    known = set(compiled)
    kinds = {(kind.shape, kind.rank) for kind, _ in known if isinstance(kind, ProjectedKind)}
    assert kinds >= {((16, 8), 5), ((16, 16), 5), ((8, 16), 5)}
    for step in range(1, 10):
        scheduler.step()
        fit(model, optimizer, range(step, step + 1))
    assert set(compiled) == known


def test_user_hooks_see_the_gradients() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    fit(model, optimizer, range(1))  # attached already
    seen: list[bool] = []

    def look(*_: Any) -> None:
        seen.append(all(p.grad is not None for p in model.parameters()))

    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)
    fit(model, optimizer, range(1, 2))
    assert seen == [True, True]
    assert all(p.grad is not None for p in model.parameters())


def test_a_pre_hook_that_clips_acts_on_the_projected_update() -> None:
    clipped, by_hand = net(), net()
    one, two = (AdamW(m.parameters(), eps=1.0) for m in (clipped, by_hand))

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_(clipped.parameters(), 0.1)

    one.register_step_pre_hook(clip)
    for step in range(3):
        fit(clipped, one, range(step, step + 1))
        gradients(by_hand, step)
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
        two.step()
    for name, value in weights(clipped).items():
        assert torch.equal(value, by_hand.get_parameter(name)), name


@pytest.mark.parametrize("keyword", [True, False])
def test_closures(keyword: bool) -> None:
    closed, plain = net(), net()
    one, two = (AdamW(m.parameters()) for m in (closed, plain))
    for step in range(3):

        def closure(step: int = step) -> float:
            assert torch.is_grad_enabled()
            gradients(closed, step)
            return 7.0

        assert (one.step(closure=closure) if keyword else one.step(closure)) == 7.0
        fit(plain, two, range(step, step + 1))
    for name, value in weights(closed).items():
        assert torch.equal(value, plain.get_parameter(name)), name


@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler_unscales_and_skips(fused: bool) -> None:
    scaled, plain = (m.float() for m in (net(None), net(None)))
    for model in (scaled, plain):
        compiled(model, galore=EXACT)
    one, two = (AdamW(m.parameters(), fused=fused) for m in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    ids = torch.arange(12)

    def backward(model: nn.Module, factor: float = 1.0) -> Tensor:
        return model(ids).square().mean() * factor

    for step in range(6):
        bad = step == 3
        scaler.scale(backward(scaled)).backward()
        if bad:
            scaled.mix.weight.grad[0, 0] = float("inf")  # type: ignore[index]
            before = copy.deepcopy(one.state_dict()["state"]), weights(scaled)
        scaler.step(one)
        scaler.update()
        one.zero_grad()
        if bad:
            after = one.state_dict()["state"], weights(scaled)
            torch.testing.assert_close(after, before, rtol=0, atol=0)
            continue
        backward(plain).backward()
        two.step()
        two.zero_grad()
    assert scaler.get_scale() == 512.0
    for name, value in weights(scaled).items():
        torch.testing.assert_close(value, plain.get_parameter(name).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_and_accumulation(to_none: bool) -> None:
    model = compiled(net(None).float(), galore=EXACT)
    optimizer, ids = AdamW(model.parameters()), torch.arange(12)
    for _ in range(2):
        for _ in range(2):
            (model(ids).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    assert (model.mix.weight.grad is None) == to_none
    assert int(optimizer.state[model.mix.weight]["step"]) == 2


def test_a_step_that_raises_moves_no_projected_weight_and_can_be_repeated() -> None:
    model, straight = net(), net()
    optimizer, other = AdamW(model.parameters()), AdamW(straight.parameters())
    fit(model, optimizer, range(1))
    fit(straight, other, range(2))
    before = weights(model)
    gradients(model, 1)
    betas = optimizer.param_groups[0].pop("betas")
    with pytest.raises(KeyError):
        optimizer.step()
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    optimizer.param_groups[0]["betas"] = betas
    optimizer.step()  # with the gradients that the failed step had hidden
    for name, value in weights(model).items():
        assert torch.equal(value, straight.get_parameter(name)), name


def test_a_discarded_gradient_is_not_applied_after_a_step_that_raised() -> None:
    model = net()
    optimizer = AdamW(model.parameters(), weight_decay=0.0)
    fit(model, optimizer, range(1))
    gradients(model, 1)
    betas = optimizer.param_groups[0].pop("betas")
    with pytest.raises(KeyError):
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())  # to be clipped, logged, kept
    optimizer.param_groups[0]["betas"] = betas
    optimizer.zero_grad()
    before = weights(model)
    optimizer.step()
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def test_autocast_around_the_step_changes_nothing() -> None:
    cast, plain = net(None).float(), net(None).float()
    for model in (cast, plain):
        compiled(model, galore=GaLore(2, update_every=2))
    one, two = AdamW(cast.parameters()), AdamW(plain.parameters())
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            fit(cast, one, range(step, step + 1))
        fit(plain, two, range(step, step + 1))
    for name, value in weights(cast).items():
        assert torch.equal(value, plain.get_parameter(name)), name


def test_a_compiled_optimizer_step_is_the_same_step() -> None:
    model, plain = net(), net()
    one, two = AdamW(model.parameters()), AdamW(plain.parameters())
    step = torch.compile(one.step, backend="eager")
    for i in range(3):
        gradients(model, i)
        step()
        fit(plain, two, range(i, i + 1))
    for name, value in weights(model).items():
        torch.testing.assert_close(value, plain.get_parameter(name).detach())
    assert "projector" in one.state[model.mix.weight]
