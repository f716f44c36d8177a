"""Meters find what is known, and read the device that is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from places import ROOT

from memrewrite.bench.run import meters

ALLOCATE = """
import torch
from memrewrite.bench.run.meters import meter, unique_bytes
reading = meter("cpu")
torch.ones(1000).sum()
for megabytes in (100, 400):
    before = reading.settle()
    held = torch.ones(megabytes * 250_000)
    taken = reading.peak() - before
    assert abs(taken / (megabytes * 1e6) - 1) < 0.02, (megabytes, taken)
    del held
    reading.reset()
    assert reading.peak() - before < 2e6
assert unique_bytes([(x := torch.ones(8)), x.view(2, 4)]) == 32
"""


@pytest.mark.slow
def test_a_known_allocation_is_measured_to_two_percent() -> None:
    environment = {**os.environ, **meters.FREE_AT_ONCE}
    subprocess.run([sys.executable, "-c", ALLOCATE], cwd=ROOT, env=environment, check=True)


def test_the_card_that_is_asked_for_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    names = ("synchronize", "memory_allocated", "max_memory_allocated", "max_memory_reserved")
    for name in (*names, "reset_peak_memory_stats", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: asked.append(device) or (1, 2))
    card = meters.meter("cuda:1")
    for read in (card.settle, card.reset, card.peak, card.reserved, card.taken, card.wait):
        read()
    assert card.available() == 1
    assert len(asked) >= 8 and set(asked) == {(torch.device("cuda:1"),)}
