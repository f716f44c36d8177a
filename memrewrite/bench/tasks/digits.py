"""scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels that its package ships."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

CLASSES = 10
TRAINED = 200  # labelled images; the others are held out
PIXEL = 16.0  # the highest value
SPLIT_SEED = 0


def digits() -> tuple[dict[str, Tensor], int]:
    """Images (N, 1, 8, 8) from 0 to 1 and labels (N,); how many are for training.

    Raises ImportError, naming the extra, where scikit-learn is missing.
    """
    images, labels = read()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return {"pixel_values": images[order], "labels": labels[order]}, TRAINED


def rotated(images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Images (B, 1, 8, 8), each turned by a random quarter, and the number of quarters (B,)."""
    turns = torch.randint(4, (len(images),), generator=generator)
    turned = [image.rot90(int(k), (1, 2)) for image, k in zip(images, turns, strict=True)]
    return {"pixel_values": torch.stack(turned), "labels": turns}


def read() -> tuple[Tensor, Tensor]:
    """All images (N, 1, 8, 8) and labels (N,), in the order of the package."""
    try:
        datasets: Any = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'memrewrite[pretrained]'") from error
    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / PIXEL
    return images.unsqueeze(1), torch.tensor(found.target, dtype=torch.int64)
