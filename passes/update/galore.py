"""GaLore: run Adam on the projection of a gradient, and project its step back.   [approximate]

    before                                     after
    W, G, m, v  (O, D)                         G --> project(P) --> R   (r, D) or (O, r)
      '--> _fused_adamw_(W, G, m, v)           Z = 0; m, v of R's shape
                                                 '--> _fused_adamw_(Z, R, m, v)   no decay
                                               W <- (1 - lr wd) W + scale project_back(Z, P)

With P of r orthonormal columns, (O, r) from the left or (D, r) from the right:

    left   R = P^T G    W <- W + scale P Z
    right  R = G P      W <- W + scale Z P^T

Where backward returns R itself (`passes.joint.push`), R is used unchanged, and an L2 decay
adds the projection of W, which is the same sum.

Identity: none, the step lies in the span of P. At r = min(O, D) and scale = 1 it is Adam
in rotated coordinates. Decoupled decay acts on W, as AdamW's; L2 decay and maximize act
on the full gradient, before the projection, as in torch's Adam. Parameters that are not
selected keep their fused node. A 4-D weight is read as (O, D h w).
Source: Zhao et al. 2024, arXiv:2403.03507, algorithm 2; reference galore_torch/adamw.py,
which applies the decay after the step and scales the update inside project_back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from passes.base import Pass, arguments, aten, insert, widened
from passes.ops import galore_project, galore_project_back

FUSED = (aten._fused_adam_.default, aten._fused_adamw_.default)
DECOUPLED = aten._fused_adamw_.default


@dataclass(frozen=True)
class Projection:
    """How one parameter is projected."""

    projector: int  # the argument that holds its P
    left: bool
    scale: float
    given: bool = False  # True: the gradient is R already, see `passes.joint.push`


def project_updates(projections: Mapping[int, Projection]) -> Pass:
    """Project the update of each parameter in `projections`: argument of W -> its projection."""

    def rewrite(gm: GraphModule) -> None:
        place = arguments(gm.graph)
        for fused in [n for t in FUSED for n in gm.graph.find_nodes(op="call_function", target=t)]:
            _split(fused, projections, place)

    key = tuple(sorted(projections.items(), key=lambda pair: pair[0]))
    identity = "Adam on R = P^T G (or G P), then W += scale P Z (or Z P^T)"
    return Pass("project_updates", rewrite, exact=False, key=key, identity=identity)


def _split(fused: Node, projections: Mapping[int, Projection], place: dict[int, Node]) -> None:
    """Move each selected parameter out of a fused node into a separate fused node."""
    columns: list[list[Node]] = [list(column) for column in fused.args]  # type: ignore[arg-type]
    selected = [i for i, w in enumerate(columns[0]) if w.meta.get("argument") in projections]
    for i in selected:
        how = projections[columns[0][i].meta["argument"]]
        _project(fused, [column[i : i + 1] for column in columns], place[how.projector], how)
    kept = [[n for i, n in enumerate(column) if i not in selected] for column in columns]
    if not kept[0]:
        fused.graph.erase_node(fused)
    elif selected:
        fused.args = tuple(kept)


def _project(fused: Node, columns: list[list[Node]], p: Node, how: Projection) -> None:
    (w,), (g,), *moments, steps = columns
    settings: dict[str, Any] = dict(fused.kwargs)
    decay, decoupled = settings["weight_decay"], fused.target is DECOUPLED
    if how.given:
        shape = (p.meta["val"].shape[1], w.meta["val"].shape[1])  # (r, D)
        shape = shape if how.left else (w.meta["val"].shape[0], shape[0])  # (O, r)
        g.meta["val"] = g.meta["val"].new_empty(shape)
    if settings["maximize"]:
        g = insert(fused, aten.neg.default, g)
    if decay != 0.0 and not decoupled:
        small = insert(fused, galore_project, w, p, how.left) if how.given else w
        g = insert(fused, aten.add.Tensor, g, insert(fused, aten.mul.Tensor, small, decay))
    if g.meta["val"].ndim > 2:
        g = insert(fused, aten.flatten.using_ints, g, 1)  # (O, D h w)
    r = g if how.given else insert(fused, galore_project, g, p, how.left)
    z = insert(fused, aten.zeros_like.default, r)
    for moment in (n for column in moments for n in column):
        moment.meta["val"] = z.meta["val"]
    settings |= {"maximize": False, "weight_decay": 0.0}
    with fused.graph.inserting_before(fused):
        target: Any = fused.target
        small = fused.graph.call_function(target, ([z], [r], *moments, steps), settings)
    small.meta["val"] = None  # it only writes
    step = insert(fused, galore_project_back, z, p, how.left)  # (O, D)
    if w.meta["val"].ndim > 2:
        step = insert(fused, aten.view.default, step, list(w.meta["val"].shape))
    kept = widened(fused, w)
    if decay != 0.0 and decoupled:
        kept = insert(fused, aten.mul.Tensor, kept, _shrink(fused, settings["lr"], decay))
    moved = insert(fused, aten.add.Tensor, kept, widened(fused, step), alpha=how.scale)
    insert(fused, aten.copy_.default, w, moved)


def _shrink(fused: Node, lr: Any, decay: Any) -> Any:
    """1 - lr wd, of floats or of 0-d inputs."""
    if not isinstance(lr, Node) and not isinstance(decay, Node):
        return 1 - lr * decay
    return insert(fused, aten.rsub.Scalar, insert(fused, aten.mul.Tensor, lr, decay), 1)
