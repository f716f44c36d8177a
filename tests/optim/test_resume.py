"""A run goes on bit by bit from `model.state_dict()` and `optimizer.state_dict()` alone."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import vectors_of
from quick import only
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

import memrewrite
from memrewrite import GaLore, MemrewriteWarning, VeLoRA
from memrewrite.gradients.packing import CALIBRATED, SUM, VECTOR, pack, packed_bytes, unpack

V, G = VeLoRA(8, "all"), GaLore(4, update_every=6, sites="all")
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "velora": {"velora": V},
    "velora dense": {"velora": VeLoRA(8, "all", gradients="dense")},
    "velora running": {"velora": VeLoRA(8, "all", init="running_mean")},
    "galore": {"galore": G},
    "galore coordinates": {
        "galore": GaLore(4, update_every=6, sites="all", gradients="coordinates")
    },
    "both": {
        "velora": VeLoRA(8, ["up"]),
        "galore": GaLore(4, update_every=6, sites="all", gradients="coordinates"),
    },
}


class Net(nn.Module):
    """q and k read one input; the last weight is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(24, 32), nn.Linear(24, 32, bias=False)
        self.up, self.down = nn.Linear(32, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(torch.tanh(self.q(x)) * torch.sigmoid(self.k(x)))
        return self.down(self.down(h).tanh())


def net(mode: str, dtype: torch.dtype = torch.float32, seed: int = 0, kind: type[Net] = Net) -> Net:
    torch.manual_seed(seed)
    return memrewrite.compile(kind().to(dtype), backend="aot_eager", **MODES[mode])


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 24, generator=torch.Generator().manual_seed(step)).to(dtype) + step % 3


