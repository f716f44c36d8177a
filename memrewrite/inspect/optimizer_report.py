"""The optimizer's rows of `report`: the bytes of each parameter's state, and the reason."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tabulate import tabulate
from torch import Tensor, nn

from memrewrite.gradients.packing import VECTOR
from memrewrite.inspect.folding import Fold, folded
from memrewrite.moments.moment import Moment, stores
from memrewrite.moments.optimizers import ADAM
from memrewrite.moments.projected import Target, projected_bytes
from memrewrite.optim.hook import attachments
from memrewrite.session.choice import Part
from memrewrite.session.session import Session
from memrewrite.sites.eligible import Selection, sites_of
from memrewrite.sites.weights import Site

NOT_ATTACHED = (
    "not attached yet: no optimizer has stepped {} of the projected weights; their bytes are "
    "predicted"
)


@dataclass(frozen=True)
class OptimizerRow:
    """One trained parameter. Bytes count exp_avg, exp_avg_sq (and its maximum), and P or v.

    projected: by GaLore, an approximate update. factored: from VeLoRA's small gradient, an update
    equal to that of torch's Adam on the full one. gradient_after: bytes of a small gradient; of a
    projected one, between refreshes.
    """

    name: str
    shape: tuple[int, ...]
    decision: Literal["projected", "factored", "stored", "plain"]
    reason: str  # why it is plain
    side: str  # "left" or "right" if projected
    rank: int | None
    bytes_before: int  # by torch's Adam
    bytes_after: int
    last_refresh: int | None  # its step, counted from 1
    energy: float | None  # |P^T G|^2 / |G|^2 at that refresh
    failed_refreshes: int
    gradient_before: int
    gradient_after: int


def optimizer_rows(session: Session, model: nn.Module) -> tuple[tuple[OptimizerRow, ...], str]:
    """(rows, status); both empty if no method changes gradients or moments."""
    returned = session.returned()
    small = {p: found for p, found in returned.items() if found[0].method.factors}
    if session.galore is None and session.moments is None and not small:
        return (), ""
    selection = sites_of(model, session.galore) if session.galore else Selection([], [])
    sites = [s for s in selection.projected if s.weight.parameter not in small]
    served, pushed = _served(session), returned.keys() - small.keys()
    rows = (
        *(_factored(model, p, part, served) for p, (part, _) in small.items()),
        *(_projected(site, served, pushed, session.moments) for site in sites),
        *_others(model, sites, selection, served, set(small), session.moments),
    )
    before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
    status = f"optimizer state: {before:,} bytes by stock Adam, {after:,} by memrewrite"
    if before:
        status += f" ({after / before:.2f} x)"
    full, held = sum(r.gradient_before for r in rows), sum(r.gradient_after for r in rows)
    if held < full:
        status += f"\ngradients: {full:,} bytes in full, {held:,} as stored"
    failures = sum(row.failed_refreshes for row in rows)
    if failures:
        status += f"; {failures} refreshes of a projector failed and kept the old one"
    waiting = [site for site in sites if not served.get(site.weight.parameter, NOBODY).state]
    return rows, f"{status}\n{NOT_ATTACHED.format(len(waiting))}" if waiting else status


@dataclass(frozen=True)
class _Served:
    """A parameter and its optimizer."""

    target: Target | None
    state: dict[str, Any]
    moments: int  # number that torch's Adam would keep


NOBODY = _Served(None, {}, 2)


def _served(session: Session) -> dict[Tensor, _Served]:
    return {
        parameter: _Served(
            attachment.targets.get(parameter),
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
    model: nn.Module, parameter: Tensor, part: Part, served: dict[Tensor, _Served]
) -> OptimizerRow:
    name = next((n for n, p in model.named_parameters() if p is parameter), "")
    mine = served.get(parameter, NOBODY)
    site = next(site for site in part.sites.values() if site.weight.parameter is parameter)
    small = part.method.small_bytes(site)
    plain = mine.state and VECTOR not in mine.state
    reason = "its state is full-size: see the warning" if plain else ""
    return OptimizerRow(
        name.removesuffix(".weight"),
        tuple(parameter.shape),
        "plain" if plain else "factored",
        reason,
        "left" if site.left else "right",
        None,
        mine.moments * parameter.nbytes,
        _held(mine.state) or mine.moments * small,
        None,
        None,
        0,
        parameter.nbytes,
        small,
    )


def _projected(
    site: Site, served: dict[Tensor, _Served], pushed: Container[Tensor], form: Moment | None
) -> OptimizerRow:
    parameter, shape = site.weight.parameter, site.weight.shape
    mine = served.get(parameter, NOBODY)
    form = None if parameter in pushed else form
    small = parameter.numel() // shape[0 if site.left else 1] * site.rank
    held = small * parameter.element_size() if parameter in pushed else parameter.nbytes
    return OptimizerRow(
        site.weight.name,
        shape,
        "projected",
        "",
        "left" if site.left else "right",
        site.rank,
        mine.moments * parameter.nbytes,
        _held(mine.state) or projected_bytes(site, mine.moments, form),
        mine.target.refreshed if mine.target else None,
        mine.target.energy if mine.target else None,
        mine.target.failures if mine.target else 0,
        parameter.nbytes,
        held,
    )


def _others(
    model: nn.Module,
    sites: list[Site],
    selection: Selection,
    served: dict[Tensor, _Served],
    small: set[Tensor],
    form: Moment | None,
) -> list[OptimizerRow]:
    taken = {site.weight.parameter for site in sites} | small
    known = {w.parameter: (w.name, reason) for w, reason in selection.plain}
    rows = []
    for path, parameter in model.named_parameters():
        if parameter not in taken and parameter.requires_grad:
            name, reason = known.get(parameter, (path, _why_plain(parameter)))
            mine = served.get(parameter, NOBODY)
            size, shape = mine.moments * parameter.nbytes, tuple(parameter.shape)
            held = _held(mine.state) or size
            grad = parameter.nbytes
            decision: Any = "plain"
            if form is not None and stores(form, parameter):
                decision, reason = "stored", f"its moments are kept as {form.name}"
                names = list(ADAM.moments)[: mine.moments]
                held = _held(mine.state) or form.bytes_of(parameter, names)
            row = OptimizerRow(
                name, shape, decision, reason, "", None, size, held, None, None, 0, grad, grad
            )
            rows.append(row)
    return rows


def _why_plain(parameter: Tensor) -> str:
    return "fewer than two dimensions" if parameter.ndim < 2 else ""


def folded_optimizer(rows: Sequence[OptimizerRow]) -> list[Fold[OptimizerRow]]:
    """Rows with equal layers folded; equality ignores energies, which differ by layer."""
    return folded(rows, _shown)


def _shown(row: OptimizerRow) -> tuple[Any, ...]:
    sizes = (row.gradient_before, row.gradient_after, row.bytes_before, row.bytes_after)
    return row.shape, row.decision, row.side, row.rank, row.last_refresh, sizes


def table(folds: list[Fold[OptimizerRow]]) -> str:
    """The rows as a table; one row for all parameters of fewer than two dimensions."""
    header = [
        *("parameter", "shape", "decision", "side", "rank", "gradient before", "after"),
        *("state before", "after"),
        *("last refresh", "energy", "reason"),
    ]
    lines = [_line(fold) for fold in folds if len(fold.first.shape) > 1]
    small = [row for fold in folds if len(fold.first.shape) < 2 for row in fold.rows]
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


def _line(fold: Fold[OptimizerRow]) -> tuple[Any, ...]:
    row = fold.first
    return (
        fold.label,
        "x".join(map(str, row.shape)),
        row.decision,
        row.side,
        row.rank,
        fold.total(lambda r: r.gradient_before),
        fold.total(lambda r: r.gradient_after),
        fold.total(lambda r: r.bytes_before),
        fold.total(lambda r: r.bytes_after),
        row.last_refresh,
        _energy([r.energy for r in fold.rows]),
        fold.reason,
    )


def _energy(values: list[float | None]) -> str | None:
    """The least and the greatest, where they are not printed alike."""
    known = [v for v in values if v is not None]
    ends = [f"{v:.3f}" for v in (min(known), max(known))] if known else []
    return " to ".join(dict.fromkeys(ends)) or None
