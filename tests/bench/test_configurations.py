"""Names of configurations, and the models and optimizers that they make."""

from __future__ import annotations

from typing import Any

import pytest

import memrewrite
from memrewrite.bench.configurations import parse
from memrewrite.bench.run import optimizers
from memrewrite.bench.run.subject import Request, prepare, weights_of
from memrewrite.bench.sets import SETS, chosen
from memrewrite.predict.models import from_config


@pytest.mark.parametrize(("name", "stagger"), [("galore", False), ("galore+staggered", True)])
def test_a_staggered_row_has_no_step_on_which_all_refresh(
    name: str, stagger: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(memrewrite, "compile", lambda model, **facts: asked.update(facts))
    prepare(parse(name), Request("llama-tiny", 2, 16, 256, 1, rank=32, refresh=6))
    assert asked["galore"] == memrewrite.GaLore(32, update_every=6, stagger=stagger)
    assert parse(name).projected is not stagger


@pytest.mark.parametrize("sites", ["auto", "all", "galore"])
def test_a_slowed_control_slows_what_it_is_the_control_of(sites: Any) -> None:
    model = from_config("llama-tiny", vocab=2048, layers=1, device="cpu")
    controlled = weights_of(model, sites, rank=32)
    optimizer = optimizers.make(parse(f"slowed-{sites}-0.25"), model, 8e-3, 32, 100)
    rest, slow = optimizer.param_groups
    assert {id(p) for p in slow["params"]} == {id(p) for p in controlled}
    assert (rest["lr"], slow["lr"]) == (8e-3, 2e-3)
    assert len(rest["params"]) + len(slow["params"]) == len(list(model.parameters()))
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = {names[id(p)].split(".")[-2] for p in controlled}
    assert {"v_proj", "down_proj"} <= kinds and "embed_tokens" not in kinds
    assert ("lm_head" in kinds, len(kinds)) == {"auto": (False, 2), "all": (True, 8)}.get(
        sites, (False, 7)
    )


def test_a_name_is_its_parts() -> None:
    found = parse("velora-all-32+checkpointing+budget-0.5+galore")
    assert (found.engine, found.velora, found.sites) == ("memrewrite", 32, "all")
    assert found.checkpointing and found.galore and found.functorch
    assert not found.exact and found.ours and found.baseline == "torch.compile"
    assert parse("budget-0.5").functorch == {"activation_memory_budget": 0.5}
    assert parse("lora+velora-all-16").baseline == "lora+torch.compile"
    assert parse("my:own").own == "my:own" and not parse("my:own").exact
    assert parse("fp8").fp8 == parse("fp8-2.5").fp8 == 2.5 and not parse("torch.compile").inductor
    (how,) = parse("memrewrite+fp8-0").inductor["post_grad_fusion_options"].values()
    assert how["size_in_mb"] == 0


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("eager+checkpointing", True),
        ("aggressive", True),
        ("memrewrite+checkpointing", True),
        ("fp8", False),
        ("memrewrite+fp8-0", False),
        ("velora-auto-16", False),
        ("adafactor", False),
        ("frozen-all", False),
        ("slowed-galore-0.25", False),
    ],
)
def test_which_are_exact(name: str, exact: bool) -> None:
    assert parse(name).exact is exact


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torch.compil", "did you mean 'torch.compile'"),
        ("budget-2", "no part of a configuration"),
        ("fp8-all", "no part of a configuration"),
        ("velora-all-0", "no part of a configuration"),
        ("velora-all-x", "no part of a configuration"),
        ("eager+memrewrite", "disagree about engine"),
        ("budget-0.5+budget-0.25", "disagree about budget"),
        ("lr-sqrt", "velora's weights"),
        ("velora-all-16+dense+lr-sqrt", "small gradients"),
        ("dense", "how velora returns"),
        ("slowed-all-2", "no part of a configuration"),
        ("slowed-all-0.5+galore", "nothing else"),
        ("velora-all-16+pushed", "how galore takes"),
        ("galore+pushed+staggered", "when galore refreshes"),
        ("staggered", "when galore refreshes"),
        ("peft-velora-16", "needs lora"),
        ("", "name a configuration"),
        ("nothing-*", "matches"),
    ],
)
def test_names_that_mean_nothing(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        chosen(name)


def test_sets_and_patterns() -> None:
    assert [c.name for c in chosen("quick")] == list(SETS["quick"])
    assert {c.name for c in chosen("budget-*")} == {"budget-0.75", "budget-0.5", "budget-0.25"}
    assert [c.name for c in chosen("eager, eager,torch.compile")] == ["eager", "torch.compile"]
    everything = {c.name for c in chosen("all")}
    assert {*SETS["activations"], *SETS["optimizers"], *SETS["lora"]} <= everything
    assert not any(parse(name).only_training for name in everything)
