"""Pretrain a small ViT without labels: which way up is a digit?

    python examples/pretrain_digits.py            # a few minutes; writes out/digits-vit
    memrewrite bench train --pretrained out/digits-vit --task digits

Every image of scikit-learn's digits is turned by a random number of quarters, and the model tells
how many (Gidaris et al. 2018, arXiv:1803.07728). The labels are not read. What is written is the
model without its head, so that fine-tuning to the ten digits starts with a new one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from memrewrite.bench.tasks.digits import read, rotated

# Images of 8 x 8 in patches of 2 x 2: 17 tokens. Every width holds sub-tokens of 8, 16 and 32.
SHAPE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HELD_OUT = 200  # images, for the accuracy of the pretext task


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("out/digits-vit"))
    given = parser.parse_args()
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8, patch_size=2, num_channels=1, num_attention_heads=4, num_labels=4,
            **SHAPE, **DROPOUT,
        )
    )  # fmt: skip
    model.train()
    images, _ = read()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, given.lr, total_steps=given.steps)
    for step in range(given.steps):
        chosen = torch.randint(HELD_OUT, len(images), (given.batch,), generator=generator)
        loss = model(**rotated(images[chosen], generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(f"turns told right, of images held out: {accuracy(model, images[:HELD_OUT]):.1%}")
    model.vit.save_pretrained(given.output)
    print(f"written: {given.output}")
    return 0


def accuracy(model: ViTForImageClassification, images: Tensor) -> float:
    """The share of images whose turn is told right."""
    model.eval()
    with torch.no_grad():
        batch = rotated(images, torch.Generator().manual_seed(1))
        found = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
    return float((found == batch["labels"]).float().mean())


if __name__ == "__main__":
    sys.exit(main())
