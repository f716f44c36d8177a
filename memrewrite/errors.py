"""The errors and warnings of memrewrite."""

from __future__ import annotations

import warnings


class UnsupportedError(RuntimeError):
    """The request is well formed, but this version does not support it."""


class MemrewriteWarning(UserWarning):
    """Training stays correct, but something that was requested did not happen."""


def warn(message: str) -> None:
    """Give a MemrewriteWarning, located at the caller's caller."""
    warnings.warn(message, MemrewriteWarning, stacklevel=3)
