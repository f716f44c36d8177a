"""The dump as one HTML file, which needs no network, server or other file.

`page.html` is the template; its script renders the data that is inserted in one place.
Listings are embedded compressed, and unpacked when they are shown. Names and source
lines are arbitrary text: they are embedded as data and become text nodes, never markup.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_suffix(".html")
PLACEHOLDER = "@DATA@"
MARKUP = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&"})  # as in `</script>`, `<!--`


def page(record: dict[str, Any], texts: dict[str, str]) -> str:
    """The HTML document of a dump: `record` is dump.json, `texts` its files by name."""
    data = {
        "record": _finite(record),
        "texts": {name: _packed(text) for name, text in texts.items()},
    }
    head, tail = TEMPLATE.read_text(encoding="utf-8").split(PLACEHOLDER)
    return f"{head}{_embedded(data)}{tail}"


def _packed(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode(errors="replace"), 9)).decode()


def _embedded(data: dict[str, Any]) -> str:
    """JSON that is safe within a script element: no markup, and ASCII only."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.translate(MARKUP)


def _finite(value: Any) -> Any:
    """The same data, with None for infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
