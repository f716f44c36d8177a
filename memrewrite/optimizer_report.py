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

NOT_ATTACHED = "not attached yet: no optimizer has stepped these parameters; bytes are predicted"


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
    attached = {
        id(target.parameter): (target, optimizer.state.get(target.parameter, {}))
        for optimizer, attachment in attachments(session)
        for target in attachment.targets.values()
        if target.session is session
    }
    rows = (
        *(_projected(site, attached) for site in selection.projected),
        *_plain(model, selection),
    )
    stepped = any(state for _, state in attached.values())
    before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
    status = f"optimizer state: {before:,} bytes by stock Adam, {after:,} by memrewrite"
    if before:
        status += f" ({after / before:.2f} x)"
    failures = sum(row.failed_refreshes for row in rows)
    if failures:
        status += f"; {failures} refreshes of a projector failed and kept the old one"
    return rows, status if stepped else f"{status}\n{NOT_ATTACHED}"


def _projected(site: Site, attached: dict[int, tuple[Target, dict[str, Any]]]) -> OptimizerRow:
    parameter, shape = site.candidate.parameter, site.candidate.shape
    target, state = attached.get(id(parameter), (None, {}))
    held = [v for v in state.values() if isinstance(v, Tensor) and v.ndim]
    moments = 3 if "max_exp_avg_sq" in state else 2
    predicted = projected_numbers(shape, site.rank, site.left) * parameter.element_size()
    return OptimizerRow(
        site.candidate.name,
        shape,
        "projected",
        "",
        "left" if site.left else "right",
        site.rank,
        moments * parameter.nbytes,
        sum(v.nbytes for v in held) if held else predicted,
        target.refreshed if target else None,
        target.energy if target else None,
        target.failures if target else 0,
    )


def _plain(model: nn.Module, selection: Selection) -> list[OptimizerRow]:
    projected = {id(site.candidate.parameter) for site in selection.projected}
    known = {id(c.parameter): (c.name, reason) for c, reason in selection.plain}
    rows = []
    for path, parameter in model.named_parameters():
        if id(parameter) not in projected and parameter.requires_grad:
            name, reason = known.get(id(parameter), (path, "fewer than two dimensions"))
            size = 2 * parameter.nbytes
            shape = tuple(parameter.shape)
            row = OptimizerRow(name, shape, "plain", reason, "", None, size, size, None, None, 0)
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
