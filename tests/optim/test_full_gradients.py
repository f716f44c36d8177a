"""Optimizers other than torch's Adam, steps that are compiled, and steps within backward."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quick import only
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Muon, NAdam, Optimizer

import memrewrite
from memrewrite import GaLore, MemrewriteWarning, UnsupportedError, VeLoRA
from memrewrite.gradients.gradient import ProjectedGrad

Make = Callable[[Any], Optimizer]
STEPS = 4


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    return memrewrite.compile(model, backend="aot_eager", **options)


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    result: Tensor = model(torch.randn(32, 64, generator=generator)).square().mean()
    return result


def trained(model: nn.Module, optimizer: Optimizer, step: Callable[..., Any]) -> list[Tensor]:
    """The weights after some steps at a learning rate that changes."""
    for i in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
    return [p.detach().clone() for p in model.parameters()]


def velora(gradients: Any = "coordinates") -> dict[str, Any]:
    return {"velora": VeLoRA(sites="all", gradients=gradients)}


OTHERS: dict[str, Make] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "fused SGD": lambda p: SGD(p, lr=0.1, fused=True),
    "Adafactor": Adafactor,
    "NAdam": NAdam,
    "Muon": lambda p: Muon([q for q in p if q.ndim == 2]),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", only(OTHERS, "Muon"))
def test_another_optimizer_gets_the_full_gradient(name: str, compiled: bool) -> None:
    found, make = [], OTHERS[name]
    for gradients in ("coordinates", "dense"):
        model = net(**velora(gradients))
        optimizer = make(list(model.parameters()))
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MemrewriteWarning)
            found.append(trained(model, optimizer, step))
        assert type(model[0].weight.grad) is Tensor
        torch._dynamo.reset()
    for small, full in zip(*found, strict=True):
        torch.testing.assert_close(small, full)


KINDS = ["AdamW8bit", "AdamW4bit", "AdamWFp8", "_AdamW"]


@pytest.mark.parametrize("kind", only(KINDS, "_AdamW"))
def test_an_optimizer_that_compiles_its_own_step(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchao.optim

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = []
    for gradients in ("coordinates", "dense"):
        model = net(**velora(gradients))
        optimizer = getattr(torchao.optim, kind)(model.parameters(), 1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MemrewriteWarning)
            found.append(trained(model, optimizer, optimizer.step))
    for small, full in zip(*found, strict=True):
        torch.testing.assert_close(small, full)
    step = optimizer.state[model[0].weight]["step"]
    assert float(step) == STEPS  # every one of them was taken


@pytest.mark.parametrize("named", [False, True])
def test_gradients_of_a_closure_become_full_within_the_step(named: bool) -> None:
    seen = []

    class Reads(SGD):
        def step(self, closure: Any = None) -> Any:
            loss = closure()
            seen.append({type(p.grad) for g in self.param_groups for p in g["params"]})
            super().step()
            return loss

    model = net(**velora())
    optimizer = Reads(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with pytest.warns(MemrewriteWarning, match="Reads reads the full gradients of 2"):
        first = optimizer.step(closure=closure) if named else optimizer.step(closure)
        second = optimizer.step(closure=closure) if named else optimizer.step(closure)
    assert seen == [{Tensor}, {Tensor}] and second < first


def test_lbfgs() -> None:
    found = []
    for gradients in ("coordinates", "dense"):
        model = net(**velora(gradients))
        optimizer = LBFGS(model.parameters(), max_iter=3)

        def closure(model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MemrewriteWarning)
            for _ in range(2):
                optimizer.step(closure)  # type: ignore[arg-type]
        found.append([p.detach().clone() for p in model.parameters()])
    for small, full in zip(*found, strict=True):
        torch.testing.assert_close(small, full)


# --- torch's Adam, compiled ---------------------------------------------------------------------


MODES: dict[str, dict[str, Any]] = {
    "velora": velora(),
    "velora, lr_scale=1": {"velora": VeLoRA(sites="all", lr_scale=1.0)},
    "velora, dense": velora("dense"),
    "galore": {"galore": GaLore(8, sites="all")},
    "galore in coordinates": {"galore": GaLore(8, sites="all", gradients="coordinates")},
    "both": {
        "velora": VeLoRA(sites=["0"]),
        "galore": GaLore(8, sites="all", gradients="coordinates"),
    },
}
ADAMS: dict[str, Make] = {
    "AdamW": AdamW,
    "foreach": lambda p: AdamW(p, foreach=True),
    "tensor lr": lambda p: AdamW(p, lr=torch.tensor(1e-3)),
    "fused": lambda p: AdamW(p, fused=True),
}


QUICK = [("AdamW", "galore in coordinates"), ("fused", "both")]
CASES = [("AdamW", mode) for mode in MODES]
CASES += [(adam, mode) for adam in list(ADAMS)[1:] for mode in ("velora", "both")]


@pytest.mark.parametrize(("adam", "mode"), only(CASES, *QUICK))
def test_a_compiled_step_of_adam_is_the_same_step(adam: str, mode: str) -> None:
    """Dynamo collects parameters once, when it traces: ours were then stepped once."""
    found, make = [], ADAMS[adam]
    for compiled in (False, True):
        model = net(**MODES[mode])
        optimizer = make(model.parameters())
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        found.append(trained(model, optimizer, step))
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(eager, other)


def test_a_compiled_capturable_step_on_the_cpu() -> None:
    """Stock Adam refuses that unless it is compiled."""
    found = []
    for capturable in (False, True):
        model = net(**velora("dense"))
        optimizer = AdamW(model.parameters(), capturable=capturable)
        found.append(trained(model, optimizer, torch.compile(optimizer.step, backend="eager")))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_gradient_that_turns_dense_under_a_compiled_step() -> None:
    found = []
    for compiled in (False, True):
        model = net(velora=VeLoRA(sites="all", lr_scale=1.0))
        optimizer = AdamW(model.parameters())
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        with pytest.warns(MemrewriteWarning, match="full-size"):
            for i in range(STEPS):
                optimizer.zero_grad()
                loss_of(model, i).backward()
                if i == 1:
                    model[0].weight.grad = model[0].weight.grad.to_dense()
                step()
        found.append([p.detach().clone() for p in model.parameters()])
    for eager, other in zip(*found, strict=True):
        torch.testing.assert_close(eager, other)


def test_a_step_under_fullgraph_says_whose_hook_that_is() -> None:
    model = net(**velora())
    optimizer = AdamW(model.parameters())
    loss_of(model, 0).backward()
    with pytest.raises(Exception, match=r"memrewrite looks at .* without fullgraph=True"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


def test_state_of_a_run_without_velora_stays_full_size_and_that_is_told() -> None:
    before, after = net(), net(**velora())
    old, new = AdamW(before.parameters()), AdamW(after.parameters())
    loss_of(before, 0).backward()
    old.step()
    after.load_state_dict(before.state_dict())
    new.load_state_dict(old.state_dict())
    with pytest.warns(MemrewriteWarning, match=r"full-size Adam state .*\(128, 64\)") as told:
        for i in range(2):
            new.zero_grad()
            loss_of(after, i).backward()
            new.step()
    assert len(told) == 1 and "start with a new optimizer" in str(told[0].message)
    assert new.state[after[0].weight]["exp_avg"].shape == (128, 64)
    row = memrewrite.report(after).optimizer[0]
    assert (row.decision, row.reason) == ("plain", "its state is full-size: see the warning")


# --- in backward, and names ---------------------------------------------------------------------


WITHIN = [("AdamW", mode) for mode in MODES]
WITHIN += [("SGD", mode) for mode in MODES if "galore" not in MODES[mode]]  # it takes Adam alone


@pytest.mark.parametrize(("optimizer", "mode"), only(WITHIN, ("AdamW", "both"), ("SGD", "velora")))
def test_an_optimizer_within_backward(optimizer: str, mode: str) -> None:
    make: Make = AdamW if optimizer == "AdamW" else OTHERS["SGD"]
    found, told = [], 0
    for within in (False, True):
        model = net(**MODES[mode])
        parts = [[p] for p in model.parameters()] if within else [list(model.parameters())]
        optimizers = [make(part) for part in parts]
        by_parameter = {part[0]: one for part, one in zip(parts, optimizers, strict=True)}

        def hook(p: Tensor, known: Any = by_parameter) -> None:
            known[p].step()
            known[p].zero_grad()

        if within:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(hook)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MemrewriteWarning)
            for i in range(STEPS):
                loss_of(model, i).backward()
                if not within:
                    optimizers[0].step()
                    optimizers[0].zero_grad()
        told += len(caught)
        found.append([p.detach().clone() for p in model.parameters()])
    for after, inside in zip(*found, strict=True):
        torch.testing.assert_close(after, inside)
    small = make is not AdamW and mode != "velora, dense"
    assert told == 2 * small  # once for each model, however many optimizers it has


class AdamW8bit(SGD):  # named as somebody else's
    pass


def test_the_class_is_named_with_its_module() -> None:
    model = net(galore_rank=8)
    optimizer = AdamW8bit(model.parameters(), lr=0.1)
    loss_of(model, 0).backward()
    with pytest.raises(UnsupportedError, match=r"is a .*test_full_gradients\.AdamW8bit; use torch"):
        optimizer.step()
    model = net(**velora())
    loss_of(model, 0).backward()
    assert isinstance(model[0].weight.grad, ProjectedGrad)
    with pytest.warns(MemrewriteWarning, match=r"test_full_gradients\.AdamW8bit reads the full"):
        AdamW8bit(model.parameters(), lr=0.1).step()
