"""The optimizer's rows of `report`: what each parameter's state takes, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from tabulate import tabulate
from torch import Tensor, nn

from memrewrite.gradients.packing import VECTOR
from memrewrite.optim.galore import Target
from memrewrite.optim.hook import attachments
from memrewrite.session.session import Session
from memrewrite.sites.eligible import Selection, Site, projected_numbers, sites_of

NOT_ATTACHED = (
    "not attached yet: no optimizer has stepped {} of the projected weights; their bytes are "
    "predicted"
)


@dataclass(frozen=True)
class OptimizerRow:
    """One trained parameter. Bytes are of exp_avg, exp_avg_sq (and its maximum), and P or v.

    projected: GaLore, an approximate update. factored: VeLoRA's small gradient, from which
    the update is that of stock Adam on the full one, exactly. gradient_after is what a gradient
    takes that comes in coordinates, of a projected weight between refreshes.
    """

    name: str
    shape: tuple[int, ...]
    decision: Literal["projected", "factored", "plain"]
    reason: str  # of a plain one
    side: str  # "left" or "right" of a projected one
    rank: int | None
    bytes_before: int  # stock Adam's
    bytes_after: int
    last_refresh: int | None  # the step, from 1
    energy: float | None  # |P^T G|^2 / |G|^2 at that refresh
    failed_refreshes: int
    gradient_before: int
    gradient_after: int


def optimizer_rows(session: Session, model: nn.Module) -> tuple[tuple[OptimizerRow, ...], str]:
    """(rows, status): nothing where neither gradients nor their moments are small."""
    small = {id(p): p for p in session.ported()}
    if session.galore is None and not small:
        return (), ""
    selection = sites_of(model, session.galore) if session.galore else Selection([], [])
    sites = [s for s in selection.projected if id(s.candidate.parameter) not in small]
    served, pushed = _served(session), {id(p) for p in session.pushed()}
    rows = (
        *(_factored(model, p, session, served) for p in small.values()),
        *(_projected(site, served, pushed) for site in sites),
        *_plain(model, sites, selection, served, small),
    )
    before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
    status = f"optimizer state: {before:,} bytes by stock Adam, {after:,} by memrewrite"
    if before:
        status += f" ({after / before:.2f} x)"
    full, held = sum(r.gradient_before for r in rows), sum(r.gradient_after for r in rows)
    if held < full:
        status += f"\ngradients: {full:,} bytes in full, {held:,} as they are held"
    failures = sum(row.failed_refreshes for row in rows)
    if failures:
        status += f"; {failures} refreshes of a projector failed and kept the old one"
    waiting = [site for site in sites if not served.get(id(site.candidate.parameter), NOBODY).state]
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


def _factored(
    model: nn.Module, parameter: Tensor, session: Session, served: dict[int, _Served]
) -> OptimizerRow:
    assert session.velora is not None
    name = next((n for n, p in model.named_parameters() if p is parameter), "")
    mine = served.get(id(parameter), NOBODY)
    shape = session.coordinates()[id(parameter)]
    small = math.prod(shape) * parameter.element_size()
    plain = mine.state and VECTOR not in mine.state
    reason = "its state is full-size: see the warning" if plain else ""
    return OptimizerRow(
        name.removesuffix(".weight"),
        tuple(parameter.shape),
        "plain" if plain else "factored",
        reason,
        "left" if shape[0] != parameter.shape[0] else "right",
        None,
        mine.moments * parameter.nbytes,
        _held(mine.state) or mine.moments * small,
        None,
        None,
        0,
        parameter.nbytes,
        small,
    )


def _projected(site: Site, served: dict[int, _Served], pushed: set[int]) -> OptimizerRow:
    parameter, shape = site.candidate.parameter, site.candidate.shape
    mine = served.get(id(parameter), NOBODY)
    predicted = projected_numbers(shape, site.rank, site.left, mine.moments)
    small = parameter.numel() // shape[0 if site.left else 1] * site.rank
    held = small * parameter.element_size() if id(parameter) in pushed else parameter.nbytes
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
        parameter.nbytes,
        held,
    )


def _plain(
    model: nn.Module,
    sites: list[Site],
    selection: Selection,
    served: dict[int, _Served],
    small: dict[int, Tensor],
) -> list[OptimizerRow]:
    taken = {id(site.candidate.parameter) for site in sites} | small.keys()
    known = {id(c.parameter): (c.name, reason) for c, reason in selection.plain}
    rows = []
    for path, parameter in model.named_parameters():
        if id(parameter) not in taken and parameter.requires_grad:
            name, reason = known.get(id(parameter), (path, _why_plain(parameter)))
            mine = served.get(id(parameter), NOBODY)
            size, shape = mine.moments * parameter.nbytes, tuple(parameter.shape)
            held = _held(mine.state) or size
            grad = parameter.nbytes
            row = OptimizerRow(
                name, shape, "plain", reason, "", None, size, held, None, None, 0, grad, grad
            )
            rows.append(row)
    return rows


def _why_plain(parameter: Tensor) -> str:
    return "fewer than two dimensions" if parameter.ndim < 2 else ""


def table(rows: tuple[OptimizerRow, ...]) -> str:
    """The rows as text; parameters of fewer than two dimensions in one line."""
    matrices = [row for row in rows if len(row.shape) > 1]
    header = [
        *("parameter", "shape", "decision", "side", "rank", "gradient before", "after"),
        *("state before", "after"),
        *("last refresh", "energy", "reason"),
    ]
    lines = [
        (
            row.name,
            "x".join(map(str, row.shape)),
            row.decision,
            row.side,
            row.rank,
            row.gradient_before,
            row.gradient_after,
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
        grad = sum(row.gradient_after for row in small)
        lines.append(
            (name, "", "plain", "", None, grad, grad, size, size, None, None, "fewer than 2-D")
        )
    return tabulate(
        lines, header, tablefmt="simple", intfmt=",", missingval="", disable_numparse=[0]
    )
