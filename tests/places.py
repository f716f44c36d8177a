"""Where the tests and the sources are, whichever folder a test is in."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
