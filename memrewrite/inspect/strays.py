"""Warn of models that train without the rewrite: copies, unpickled models, bypassed calls.

A copy of a compiled model is an eager model, and an outer torch.compile (such as a trainer's
flag) traces through a compiled one with its own backend. Only an optimizer's step shows that
such a model is trained, and not only evaluated, as an average of weights is. So every step
checks, at the cost of comparing a few counters:

    a compiled model whose parameters step without a counted call    its call is bypassed
    parameters of a copy, which was registered when it was made      the copy is not compiled
    a marked parameter that belongs to no compiled model             unpickled, or taken out
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from memrewrite.errors import warn
from memrewrite.optim.full_gradients import uncompiled
from memrewrite.session.session import Session

MARK = "_memrewrite"  # key in the __dict__ of a model and of a parameter
COMPILED = "compiled"
QUIET = 3  # consecutive steps without a call before a model that had calls is reported
_followed: list[weakref.ref[Session]] = []
_copies: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_changes = [0]  # number of models compiled, restored and copied so far
_installed: list[Any] = []


class Origin:
    """In a compiled model's __dict__: it registers deep copies, and is pickled as a string."""

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        model = self.model()
        copied = memo.get(id(model))  # created before its contents are copied
        if model is None or not isinstance(copied, nn.Module):
            return COMPILED
        _copies.add(copied)
        _changes[0] += 1
        return Origin(copied)

    def __reduce__(self) -> Any:
        return str, (COMPILED,)


@dataclass
class _Stepped:
    """A compiled model and one optimizer that steps its parameters."""

    session: weakref.ref[Session]
    calls: int = 0  # its number of calls at the last step
    quiet: int = 0  # steps since then


@dataclass
class _Known:
    """What an optimizer steps, by its parameters; computed once."""

    key: tuple[int, int]
    ours: list[_Stepped] = field(default_factory=list)
    copies: list[weakref.ref[nn.Module]] = field(default_factory=list)
    marked: list[nn.Parameter] = field(default_factory=list)  # of no known model


_known: weakref.WeakKeyDictionary[Optimizer, _Known] = weakref.WeakKeyDictionary()


def follow(session: Session, model: nn.Module) -> None:
    """Watch a model that has just been compiled, and its copies."""
    _followed.append(weakref.ref(session))
    _changes[0] += 1
    _copies.discard(model)
    model.__dict__[MARK] = Origin(model)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    for parameter in (trained or parameters)[:1]:  # pickled by torch.save, but not in a state_dict
        parameter.__dict__[MARK] = COMPILED
    if not _installed:
        _installed.append(register_optimizer_step_post_hook(uncompiled(_after_step)))


def forget(session: Session, model: nn.Module) -> None:
    """Stop watching a session, whose model runs eagerly again."""
    _followed[:] = [reference for reference in _followed if reference() not in (session, None)]
    _changes[0] += 1
    model.__dict__.pop(MARK, None)
    for parameter in model.parameters():
        parameter.__dict__.pop(MARK, None)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    known = _known.get(optimizer)
    if known is None or known.key != (_changes[0], count):
        known = _known[optimizer] = _look(optimizer, (_changes[0], count), known)
    for stepped in known.ours:
        session = stepped.session()
        if session is None:
            continue
        if session.calls.total != stepped.calls:
            stepped.calls, stepped.quiet = session.calls.total, 0
        else:
            _went_around(stepped, session)
    if known.copies and _moved(p for group in optimizer.param_groups for p in group["params"]):
        _copied(known)
    if known.marked and _moved(known.marked):
        _unknown(known)


def _look(optimizer: Optimizer, key: tuple[int, int], before: _Known | None) -> _Known:
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    known, claimed = _Known(key), set[Tensor]()
    old = {stepped.session(): stepped for stepped in before.ours} if before else {}
    for session in [s for s in (reference() for reference in _followed) if s is not None]:
        model = session.model()
        own = set(model.parameters()) if model is not None else set()
        claimed |= own
        if not own.isdisjoint(mine):
            known.ours.append(old.get(session) or _Stepped(weakref.ref(session)))
    for copied in _copies:
        own = set(copied.parameters()) - claimed
        claimed |= own
        if not own.isdisjoint(mine):
            known.copies.append(weakref.ref(copied))
    known.marked = [p for p in mine if p not in claimed and MARK in p.__dict__]
    return known


def _went_around(stepped: _Stepped, session: Session) -> None:
    model = session.model()
    compiled = session.calls.called and not session.calls.total  # graphs run, but not by its call
    if model is None or compiled or "bypassed" in session.calls.warned:
        return
    if not _moved(model.parameters()):
        return
    stepped.quiet += 1
    if session.calls.total and stepped.quiet < QUIET:
        return  # two optimizers may step after one call
    session.calls.warned.add("bypassed")
    name = type(model).__name__
    if not session.calls.total:
        what = f"{name} took an optimizer step, but memrewrite's passes never ran on it"
    else:
        what = f"{QUIET} optimizer steps moved {name} without a training call of it"
    warn(
        f"{what}: an outer torch.compile (or a trainer's torch_compile flag) took over, or what is "
        "called is not this module but a shallow copy of it, or one inside it, as DDP does. Turn "
        "the outer compile off, or call memrewrite.compile on the module that is called. GaLore "
        "with full gradients, which works only in the optimizer, is not affected"
    )


def _copied(known: _Known) -> None:
    names = sorted({type(m).__name__ for m in (r() for r in known.copies) if m is not None})
    known.copies.clear()
    if names:
        warn(
            f"an optimizer trains a copy of a model ({', '.join(names)}) that memrewrite compiled: "
            "a copy is an eager model, so nothing of it is rewritten. Compile it as well, "
            "memrewrite.compile(copy, ...), before its first step"
        )


def _unknown(known: _Known) -> None:
    shapes = ", ".join(str(tuple(p.shape)) for p in known.marked[:3])
    known.marked.clear()
    warn(
        f"an optimizer trains parameters (one of shape {shapes}) of a model that was compiled by "
        "memrewrite when it was saved, or that they were taken out of: they are an eager model's "
        "now, so nothing is rewritten. Compile what you loaded, memrewrite.compile(model, ...)"
    )


def _moved(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any gradient is not zero: checkpointing tools step on zeros to create state."""
    return any(_nonzero(p.grad) for p in parameters if p.grad is not None)


def _nonzero(gradient: Tensor) -> bool:
    local: Any = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    values: Tensor = local.coalesce().values() if local.is_sparse else local
    return bool((values != 0).any())
