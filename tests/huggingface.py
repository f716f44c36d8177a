"""Small Hugging Face models from their configs, random weights, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

Built = tuple[nn.Module, Callable[[nn.Module], Tensor]]
TOKENS = {"vocab_size": 96, "use_cache": False, "pad_token_id": 0}
TOKENS |= {"bos_token_id": 1, "eos_token_id": 2}


def _on_tokens(model: nn.Module) -> Built:
    tokens = torch.randint(3, 96, (2, 12))
    return model, lambda m: m(input_ids=tokens).logits.square().mean()


def llama(layers: int = 2) -> Built:
    config = hf.LlamaConfig(
        **TOKENS,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return _on_tokens(hf.LlamaForCausalLM(config))


def gpt2(layers: int = 2) -> Built:
    config = hf.GPT2Config(
        **TOKENS,
        n_embd=32,
        n_layer=layers,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _on_tokens(hf.GPT2LMHeadModel(config))


def bert() -> Built:
    """With dropout on; attention written out, so that its dropout is the functional one."""
    config = hf.BertConfig(
        **{k: v for k, v in TOKENS.items() if k != "use_cache"},
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    return _on_tokens(hf.BertForMaskedLM(config))


def vit() -> Built:
    config = hf.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=10,
    )
    pixels = torch.randn(2, 3, 32, 32)

    def run(model: Any) -> Tensor:
        images = pixels.to(next(model.parameters()).dtype)
        return model(pixel_values=images).logits.square().mean()

    return hf.ViTForImageClassification(config), run


def t5() -> Built:
    config = hf.T5Config(
        **TOKENS,
        d_model=32,
        d_ff=64,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    tokens = torch.randint(3, 96, (2, 12))
    model = hf.T5ForConditionalGeneration(config)
    return model, lambda m: m(input_ids=tokens, decoder_input_ids=tokens).logits.square().mean()


def mixtral() -> Built:
    config = hf.MixtralConfig(
        **TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        experts_implementation="eager",  # torch's grouped matmul has no float64
    )
    return _on_tokens(hf.MixtralForCausalLM(config))


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit, "t5": t5, "mixtral": mixtral}
