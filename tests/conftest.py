"""A fresh compile cache for the whole run, fresh compiles for each test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

# Before torch reads it: a cache left over from another run would hide that a pass ran.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="memrewrite-tests-")

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "dev",
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking recompiles hundreds of times
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("nightly", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
torch.set_num_threads(1)  # the suite runs in two processes on two cores


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
