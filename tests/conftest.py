"""A fresh compile cache for the whole run, fresh compiles for each test."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch reads it: a cache left over from another run would hide that a pass ran.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="memrewrite-tests-")

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from memrewrite.bench.tasks.text import stdlib_ids
from memrewrite.session.session import _sessions

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


def pytest_collection_finish() -> None:
    _settle(0)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    before = len(_sessions)
    yield
    torch._dynamo.reset()
    if len(_sessions) > before:  # a model left behind would be asked after at others' steps
        _settle(before)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the standard library's text, tokenised once for all processes of the run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "text"
    stdlib_ids(folder, 300)
    return folder


def _settle(models: int) -> None:
    """What is alive by now stays (modules, caches): no later collection looks at it again."""
    gc.collect()
    if len(_sessions) <= models:
        gc.freeze()
