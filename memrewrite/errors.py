"""What memrewrite raises and warns."""

from __future__ import annotations

import warnings


class UnsupportedError(RuntimeError):
    """The request is well formed, but this version cannot honour it."""


class MemrewriteWarning(UserWarning):
    """Training stays correct, but something that was asked for did not happen."""


def warn(message: str) -> None:
    """A MemrewriteWarning, at the caller's caller."""
    warnings.warn(message, MemrewriteWarning, stacklevel=3)
