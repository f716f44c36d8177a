"""The optimizer's rows of `report`: what each parameter's state takes, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tabulate import tabulate
from torch import Tensor, nn

from memrewrite.optimizer import attachments
from memrewrite.projection import Selection, Site, projected_numbers, sites_of
from memrewrite.state import Session
from memrewrite.target import Target

NOT_ATTACHED = (
    "not attached yet: no optimizer has stepped {} of the projected weights; their bytes are "
    "predicted"
)


@dataclass(frozen=True)
class OptimizerRow:
    """One trained parameter. Bytes are of exp_avg, exp_avg_sq (and its maximum), and P."""

    name: str
    shape: tuple[int, ...]
    decision: Literal["projected", "plain"]
    reason: str  # of a plain one
    side: str  # "left" or "right" of a projected one
    rank: int | None
    bytes_before: int  # stock Adam's
    bytes_after: int
    last_refresh: int | None  # the step, from 1
    energy: float | None  # |P^T G|^2 / |G|^2 at that refresh
    failed_refreshes: int


def optimizer_rows(session: Session, model: nn.Module) -> tuple[tuple[OptimizerRow, ...], str]:
    """(rows, status): nothing where the model is compiled without GaLore."""
    if session.galore is None:
        return (), ""
    selection = sites_of(model, session.galore)
    served = _served(session)
    rows = (
        *(_projected(site, served) for site in selection.projected),
        *_plain(model, selection, served),
    )
    before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
    status = f"optimizer state: {before:,} bytes by stock Adam, {after:,} by memrewrite"
    if before:
        status += f" ({after / before:.2f} x)"
    failures = sum(row.failed_refreshes for row in rows)
    if failures:
        status += f"; {failures} refreshes of a projector failed and kept the old one"
    waiting = [
        site
        for site in selection.projected
        if not served.get(id(site.candidate.parameter), NOBODY).state
    ]
    return rows, f"{status}\n{NOT_ATTACHED.format(len(waiting))}" if waiting else status


@dataclass(frozen=True)
class _Served:
    """A parameter in the hands of an optimizer."""

    target: Target | None
    state: dict[str, Any]
    moments: int  # that stock Adam would keep


NOBODY = _Served(None, {}, 2)


def _served(session: Session) -> dict[int, _Served]:
    return {
        id(parameter): _Served(
            attachment.targets.get(id(parameter)),
            optimizer.state.get(parameter, {}),
            3 if group["amsgrad"] else 2,
        )
        for optimizer, attachment in attachments(session)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _held(state: dict[str, Any]) -> int:
    return sum(v.nbytes for v in state.values() if isinstance(v, Tensor) and v.ndim)


def _projected(site: Site, served: dict[int, _Served]) -> OptimizerRow:
    parameter, shape = site.candidate.parameter, site.candidate.shape
    mine = served.get(id(parameter), NOBODY)
    predicted = projected_numbers(shape, site.rank, site.left, mine.moments)
    return OptimizerRow(
        site.candidate.name,
        shape,
        "projected",
        "",
        "left" if site.left else "right",
        site.rank,
        mine.moments * parameter.nbytes,
        _held(mine.state) or predicted * parameter.element_size(),
        mine.target.refreshed if mine.target else None,
        mine.target.energy if mine.target else None,
        mine.target.failures if mine.target else 0,
    )


def _plain(
    model: nn.Module, selection: Selection, served: dict[int, _Served]
) -> list[OptimizerRow]:
    projected = {id(site.candidate.parameter) for site in selection.projected}
    known = {id(c.parameter): (c.name, reason) for c, reason in selection.plain}
    rows = []
    for path, parameter in model.named_parameters():
        if id(parameter) not in projected and parameter.requires_grad:
            name, reason = known.get(id(parameter), (path, "fewer than two dimensions"))
            mine = served.get(id(parameter), NOBODY)
            size, shape = mine.moments * parameter.nbytes, tuple(parameter.shape)
            held = _held(mine.state) or size
            row = OptimizerRow(name, shape, "plain", reason, "", None, size, held, None, None, 0)
            rows.append(row)
    return rows


def table(rows: tuple[OptimizerRow, ...]) -> str:
    """The rows as text; parameters of fewer than two dimensions in one line."""
    matrices = [row for row in rows if len(row.shape) > 1]
    header = [
        *("parameter", "shape", "decision", "side", "rank", "state before", "state after"),
        *("last refresh", "energy", "reason"),
    ]
    lines = [
        (
            row.name,
            "x".join(map(str, row.shape)),
            row.decision,
            row.side,
            row.rank,
            row.bytes_before,
            row.bytes_after,
            row.last_refresh,
            None if row.energy is None else f"{row.energy:.3f}",
            row.reason,
        )
        for row in matrices
    ]
    small = [row for row in rows if len(row.shape) < 2]
    if small:
        size = sum(row.bytes_after for row in small)
        name = f"{len(small)} vectors and scalars"
        lines.append((name, "", "plain", "", None, size, size, None, None, "fewer than 2-D"))
    return tabulate(lines, header, tablefmt="simple", intfmt=",", missingval="")
