"""torch's own ways to chunk a loss, as configurations `memrewrite.bench.rivals:NAME`.

All change what the model returns: the loss alone. torch's auto_chunker declines where logits are
an output, and who calls F.linear_cross_entropy has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memrewrite.compiler.backend import set_torch


def linear_cross_entropy(model: Any) -> None:
    """A causal language model of Hugging Face, rewritten by hand to use torch's chunked loss."""
    chunked: Any = F.linear_cross_entropy
    options: Any = torch.nn.LinearCrossEntropyOptions()

    def forward(input_ids: Tensor, labels: Tensor) -> Tensor:
        h = model.base_model(input_ids)[0][:, :-1].flatten(0, 1)  # (N, D)
        y = labels[:, 1:].flatten()
        weight = model.get_output_embeddings().weight
        return chunked(h, weight, y, options=options)  # type: ignore[no-any-return]

    model.forward = forward
    model.compile()


def auto_chunker(model: Any) -> None:
    """torch.compile with Inductor's auto_chunker in 8 chunks, of a model that returns its loss."""
    set_torch({}, {"auto_chunker.enable": True, "auto_chunker.num_chunk": 8})
    set_torch({}, {"auto_chunker.amplify_ratio_threshold": 1})
    _returning_the_loss_alone(model)


def loss_alone(model: Any) -> None:
    """torch.compile of a model that returns its loss alone."""
    _returning_the_loss_alone(model)


def _returning_the_loss_alone(model: Any) -> None:
    whole = model.forward

    def forward(**inputs: Any) -> Tensor:
        return whole(**inputs).loss  # type: ignore[no-any-return]

    model.forward = forward
    model.compile()
