"""Read and write the moments of an update in a storage format.   [approximate]

    before                                  after
    m --> ops --> m'                        s... --> read --> m --> ops --> m' --> write --> s'...
    copy_(m, m')                            copy_(s, s') for each s

Identity: none; a moment is rounded to the format once per step. Between `read` and `write` the
update is unchanged, in its compute dtype. Source: design.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.base import Pass, arguments, aten
from passes.emit import emit


@dataclass(frozen=True)
class Form:
    """How one moment is stored.

    read(*stored, shape=, dtype=): the moment. write(moment): the tensors to store, one or several.
    """

    name: str
    read: Callable[..., Tensor]
    write: Callable[..., Any]


def store_moments(
    forms: Mapping[int, Form], dtype: torch.dtype, key: tuple[Hashable, ...] = ()
) -> Pass:
    """Read and write each moment in its form: argument of the moment -> form.

    dtype: what the update computes in. A form of several tensors adds arguments after the moment's.
    Raises TypeError where `read` or `write` returns another shape or dtype.
    """

    def rewrite(gm: GraphModule) -> None:
        place = arguments(gm.graph)
        for argument, form in forms.items():
            if "stored" not in place[argument].meta:
                _store(place[argument], form, dtype)

    identity = "m = read(s), then s' = write(m')"
    return Pass("store_moments", rewrite, exact=False, key=key, identity=identity)


def _store(moment: Node, form: Form, dtype: torch.dtype) -> None:
    shape = tuple(moment.meta["val"].shape)
    users = list(moment.users)
    stored = _placeholders(moment, form, dtype)
    read = emit(stored, form.name, lambda *t: form.read(*t, shape=shape, dtype=dtype))
    (whole,) = read
    if tuple(whole.meta["val"].shape) != shape or whole.meta["val"].dtype != dtype:
        raise TypeError(f"{form.name}.read returned {whole.meta['val']}, not {dtype}{list(shape)}")
    for user in users:
        if user.target is aten.copy_.default and user.args[0] is moment:
            _write(user, stored, form)
        else:
            user.replace_input_with(moment, whole)


def _placeholders(moment: Node, form: Form, dtype: torch.dtype) -> list[Node]:
    """The placeholder of the moment, with its new shape, and one more per further tensor."""
    value = moment.meta["val"]
    with value.fake_mode:
        written = form.write(value.to(dtype))
    parts = written if isinstance(written, tuple) else (written,)
    found, graph = [moment], moment.graph
    for _ in parts[1:]:
        with graph.inserting_after(found[-1]):
            found.append(graph.placeholder(f"{moment.name}_part"))
    for node, part in zip(found, parts, strict=True):
        with value.fake_mode:
            node.meta["val"] = torch.empty(part.shape, dtype=part.dtype)
        node.meta["stored"] = form.name
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        node.meta["argument"] = position
    return found


def _write(copy: Node, stored: list[Node], form: Form) -> None:
    graph, value = copy.graph, copy.args[1]
    assert isinstance(value, Node)
    parts = emit([value], form.name, form.write)
    found = [(str(n.meta["val"].shape), n.meta["val"].dtype) for n in parts]
    expected = [(str(n.meta["val"].shape), n.meta["val"].dtype) for n in stored]
    if found != expected:
        raise TypeError(f"{form.name}.write returned {found}, where {expected} are stored")
    for target, part in zip(stored, parts, strict=True):
        with graph.inserting_before(copy):
            written = graph.call_function(aten.copy_.default, (target, part))
        written.meta["val"] = target.meta["val"]
    graph.erase_node(copy)
