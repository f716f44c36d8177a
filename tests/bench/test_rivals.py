"""torch's own chunked losses in the bench compute the loss of the model that they rewrite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from memrewrite.bench import rivals
from memrewrite.predict import models


@pytest.mark.parametrize("rival", [rivals.linear_cross_entropy, rivals.loss_alone])
def test_the_same_loss_and_gradients(rival: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    model: Any = models.from_config("llama-tiny", 100, 1, "cpu")
    ids = torch.randint(100, (2, 8))
    want = model(input_ids=ids, labels=ids).loss
    want.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    rival(model)
    with torch.compiler.set_stance("force_eager"):
        loss = model(input_ids=ids, labels=ids)
    loss.backward()
    torch.testing.assert_close(loss, want)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])
