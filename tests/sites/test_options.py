"""Options are checked where they are written."""

from __future__ import annotations

from typing import Any

import pytest

from memrewrite import GaLore


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"rank": 0}, ValueError, "below 1"),
        ({"rank": -4}, ValueError, "below 1"),
        ({"rank": 2.0}, TypeError, "must be an int"),
        ({"rank": True}, TypeError, "must be an int"),
        ({"rank": 2, "update_every": 0}, ValueError, "below 1"),
        ({"rank": 2, "scale": float("inf")}, ValueError, "not finite"),
        ({"rank": 2, "side": "std"}, ValueError, "'short', 'long'"),
        ({"rank": 2, "refresh": "qr"}, ValueError, "'randomized', 'svd'"),
        ({"rank": 2, "moments": "reset"}, ValueError, "'keep', 'rotate'"),
        ({"rank": 2, "sites": "mlp"}, ValueError, r"sites=\['mlp'\]"),
        ({"rank": 2, "stagger": 1}, TypeError, "True or False"),
    ],
)
def test_options_are_checked_where_they_are_written(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        GaLore(**arguments)
