"""GaLore in a stock Adam or AdamW: attached by nothing but its own step."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import galore_oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

import memrewrite
from memrewrite import GaLore, MemrewriteWarning, UnsupportedError
from memrewrite.moments.projected import ProjectedKind
from memrewrite.session.session import session_of

EXACT = GaLore(rank=2, update_every=4, refresh="svd")


class Net(nn.Module):
    """Tall, wide and square weights, a bias, a norm, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.up = nn.Linear(8, 16)
        self.mix = nn.Linear(16, 16, bias=False)
        self.down = nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 12, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.mix(torch.tanh(self.up(self.embedding(ids)))))
        return self.lm_head(self.norm(self.down(h)))


BODY = ("up.weight", "mix.weight", "down.weight")


def net(galore: GaLore | None = EXACT, seed: int = 0, **kwargs: Any) -> Net:
    torch.manual_seed(seed)
    model = Net().double()
    if galore is None:
        return model
    return compiled(model, galore=galore, **kwargs)


def compiled(model: Any, **kwargs: Any) -> Any:
    memrewrite.compile(model, backend="aot_eager", **kwargs)
    session_of(model).calls.called = True  # most of these tests set gradients themselves
    return model


def gradients(model: nn.Module, step: int) -> None:
    """The same gradients for every model of one shape: no forward is needed."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def fit(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        gradients(model, step)
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def collected(model: nn.Module, name: str, steps: range) -> list[Tensor]:
    grads = []
    for step in steps:
        gradients(model, step)
        grads.append(model.get_parameter(name).grad.clone())  # type: ignore[union-attr]
    model.zero_grad()
    return grads


# --- what it computes ---------------------------------------------------------------------


@given(
    st.sampled_from(["short", "long", "left", "right"]),
    st.sampled_from([Adam, AdamW]),
    st.sampled_from([{}, {"foreach": True}, {"foreach": False}, {"fused": True}]),
    st.booleans(), st.booleans(), st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_every_flavour_of_adam_steps_as_the_paper_does(
    side: Any, kind: Any, flavour: Any, amsgrad: bool, maximize: bool, decay: float, other: float
) -> None:
    model = net(GaLore(rank=2, update_every=5, refresh="svd", side=side))
    stock = net(None)
    before, steps = weights(model), range(12)
    settings = {**flavour, "amsgrad": amsgrad, "maximize": maximize, "lr": 0.02}

    def build(of: nn.Module) -> Optimizer:
        named = dict(of.named_parameters())
        special = [named.pop("down.weight")]
        groups = [{"params": list(named.values()), "weight_decay": decay}]
        groups.append({"params": special, "weight_decay": other, "lr": 0.01, "betas": (0.5, 0.9)})
        return kind(groups, **settings)

    fit(model, build(model), steps)
    fit(stock, build(stock), steps)
    for name, got in weights(model).items():
        if name not in BODY:
            torch.testing.assert_close(got, stock.get_parameter(name).detach(), rtol=0, atol=0)
            continue
        last = name == "down.weight"
        rows, columns = before[name].shape
        left = {"short": rows < columns, "long": rows >= columns}.get(side, side == "left")
        expected = galore_oracle.train(
            before[name], collected(stock, name, steps), 2, left, 5, 0.25,
            0.01 if last else 0.02, (0.5, 0.9) if last else (0.9, 0.999), 1e-8,
            other if last else decay, kind is AdamW, amsgrad, maximize,
        )  # fmt: skip
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_state_is_the_projected_moments_and_the_projector_and_no_other_tensor() -> None:
    model = net(GaLore(rank=3))
    optimizer = AdamW(model.parameters())
    fit(model, optimizer, range(1))
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        numbers = sum(v.numel() for v in state.values() if v.ndim)
        if name in BODY:
            scalars = {"step", "projector_stale"}
            assert set(state) == {"exp_avg", "exp_avg_sq", "projector", *scalars}
            assert numbers == 2 * 3 * max(p.shape) + 3 * min(p.shape)
        else:
            assert numbers == 2 * p.numel()


def test_convolutions_and_embeddings_can_be_selected() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 12, 3), nn.Flatten(), nn.Linear(12, 40))
    compiled(model, galore=GaLore(rank=2, sites="all"))
    optimizer, before = AdamW(model.parameters(), weight_decay=0.0), weights(model)
    fit(model, optimizer, range(3))
    conv = model[0].weight
    assert tuple(optimizer.state[conv]["projector"].shape) == (12, 2)
    assert tuple(optimizer.state[conv]["exp_avg"].shape) == (2, 36)
    moved = (conv.detach() - before["0.weight"]).flatten(1)
    assert int(torch.linalg.matrix_rank(moved, rtol=1e-3)) == 2


def test_channels_last_weights_are_updated_in_place() -> None:
    one, other = (nn.Sequential(nn.Conv2d(4, 12, 3)) for _ in range(2))
    other.load_state_dict(one.state_dict())
    other.to(memory_format=torch.channels_last)
    for model in (one, other):
        compiled(model, galore=GaLore(2, sites="all"))
        fit(model, AdamW(model.parameters()), range(3))
    torch.testing.assert_close(one[0].weight, other[0].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_has_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    model = compiled(Net().to(dtype), galore_rank=2)
    optimizer = AdamW(model.parameters(), lr=0.05)
    before = weights(model)
    fit(model, optimizer, range(3))
    assert {optimizer.state[model.up.weight][k].dtype for k in ("exp_avg", "projector")} == {dtype}
    assert not torch.equal(model.up.weight, before["up.weight"])


# --- what surrounds a step ------------------------------------------------------------------


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


def test_frozen_parameters_and_parameters_without_gradient_are_skipped() -> None:
    model = net()
    model.mix.weight.requires_grad_(False)
    optimizer = AdamW(model.parameters())
    before = weights(model)
    fit(model, optimizer, range(2))
    model.zero_grad()
    optimizer.step()
    assert torch.equal(model.mix.weight, before["mix.weight"])
    assert not optimizer.state[model.mix.weight]
    assert int(optimizer.state[model.up.weight]["step"]) == 2
    model.mix.weight.requires_grad_(True)  # unfrozen: projected from its first step on
    fit(model, optimizer, range(1))
    assert "projector" in optimizer.state[model.mix.weight]


def test_parameters_added_later_are_projected() -> None:
    model = net()
    optimizer = AdamW(model.up.parameters())
    fit(model, optimizer, range(2))
    optimizer.add_param_group({"params": model.down.parameters(), "lr": 0.5})
    fit(model, optimizer, range(2))
    assert "projector" in optimizer.state[model.down.weight]
    assert int(optimizer.state[model.up.weight]["step"]) == 4
    assert int(optimizer.state[model.down.weight]["step"]) == 2


def test_two_optimizers_on_one_model_and_two_models() -> None:
    model, other = net(), net(seed=1)
    one, two = AdamW(model.up.parameters()), Adam([*model.down.parameters(), *other.parameters()])
    gradients(model, 0)
    gradients(other, 0)
    one.step()
    two.step()
    assert "projector" in one.state[model.up.weight]
    assert "projector" in two.state[model.down.weight]
    assert "projector" in two.state[other.mix.weight]
    assert model.up.weight not in two.state


def test_a_model_that_is_not_compiled_trains_as_ever() -> None:
    plain, stock = net(None), net(None)
    net()  # hooks are installed
    optimizer = AdamW(plain.parameters())
    moments = [[torch.zeros_like(p) for p in stock.parameters()] for _ in "mv"]
    counts = [torch.tensor(0.0) for _ in stock.parameters()]
    for step in range(2):
        fit(plain, optimizer, range(step, step + 1))
        gradients(stock, step)
        with torch.no_grad():  # torch's own function, which no hook surrounds
            adamw(
                [*stock.parameters()], [p.grad for p in stock.parameters()], *moments, [], counts,
                foreach=False, amsgrad=False, beta1=0.9, beta2=0.999, lr=1e-3, weight_decay=1e-2,
                eps=1e-8, maximize=False,
            )  # fmt: skip
    for name, value in weights(plain).items():
        assert torch.equal(value, stock.get_parameter(name)), name
    for state in optimizer.state.values():
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}


def test_attaching_early() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    assert memrewrite.compile(optimizer) is optimizer
    fit(model, optimizer, range(1))
    assert "projector" in optimizer.state[model.up.weight]
    with pytest.raises(UnsupportedError, match=r"SGD.*Adam or AdamW"):
        memrewrite.compile(SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="compile the model first"):
        memrewrite.compile(AdamW(net(None).parameters()))


# --- refreshes -----------------------------------------------------------------------------


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


# --- state --------------------------------------------------------------------------------


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


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"rank": 0}, ValueError, "below 1"),
        ({"rank": -4}, ValueError, "below 1"),
        ({"rank": 2.0}, TypeError, "must be an int"),
        ({"rank": True}, TypeError, "must be an int"),
        ({"rank": 2, "update_every": 0}, ValueError, "below 1"),
        ({"rank": 2, "scale": float("inf")}, ValueError, "not finite"),
        ({"rank": 2, "side": "std"}, ValueError, "'short', 'long'"),
        ({"rank": 2, "refresh": "qr"}, ValueError, "'randomized', 'svd'"),
        ({"rank": 2, "moments": "reset"}, ValueError, "'keep', 'rotate'"),
        ({"rank": 2, "sites": "mlp"}, ValueError, r"sites=\['mlp'\]"),
        ({"rank": 2, "stagger": 1}, TypeError, "True or False"),
    ],
)
def test_options_are_checked_where_they_are_written(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        GaLore(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"galore_rank": 0}, ValueError, "below 1"),
        ({"galore_rank": "128"}, TypeError, "must be an int"),
        ({"galore": 128}, TypeError, r"GaLore\(rank=128\)"),
        ({"galore_rank": 2, "galore": GaLore(rank=3)}, ValueError, "two ranks"),
        ({"galore_rank": 128}, ValueError, r"up \(16, 8\): too small for rank 128"),
        ({"galore": GaLore(2, sites=["*.q_proj"])}, ValueError, "matches no module"),
        ({"galore_rank": 2, "frozen": True}, ValueError, "unfreeze the weights first"),
    ],
)
def test_compile_refuses_and_leaves_the_model(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = net(None)
    if arguments.pop("frozen", False):
        model.requires_grad_(False)
    with pytest.raises(error, match=words):
        memrewrite.compile(model, **arguments)
    assert model._compiled_call_impl is None


def test_one_layer_too_small_stays_plain_with_its_reason() -> None:
    model = net(GaLore(rank=9))
    rows = {r["name"]: r for r in memrewrite.report(model).to_dict()["optimizer"]}
    assert rows["mix"]["decision"] == "projected"
    assert rows["up"]["decision"] == "plain" and "too small for rank 9" in rows["up"]["reason"]


def test_selected_weights_of_a_kind_that_is_not_projected_are_named() -> None:
    model = nn.Module()
    model.complex = nn.Linear(8, 8, dtype=torch.complex64)
    model.stack = nn.Module()
    model.stack.experts = nn.Parameter(torch.randn(3, 8, 8))
    model.good = nn.Linear(8, 8)
    with pytest.warns(MemrewriteWarning, match=r"complex \(8, 8\) .*complex64.*experts.*a stack"):
        memrewrite.compile(model, galore=GaLore(2, sites="all"), backend="aot_eager")
    rows = {row.name: row.decision for row in memrewrite.report(model).optimizer}
    assert rows["good"] == "projected" and rows["complex"] == "plain"


class Overriding(AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Inheriting(AdamW):
    pass


def test_a_subclass_that_overrides_step_is_refused_and_one_that_does_not_works() -> None:
    model = net()
    gradients(model, 0)
    before = weights(model)
    for optimizer in (Overriding(model.parameters()), SGD(model.parameters(), 0.1)):
        with pytest.raises(UnsupportedError, match=type(optimizer).__name__):
            optimizer.step()
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    good = Inheriting(model.parameters())
    good.step()
    assert "projector" in good.state[model.up.weight]


def test_differentiable_optimizers_are_refused() -> None:
    model = net()
    gradients(model, 0)
    with pytest.raises(UnsupportedError, match="differentiable"):
        AdamW(model.parameters(), differentiable=True, foreach=False).step()


def test_sparse_gradients_are_refused_before_anything_moves() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    gradients(model, 0)
    model.embedding.weight.grad = torch.zeros(12, 8, dtype=torch.float64).to_sparse()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"\(12, 8\) has a sparse gradient"):
        optimizer.step()
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    assert not any(optimizer.state.values())


def test_a_weight_that_cannot_be_gathered_is_refused_by_name() -> None:
    model = net(GaLore(rank=3))
    optimizer = AdamW(model.parameters())
    gradients(model, 0)
    before = weights(model)
    model.mix.weight.placements = [object()]  # type: ignore[attr-defined] # of some parallelism
    with pytest.raises(UnsupportedError, match=r"mix \(16, 16\), which is sharded over ranks"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_a_replaced_parameter_is_refused_by_name() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    fit(model, optimizer, range(1))
    model.mix.weight = nn.Parameter(model.mix.weight.detach().clone())
    other = net()  # noqa: F841  (whoever comes and goes)
    gradients(model, 1)
    with pytest.raises(UnsupportedError, match=r"mix \(16, 16\) was replaced"):
        optimizer.step()


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


# --- report ----------------------------------------------------------------------------------


def test_report_before_and_after_the_first_step() -> None:
    model = net(GaLore(rank=2))
    early = memrewrite.report(model)
    assert "not attached yet" in str(early)
    optimizer = AdamW(model.parameters())
    fit(model, optimizer, range(1))
    late = memrewrite.report(model)
    assert "not attached yet" not in str(late)
    sizes = [[(r.name, r.bytes_before, r.bytes_after) for r in x.optimizer] for x in (early, late)]
    assert sizes[0] == sizes[1]
    held = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.ndim)
    assert late.totals["state_bytes_after"] == held
    rows = {row.name: row for row in late.optimizer}
    assert (rows["up"].side, rows["up"].rank, rows["up"].last_refresh) == ("right", 2, 1)
    assert 0 < (rows["up"].energy or 0) < 1
    assert rows["lm_head"].reason == "the output head"
    assert rows["embedding"].reason.startswith("an embedding")


def test_a_second_compile_with_equal_options_is_silent_and_with_others_refused() -> None:
    model = net()
    assert memrewrite.compile(model, galore=EXACT, backend="aot_eager") is model
    with pytest.raises(ValueError, match="restore"):
        memrewrite.compile(model, galore_rank=3, backend="aot_eager")


def test_no_warning_in_a_usual_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = memrewrite.compile(net(None).float(), galore_rank=2, backend="aot_eager")
        optimizer, ids = AdamW(model.parameters(), fused=True), torch.arange(12)
        for _ in range(2):
            model(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


# --- the neighbours ---------------------------------------------------------------------------


class Foreign(Optimizer):
    """Some other optimizer, whose state looks like anything."""

    def __init__(self, params: Any, state: Any) -> None:
        super().__init__(params, {})
        self.given = state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = self.given


@pytest.mark.parametrize(
    "state", [{"projector": torch.eye(4)}, {"projector": torch.zeros(3)}, torch.zeros(3), [1], 7]
)
def test_other_optimizers_on_other_models_are_left_alone(state: Any) -> None:
    net()
    linear = nn.Linear(4, 4)
    optimizer, before = Foreign(linear.parameters(), state), weights(linear)
    optimizer.step()
    optimizer.step()
    assert [optimizer.state[p] is state for p in linear.parameters()] == [True, True]
    torch.testing.assert_close(weights(linear), before, rtol=0, atol=0)


def test_a_model_that_was_edited_does_not_break_its_neighbours() -> None:
    model = net(GaLore(rank=2, sites=["up"]))
    del model.up
    other = nn.Linear(4, 4)
    other.weight.grad = torch.ones(4, 4)
    before = other.weight.detach().clone()
    SGD(other.parameters(), 0.1).step()
    assert torch.equal(other.weight, before - 0.1)


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


def test_pruning_midway_keeps_the_state() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    fit(model, optimizer, range(1))
    prune.l1_unstructured(model.mix, "weight", 0.3)  # type: ignore[no-untyped-call]
    parameter = model.mix.weight_orig
    fit(model, optimizer, range(1, 2))
    assert int(optimizer.state[parameter]["step"]) == 2
    assert "projector" in optimizer.state[parameter]


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


def test_an_optimizer_over_copies_of_the_parameters_is_reported() -> None:
    model = net()
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    optimizer = AdamW(copies)
    with pytest.warns(MemrewriteWarning, match="no optimizer has stepped its parameters") as caught:
        for step in range(30):
            gradients(model, step)
            for p, master in zip(model.parameters(), copies, strict=True):
                master.grad = p.grad
            optimizer.step()
    assert len(caught) == 1


def test_a_part_of_a_compiled_model_is_not_compiled_again() -> None:
    whole = compiled(nn.Sequential(net(None), nn.Linear(12, 12).double()), galore=EXACT)
    with pytest.raises(TypeError, match="part of a Sequential that is compiled"):
        memrewrite.compile(whole[0], galore_rank=3)


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


@pytest.mark.parametrize("amsgrad", [True, False])
def test_report_counts_every_byte_of_the_state(amsgrad: bool) -> None:
    model = net()
    optimizer = AdamW(model.parameters(), amsgrad=amsgrad)
    fit(model, optimizer, range(1))
    held = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.ndim)
    full = sum(p.nbytes for p in model.parameters()) * (3 if amsgrad else 2)
    totals = memrewrite.report(model).totals
    assert (totals["state_bytes_before"], totals["state_bytes_after"]) == (full, held)
    partial = net(seed=1)
    fit(partial, AdamW(partial.up.parameters()), range(1))
    assert "not attached yet" in str(memrewrite.report(partial))
