"""MEMREWRITE_DUMP=DIR: dump every compiled model of a program, without a change to its code.

A dump is written when a graph is compiled, when an optimizer update is built, and at the
end of the program, so that a program that fails also leaves dumps. Models are numbered:
DIR/0-LlamaForCausalLM; under torchrun DIR/rank1/0-LlamaForCausalLM. Errors here are logged, and
never raised.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import time
import weakref
from pathlib import Path

from memrewrite.inspect.dump import dump_session
from memrewrite.session.session import Session

VARIABLE = "MEMREWRITE_DUMP"
PAUSE = 10  # wait this many times the last dump's duration, as a model may have many graphs
log = logging.getLogger(__name__)
_places: weakref.WeakKeyDictionary[Session, Path] = weakref.WeakKeyDictionary()
_next: weakref.WeakKeyDictionary[Session, float] = weakref.WeakKeyDictionary()
_owed: weakref.WeakSet[Session] = weakref.WeakSet()
_numbers = itertools.count()


def follow(session: Session) -> None:
    """Dump this session whenever it changes, if the environment variable is set."""
    directory = os.environ.get(VARIABLE)
    model = session.model()
    if not directory or model is None:
        return
    if not _places:
        atexit.register(write_all)
    rank = os.environ.get("RANK")
    folder = Path(directory) / f"rank{rank}" if rank else Path(directory)
    _places[session] = folder / f"{next(_numbers)}-{type(model).__name__}"
    session.on_change = _changed


def write_all() -> None:
    """Write the dumps of all models that have changed since their last one."""
    for session in list(_owed):
        _write(session)


def _changed(session: Session, complete: bool) -> None:
    _owed.add(session)
    if complete or time.monotonic() >= _next.get(session, 0.0):
        _write(session)


def _write(session: Session) -> None:
    model = session.model()
    if model is None or not session.graphs:
        return
    start = time.monotonic()
    try:
        place = _places[session]
        place.parent.mkdir(parents=True, exist_ok=True)
        dump_session(session, model, place)
    except Exception as error:
        log.warning("no dump of %s: %s: %s", type(model).__name__, type(error).__name__, error)
    now = time.monotonic()
    _owed.discard(session)
    _next[session] = now + PAUSE * (now - start)
