"""Hugging Face's Trainer over a model whose loss runs in chunks: the same losses and metrics."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import memrewrite

VOCABULARY = 97


def model() -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return hf.LlamaForCausalLM(config).train()


def examples(count: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(1, VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in ids]


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions == found.label_ids).mean())}


class WithConfidence(hf.Trainer):
    """Reads the logits in every step, as a trainer that logs entropy does."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any
    ) -> Any:
        loss, out = super().compute_loss(model, inputs, return_outputs=True, **rest)
        self.log({"confidence": out.logits.detach().softmax(-1).max().item()})
        return (loss, out) if return_outputs else loss


def trained(net: nn.Module, folder: Path, kind: type[hf.Trainer], **how: Any) -> list[Any]:
    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        **how,
    )
    trainer = kind(
        model=net,
        args=arguments,
        train_dataset=examples(16),
        eval_dataset=examples(4),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda z, y: z.argmax(-1),
    )
    trainer.train()
    wanted = ("loss", "grad_norm", "eval_loss", "eval_accuracy", "confidence")
    return [e[key] for e in trainer.state.log_history for key in wanted if key in e]


@pytest.mark.parametrize(
    ("kind", "smoothing"), [(hf.Trainer, 0.0), (WithConfidence, 0.0), (hf.Trainer, 0.1)]
)
def test_trainer(kind: type[hf.Trainer], smoothing: float, tmp_path: Path) -> None:
    """With label smoothing Trainer computes the loss itself, from whole logits."""
    net = memrewrite.compile(model(), loss_chunks=3, backend="aot_eager")
    with warnings.catch_warnings(record=True) as told_of:
        warnings.simplefilter("always", memrewrite.MemrewriteWarning)
        mine = trained(net, tmp_path, kind, label_smoothing_factor=smoothing)
    words = [str(w.message) for w in told_of if w.category is memrewrite.MemrewriteWarning]
    assert len(words) == bool(smoothing) and all("no cross entropy" in word for word in words)
    plain = trained(model(), tmp_path, kind, label_smoothing_factor=smoothing)
    assert len(mine) > 10
    torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
    told = str(memrewrite.report(net))
    assert ("in 3 chunks" in told) == (not smoothing)
    reads = [line for line in told.splitlines() if "logits computed whole" in line]
    assert len(reads) == (kind is WithConfidence and not smoothing)
    assert all("test_chunks_trainer.py" in line for line in reads)
