"""The parts of a measurement, without processes: rates, resets, draws, room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import memrewrite
from memrewrite.bench.configurations import parse
from memrewrite.bench.run import training
from memrewrite.bench.run.cost import Cost, Settings
from memrewrite.bench.run.process import Failed
from memrewrite.bench.run.subject import Request, Subject, prepare
from memrewrite.bench.run.worker import compare, draws
from memrewrite.bench.tasks.task import Windows
from memrewrite.predict.models import from_config


def test_the_rate_rises_then_falls() -> None:
    values = [training._schedule(step, 100) for step in range(100)]
    assert values[:5] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25])
    assert values[19] == values[20] == 1.0 == max(values)
    assert values == [*sorted(values[:20]), *sorted(values[20:], reverse=True)]
    assert 0 < values[-1] < 1e-3


def test_starting_over_forgets_weights_and_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked:
        @staticmethod
        def build(seed: int) -> Any:
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(32, 32, bias=False)), (), {}

    model, _, _ = Asked.build(0)
    velora = memrewrite.VeLoRA(subtoken_size=8, sites="all")
    memrewrite.compile(model, velora=velora, backend="aot_eager")
    model(torch.randn(4, 32)).sum().backward()
    before = memrewrite.state_dict(model)
    with torch.no_grad():
        model[0].weight.zero_()
    training._start_over(model, parse("velora-all-8"), Asked(), 0)  # type: ignore[arg-type]
    assert torch.equal(model[0].weight, Asked.build(0)[0][0].weight)
    x = torch.randn(4, 32) + 1
    model(x).sum().backward()
    (v,) = memrewrite.state_dict(model).values()
    mean = x.view(-1, 8).sum(0)
    torch.testing.assert_close(v, mean / mean.norm())
    assert not torch.equal(v, *before.values())


def test_validation_draws_no_dropout() -> None:
    asked = Request("gpt2-small", batch=2, seq=16, vocab=300, layers=1, dropout=True)
    model, _, _ = asked.build()
    ids = np.arange(100, dtype=np.uint16)
    chosen = Windows(ids, ids, sequence=16)
    one, other = (training._validation(model.train(), chosen, asked) for _ in range(2))
    assert one == other and model.training


@pytest.mark.parametrize("name", ["lora-4+eager", "lora-4+nf4+eager"])
def test_adapters_are_trained_from_the_weights_of_the_seed(name: str) -> None:
    """B is random where gradients are compared, and zero where training starts."""
    asked, configuration = Request("llama-tiny", batch=1, seq=8, vocab=300), parse(name)
    model = prepare(configuration, asked).model
    ups = [p for name, p in model.named_parameters() if "lora_B" in name]
    downs = [p for name, p in model.named_parameters() if "lora_A" in name]
    assert len(ups) == 2 * 4 and all(p.any() for p in ups) and {len(p) for p in downs} == {4}
    training._start_over(model, configuration, asked, 1)
    assert not any(p.any() for p in ups)
    first = downs[0].clone()
    training._start_over(model, configuration, asked, 1)
    assert torch.equal(downs[0], first)
    kinds = {p.dtype for p in model.parameters() if p.ndim == 2 and not p.requires_grad}
    assert kinds == {torch.float32, torch.uint8} if configuration.nf4 else {torch.float32}
    training._start_over(model, configuration, asked, 2)
    assert not torch.equal(downs[0], first)


def test_gradients_are_compared_as_one_vector(tmp_path: Path) -> None:
    path = tmp_path / "reference"
    torch.save([torch.tensor([3.0]), torch.tensor([4.0])], path)
    found = compare([torch.tensor([3.0]), torch.tensor([0.0])], str(path))
    assert found == {"cosine": pytest.approx(0.6), "relative_error": pytest.approx(0.8)}
    with pytest.raises(ValueError, match="other shapes"):
        compare([torch.tensor([3.0])], str(path))


def test_gradients_of_two_draws_are_not_compared() -> None:

    kept, off = (from_config("gpt2-small", layers=1, dropout=on) for on in (True, False))
    assert draws(kept) and not draws(off)
    assert not draws(from_config("vit-small", layers=1))


def test_a_model_without_a_loss_says_so() -> None:
    subject = Subject(nn.Linear(4, 4), (torch.randn(2, 4),), {})
    with pytest.raises(ValueError, match="Linear returns a Tensor without a scalar loss"):
        subject.loss()


def test_what_fails_makes_room_and_what_fits_is_started() -> None:
    class Worker:
        configuration, closed = parse("eager"), False

        def __init__(self, **answer: int) -> None:
            self.answer = answer

        def ask(self, do: str, **facts: Any) -> dict[str, int]:
            if not self.answer:
                raise Failed({"stage": do, "message": "planted"})
            return dict(self.answer)

        def close(self) -> None:
            self.closed = True

    def start(child: Any) -> bool:
        return bench._start(child, {"error": None})

    said = (lambda text: None), (lambda: None)
    bench = Cost(None, Request("eager"), [], Settings(), *said)  # type: ignore[arg-type]
    bench.scratch = Path("nowhere")
    bench._cache = lambda configuration: Path()  # type: ignore[method-assign]
    fits, fills, fails = Worker(taken=10, available=21), Worker(taken=11, available=21), Worker()
    assert bench._room() and start(fits) and bench._room()
    assert start(fills) and not bench._room()
    assert not start(fails) and fails.closed and not (fits.closed or fills.closed)