def fit(model: Net, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model(batch(step, model.up.weight.dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def through_a_file(*states: Any) -> Any:
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def elements(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, tuple[int, ...]]]:
    states = optimizer.state_dict()["state"]
    return {i: {k: tuple(v.shape) for k, v in state.items()} for i, state in states.items()}


def check_equal(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


KINDS: dict[str, Any] = {
    "AdamW": lambda p: AdamW(p, lr=1e-2),
    "fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: Adam(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: SGD(p, lr=1e-2),
}


def check_resume(mode: str, dtype: torch.dtype, kind: str, stop: int) -> None:
    straight, resumed = net(mode, dtype), net(mode, dtype, seed=1)
    one, two = KINDS[kind](straight.parameters()), KINDS[kind](resumed.parameters())
    fit(straight, one, range(stop))
    weights, state = through_a_file(straight.state_dict(), one.state_dict())
    resumed.load_state_dict(weights)
    two.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemrewriteWarning)
        warnings.filterwarnings("ignore", ".*reads the full gradients", MemrewriteWarning)
        fit(straight, one, range(stop, stop + 4))
        fit(resumed, two, range(stop, stop + 4))
    check_equal(straight, resumed)
    assert elements(one) == elements(two)
    ours, theirs = (vectors_of(m) for m in (straight, resumed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "stop", only([1, 2, 3, 6], 2)
)  # a refresh comes next after 2 and after 6 steps
@pytest.mark.parametrize("mode", only(MODES, "exact", "velora", "velora running", "both"))
def test_every_mode_goes_on_bit_by_bit(mode: str, stop: int) -> None:
    check_resume(mode, torch.float32, "AdamW", stop)


@pytest.mark.parametrize("dtype", only([torch.bfloat16, torch.float64], torch.bfloat16))
@pytest.mark.parametrize("mode", only(MODES, "galore coordinates"))
def test_in_every_dtype(mode: str, dtype: torch.dtype) -> None:
    check_resume(mode, dtype, "AdamW", 3)


@pytest.mark.filterwarnings("ignore:.*reads the full gradients")
@pytest.mark.parametrize("kind", only(["fused", "amsgrad", "SGD"], "SGD"))
@pytest.mark.parametrize(
    "mode", only(["velora", "velora dense", "velora running", "both"], "velora")
)
def test_with_every_optimizer(mode: str, kind: str) -> None:
    if not (mode == "both" and kind == "SGD"):  # GaLore refuses it
        check_resume(mode, torch.float32, kind, 3)


def test_nothing_is_calibrated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from memrewrite.calibration import observe

    straight, resumed = net("velora"), net("velora")
    one, two = AdamW(straight.parameters()), AdamW(resumed.parameters())
    fit(straight, one, range(2))
    resumed.load_state_dict(straight.state_dict())
    two.load_state_dict(one.state_dict())

    def refuse(*_: Any) -> Any:
        raise AssertionError("calibrated")

    monkeypatch.setattr(observe, "subtoken_sums", refuse)
    fit(resumed, two, range(2, 3))
    with pytest.raises(AssertionError, match="calibrated"):
        fit(net("velora"), one, range(1))


def test_a_new_optimizer_starts_a_new_run() -> None:
    model = net("velora")
    left_over = AdamW(model.parameters(), lr=1e-2)
    fit(model, left_over, range(2))
    old = memrewrite.state_dict(model)
    memrewrite.restore(model)
    memrewrite.compile(model, backend="aot_eager", **MODES["velora"])
    fit(model, AdamW(model.parameters(), lr=1e-2), range(5, 6))
    new = memrewrite.state_dict(model)
    assert not any(torch.equal(old[key], new[key]) for key in old)


def test_a_state_loaded_after_the_first_forward_keeps_its_v() -> None:
    straight, late = net("velora"), net("velora")
    one, two = AdamW(straight.parameters(), lr=1e-2), AdamW(late.parameters(), lr=1e-2)
    fit(straight, one, range(3))
    late.load_state_dict(straight.state_dict())
    late(batch(4)).square().mean().backward()  # calibrates, on another batch
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    with pytest.warns(
        MemrewriteWarning, match="load the optimizer before the first forward"
    ) as told:
        two.step()
    assert len(told) == 1
    two.zero_grad()
    fit(late, two, range(5, 6))
    ours, theirs = vectors_of(straight), vectors_of(late)
    for name in ("q", "k", "up"):
        assert torch.equal(ours[name], theirs[name]), name
        state = two.state[late.get_parameter(f"{name}.weight")]
        assert VECTOR in state and state["exp_avg"].shape[1] < 24


@pytest.mark.parametrize("mode", only(MODES, "both"))
def test_back_to_an_earlier_state_in_mid_run(mode: str) -> None:
    model = net(mode)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    fit(model, optimizer, range(2))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    fit(model, optimizer, range(2, 9))
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemrewriteWarning)
        fit(model, optimizer, range(2, 9))
    assert all(torch.equal(value, after[key]) for key, value in model.state_dict().items())


def test_a_frozen_leader_takes_nobodys_vector_along() -> None:
    model = net("velora")
    optimizer = AdamW(model.parameters(), lr=1e-2)
    fit(model, optimizer, range(2))
    before = memrewrite.state_dict(model)
    moments = optimizer.state[model.k.weight]["exp_avg"].clone()
    model.q.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, optimizer, range(2, 3))
        after = memrewrite.state_dict(model)
        model.q.requires_grad_(True)
        fit(model, optimizer, range(3, 4))
    assert after.keys() == before.keys() == memrewrite.state_dict(model).keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    state = optimizer.state[model.k.weight]
    assert state["exp_avg"].shape == moments.shape == (32, 3) and VECTOR in state


class Adapted(nn.Module):
    """A linear with a low-rank adapter beside it, as PEFT wraps one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(24, 8, bias=False), nn.Linear(8, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def test_an_adapter_takes_nobodys_vector_along() -> None:
    model = net("velora")
    optimizer = AdamW(model.parameters(), lr=1e-2)
    fit(model, optimizer, range(2))
    before = memrewrite.state_dict(model)
    model.q = Adapted(model.q)  # type: ignore[assignment]
    optimizer.add_param_group({"params": [model.q.a.weight, model.q.b.weight]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, optimizer, range(2, 4))
    after = memrewrite.state_dict(model)
    assert after.keys() - before.keys() == {"velora.v.q.a", "velora.v.q.b"}
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(after["velora.v.q.a"], before["velora.v.k"])  # it reads the same input
    assert optimizer.state[model.k.weight]["exp_avg"].shape == (32, 3)


@pytest.mark.parametrize("route", ["ours", "optimizer"])
@pytest.mark.parametrize("saved", ["all", "k"])
def test_a_checkpoint_of_another_trained_set(route: str, saved: str) -> None:
    """Saved with q trained and loaded with q frozen, and the other way round."""
    first, second = net("velora"), net("velora")
    (first if saved == "k" else second).q.requires_grad_(False)
    one, two = AdamW(first.parameters(), lr=1e-2), AdamW(second.parameters(), lr=1e-2)
    fit(first, one, range(2))
    second.load_state_dict(first.state_dict())
    if route == "ours":
        memrewrite.load_state_dict(second, memrewrite.state_dict(first))
    else:
        two.load_state_dict(copy.deepcopy(one.state_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(second, two, range(5, 7))
    ours, theirs = vectors_of(first), vectors_of(second)
    assert torch.equal(ours["k"], theirs["k"]) and torch.equal(ours["up"], theirs["up"])


def test_state_of_an_earlier_version_loads() -> None:
    """One v per input, under the name of the weight that led it; 1-D vectors, cast to bf16."""
    first, second = net("velora", torch.bfloat16), net("velora", torch.bfloat16)
    one, two = (AdamW(m.parameters(), lr=1e-2) for m in (first, second))
    fit(first, one, range(2))
    state = memrewrite.state_dict(first)
    del state["velora.v.k"]
    held = copy.deepcopy(one.state_dict())
    for entry in held["state"].values():
        if VECTOR in entry:
            entry[VECTOR] = unpack(entry[VECTOR], torch.float32)
    second.load_state_dict(first.state_dict())
    memrewrite.load_state_dict(second, state)
    two.load_state_dict(held)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(first, one, range(2, 4))
        fit(second, two, range(2, 4))
    check_equal(first, second)


@given(
    dtypes=st.sampled_from(
        [
            (a, b)
            for a in (torch.float32, torch.float64)
            for b in (torch.bfloat16, torch.float16, torch.float32)
        ]
    ),
    scale=st.floats(-8.0, 8.0),
    seed=st.integers(0, 1000),
)
def test_packing_loses_nothing(dtypes: Any, scale: float, seed: int) -> None:
    wide, narrow = dtypes
    x = torch.randn(16, generator=torch.Generator().manual_seed(seed)).to(wide) * 10.0**scale
    x[0] *= 1e-6
    packed = pack(x, narrow)
    assert torch.equal(unpack(packed.to(narrow), wide), x)  # as load_state_dict casts it
    if wide == torch.float32:
        assert packed.nbytes == packed_bytes(16, narrow)
    assert torch.equal(unpack(pack(x * 0, narrow), wide), x * 0)


def test_checkpoints_hold_v_where_it_is_and_only_there() -> None:
    keys = {}
    for mode in ("exact", "velora", "velora dense", "velora running", "galore"):
        model = net(mode)
        optimizer = AdamW(model.parameters())
        fit(model, optimizer, range(1))
        optimizer.state_dict()
        keys[mode] = [
            {VECTOR, CALIBRATED, SUM} & optimizer.state[getattr(model, n).weight].keys()
            for n in ("q", "down")
        ]
    nothing: set[str] = set()
    assert keys == {
        "exact": [nothing, nothing],
        "velora": [{VECTOR}, {CALIBRATED}],
        "velora dense": [{CALIBRATED}, {CALIBRATED}],
        "velora running": [{SUM}, {SUM}],
        "galore": [nothing, nothing],
    }


# --- the tools that people train with -------------------------------------------------------


class Regression(Net):
    """As a Hugging Face trainer calls a model."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
        return {"loss": super().forward(x).square().mean()}


def compiled(mode: str, seed: int) -> Regression:
    torch.manual_seed(seed)
    return memrewrite.compile(Regression(), backend="aot_eager", **MODES[mode])


TOOLS = ["velora", "velora dense", "galore coordinates", "both"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", TOOLS)
def test_hugging_face_trainer(mode: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    data = [{"x": batch(i)[0], "labels": torch.zeros(())} for i in range(32)]
    how: dict[str, Any] = {"output_dir": str(tmp_path), "save_steps": 4, "report_to": []}
    how |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True}
    how |= {
        "use_cpu": True,
        "logging_strategy": "no",
        "max_steps": 8,
        "remove_unused_columns": False,
    }
    straight, resumed = compiled(mode, 0), compiled(mode, 1)
    Trainer(straight, TrainingArguments(**how), train_dataset=data).train()
    again = Trainer(resumed, TrainingArguments(**how), train_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    check_equal(straight, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("mode", TOOLS)
def test_accelerate(mode: str, tmp_path: Path) -> None:
    from accelerate import Accelerator

    def run(seed: int, steps: range, load: bool, save: bool) -> Regression:
        accelerator = Accelerator(cpu=True)
        model = compiled(mode, seed)
        prepared, optimizer = accelerator.prepare(model, AdamW(model.parameters(), lr=1e-2))
        if load:
            accelerator.load_state(str(tmp_path / "state"))
        for step in steps:
            accelerator.backward(prepared(x=batch(step))["loss"])
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if save and step == 2:
                accelerator.save_state(str(tmp_path / "state"))
        return model

    straight = run(0, range(6), load=False, save=True)
    check_equal(straight, run(1, range(3, 6), load=True, save=False))


@pytest.mark.filterwarnings("ignore")  # Lightning's own, a dozen
@pytest.mark.slow
@pytest.mark.parametrize("mode", TOOLS)
def test_lightning(mode: str, tmp_path: Path) -> None:
    import pytorch_lightning as pl

    class Lit(pl.LightningModule):  # type: ignore[misc]
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net = net(mode, seed=seed)

        def training_step(self, x: Tensor, index: int) -> Tensor:
            return self.net(x).square().mean()

        def configure_optimizers(self) -> Any:
            return AdamW(self.net.parameters(), lr=1e-2)

    def run(seed: int, checkpoint: str | None) -> Net:
        saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(accelerator="cpu", max_epochs=2, callbacks=[saving], **quiet)
        data: Any = torch.utils.data.DataLoader([batch(i) for i in range(3)], batch_size=None)  # type: ignore[arg-type]
        trainer.fit(module := Lit(seed), data, ckpt_path=checkpoint)
        return module.net

    straight = run(0, None)
    check_equal(straight, run(1, str(tmp_path / "epoch=0.ckpt")))


class Once(Net):
    """A weight that is used twice has full-size moments, which only its graph tells."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(torch.tanh(self.q(x)) * torch.sigmoid(self.k(x)))
        return self.down(h.tanh())


@pytest.mark.parametrize("mode", only(MODES, "both"))
def test_distributed_checkpoint(mode: str, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    straight, resumed = net(mode, kind=Once), net(mode, seed=1, kind=Once)
    one, two = AdamW(straight.parameters(), lr=1e-2), AdamW(resumed.parameters(), lr=1e-2)
    fit(straight, one, range(3))
    weights, state = get_state_dict(straight, one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: saved by one process
        dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path)
        weights, state = get_state_dict(resumed, two)  # takes a step on zeros
        loaded = {"model": weights, "optim": state}
        dcp.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(resumed, two, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", MemrewriteWarning)
        fit(straight, one, range(3, 7))
        fit(resumed, two, range(3, 7))
    check_equal(straight, resumed)
