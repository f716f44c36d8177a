"""Log the decisions of a compile: TORCH_LOGS="+memrewrite", and artifacts for tlparse."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import pairwise

from torch._logging._internal import trace_structured

from memrewrite.record.decision import GraphRecord
from memrewrite.record.listing import difference

log = logging.getLogger(__name__)


def log_decisions(record: GraphRecord, names: Mapping[int, str]) -> None:
    """Log the decisions of one compile, and write them to the structured trace."""
    if record.inference:
        log.debug("an inference graph: nothing to rewrite")
        return
    for line in _decisions(record, names):
        log.info(line)
    for step in record.passes:
        log.debug(
            "pass %s: %d nodes inserted, %d removed, %.3f s",
            *(step[key] for key in ("name", "inserted", "removed", "seconds")),
        )
    _artifact("memrewrite_decisions", "json", lambda: json.dumps(_facts(record, names)))
    for (before, _), (name, _) in pairwise(record.stages):
        if name not in ("forward", "backward"):
            _artifact(f"memrewrite_{name}_diff", "string", partial(_diff, record, before, name))


def _diff(record: GraphRecord, before: str, after: str) -> str:
    texts = dict(record.listings())
    return difference(texts[before], texts[after], (before, after))


def _decisions(record: GraphRecord, names: Mapping[int, str]) -> Iterator[str]:
    for entry in record.inputs:
        compressed = ", ".join(names.get(w, "?") for w in entry.weights)
        exact = ", ".join(names.get(w, "?") for w in entry.exact_weights)
        kept = f"{entry.before} bytes kept before, {entry.after} after"
        if compressed:
            yield f"compressed: {compressed} ({entry.outcome}; {kept})"
        if exact:
            yield f"exact: {exact} ({entry.outcome}; {kept})"
    for weight, reason in record.refused.items():
        if weight in names:
            yield f"not recognised: {names[weight]}: {reason}"
    if record.failure:
        yield f"the rewrite was undone: {record.failure}"
    yield f"saved for backward: {record.kept_before} bytes before, {record.kept_after} after"


def _facts(record: GraphRecord, names: Mapping[int, str]) -> dict[str, object]:
    return {
        "weights": {str(k): v for k, v in names.items()},
        "inputs": [asdict(entry) for entry in record.inputs],
        "kept_before": record.kept_before,
        "kept_after": record.kept_after,
        "failure": record.failure,
        "passes": record.passes,
    }


def _artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Write to the structured trace, if there is one; else `payload` is not called."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
    )
