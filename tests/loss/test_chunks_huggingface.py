"""The loss in chunks on models of Hugging Face: heads, scales, soft caps, decoders, shifts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import memrewrite
from memrewrite.loss.lazy import LazyLogits

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
}
T5 = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16, "vocab_size": 96}
WHISPER = {
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
    **{"d_model": 32, "vocab_size": 96, "max_source_positions": 50, "dropout": 0.0},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
FAMILIES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "LlamaForCausalLM": (hf.LlamaConfig, SMALL),
    "Gemma2ForCausalLM": (hf.Gemma2Config, {**SMALL, "num_key_value_heads": 2, "head_dim": 16}),
    "GraniteForCausalLM": (hf.GraniteConfig, {**SMALL, "logits_scaling": 4.0}),
    "GPT2LMHeadModel": (
        hf.GPT2Config,
        {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 96}
        | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    ),
    "MixtralForCausalLM": (
        hf.MixtralConfig,
        {**SMALL, "num_key_value_heads": 2, "num_local_experts": 2, "output_router_logits": True},
    ),
    "BertForMaskedLM": (
        hf.BertConfig,
        {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "T5ForConditionalGeneration": (
        hf.T5Config,
        {**T5, "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0},
    ),
    "WhisperForConditionalGeneration": (hf.WhisperConfig, WHISPER),
}


def batch(name: str) -> dict[str, Tensor]:
    tokens = torch.randint(3, 96, (2, 16))
    labels = torch.where(torch.rand(2, 16) < 0.3, -100, tokens)
    if name.startswith("Whisper"):
        return {"input_features": torch.randn(2, 80, 100), "labels": labels}
    return {"input_ids": tokens, "labels": labels}


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_logits_and_gradients_are_those_of_eager(name: str) -> None:
    torch.manual_seed(0)
    config, options = FAMILIES[name]
    model = getattr(hf, name)(config(**options)).train()
    compiled = memrewrite.compile(copy.deepcopy(model), backend="aot_eager", loss_chunks=3)
    inputs = batch(name)
    got, want = compiled(**inputs), model(**inputs)
    assert type(got.logits) is LazyLogits
    got.loss.backward(), want.loss.backward()
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.logits + 0, want.logits)
    for (path, p), q in zip(compiled.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=path)


def test_restore_forgets_the_name_of_gpt2s_loss() -> None:
    config, options = FAMILIES["GPT2LMHeadModel"]
    model = hf.GPT2LMHeadModel(config(**options)).train()
    assert model.loss_type is None
    memrewrite.compile(model, backend="aot_eager")
    assert model.loss_type == "ForCausalLM"
    assert memrewrite.restore(model).loss_type is None


class Own(nn.Module):
    """A module whose names only look like those of transformers."""

    loss_type: str | None = None

    def loss_function(self, x: Tensor) -> Tensor:
        return x.sum() if self.loss_type is None else x.mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.loss_function(x)


class OwnLoss(hf.GPT2LMHeadModel):
    """A model of transformers with a loss of its own."""

    loss_function = Own.loss_function


def test_a_loss_of_the_users_own_keeps_its_type() -> None:
    x = torch.randn(3, requires_grad=True)
    torch.testing.assert_close(memrewrite.compile(Own(), backend="aot_eager")(x), x.sum())
    config, options = FAMILIES["GPT2LMHeadModel"]
    overridden, given = OwnLoss(config(**options)), hf.GPT2LMHeadModel(config(**options))
    overridden.loss_type, given.loss_function = None, torch.nn.functional.cross_entropy
    for model in (overridden, given):
        assert memrewrite.compile(model, backend="aot_eager").loss_type is None
