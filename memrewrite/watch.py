"""Notice that a compiled model trains without us, and say so once.

An outer torch.compile (a trainer's own flag, say) traces through an in-place compiled
module and uses its own backend: ours is then never called, and nothing would tell the
user that the memory they asked for was not saved. The first optimizer step after
`compile` is the first moment at which that is certain.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from memrewrite.errors import MemrewriteWarning

if TYPE_CHECKING:
    from memrewrite.state import Session

_waiting: list[weakref.ref[Session]] = []
_handle: RemovableHandle | None = None


def watch(session: Session) -> None:
    """Check this session at the first optimizer step that moves its model's parameters."""
    global _handle
    _waiting.append(weakref.ref(session))
    if _handle is None:
        _handle = register_optimizer_step_post_hook(_after_step)


def unwatch(session: Session) -> None:
    """Ask no more of a session: its model runs eagerly again."""
    _waiting[:] = [reference for reference in _waiting if reference() is not session]


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    global _handle
    stepped = {id(p) for g in optimizer.param_groups for p in g["params"] if p.grad is not None}
    for reference in list(_waiting):
        session = reference()
        model = session.model() if session is not None else None
        if session is None or model is None:
            _waiting.remove(reference)
        elif any(id(p) in stepped for p in model.parameters()):
            _waiting.remove(reference)
            if not session.called:
                _complain(type(model).__name__)
    if not _waiting and _handle is not None:
        _handle.remove()
        _handle = None


def _complain(name: str) -> None:
    import warnings

    warnings.warn(
        f"{name} took an optimizer step, but memrewrite's passes never ran on it: an outer "
        "torch.compile (or a trainer's torch_compile flag) took over, compilation is disabled, "
        "or what was called is not this module but one inside it, as DDP does. Turn the outer "
        "compile off, or call memrewrite.compile on the module that is called. GaLore, which "
        "works in the optimizer, is not affected",
        MemrewriteWarning,
        stacklevel=4,
    )
