"""Charts of a bench, as SVG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memrewrite.bench.show.pareto import front, point

Row = Mapping[str, Any]
OURS, EXACT, APPROXIMATE = "#c0392b", "#2c3e50", "#95a5a6"


def pareto(rows: Iterable[Row], title: str, path: Path) -> None:
    """Memory against time, both as ratios to the baseline; the Pareto front is a line.

    Filled marks have exact gradients and Adam. Raises ImportError without matplotlib.
    """
    placed = [row for row in rows if point(row) is not None]
    if not placed:
        return
    figure, axes = _axes()
    best = [point(row) or (0.0, 0.0) for row in front(placed)]
    axes.step(*zip(*best, strict=True), where="post", color="#bbbbbb", zorder=1, linewidth=1)
    for number, row in enumerate(placed, start=1):
        time, memory = point(row) or (0.0, 0.0)
        colour = OURS if row["ours"] else EXACT
        axes.plot(
            time,
            memory,
            "o" if row["ours"] else "s",
            color=colour,
            markerfacecolor=colour if row["exact"] else "white",
            label=f"{number}  {row['name']}",
        )
        axes.annotate(str(number), (time, memory), (5, 4), textcoords="offset points", fontsize=8)
    axes.axvline(1, color="#dddddd", zorder=0)
    axes.axhline(1, color="#dddddd", zorder=0)
    axes.set(xlabel="step time, ratio to torch.compile", ylabel="memory, ratio to torch.compile")
    axes.set_title(
        f"{title}\nred: memrewrite; hollow: gradients or an optimizer that are not the exact ones",
        fontsize=10,
    )
    _save(figure, path)


def losses(rows: Sequence[Row], title: str, path: Path) -> None:
    """Validation loss against the memory and the time of training; bars span the seeds.

    Raises ImportError without matplotlib.
    """
    figure, (memory, time) = _axes(2)
    for number, row in enumerate(rows, start=1):
        found = row["summary"]
        if "peak" not in found or "loss" not in found:
            continue
        _loss(memory, found["peak"] / 1e6, number, row, f"{number}  {row['name']}")
        _loss(time, found["step_s"], number, row, None)
    memory.set(xlabel="memory of a training step, MB", ylabel="validation loss, nats")
    time.set(xlabel="time of a training step, s")
    figure.suptitle(
        f"{title}\nred: memrewrite; hollow: gradients or an optimizer that are not the exact ones",
        fontsize=10,
    )
    _save(figure, path)


def _loss(axes: Any, x: float, number: int, row: Row, label: str | None) -> None:
    """The mark of a row's loss at x."""
    colour = OURS if row["ours"] else EXACT
    y, (low, high) = row["summary"]["loss"], row["summary"]["loss_spread"]
    axes.errorbar(
        x, y, [[y - low], [high - y]], fmt="o" if row["ours"] else "s", color=colour,
        markerfacecolor=colour if row["exact"] else "white", capsize=2, elinewidth=1, label=label,
    )  # fmt: skip
    axes.annotate(str(number), (x, y), (5, 4), textcoords="offset points", fontsize=8)


def _axes(panels: int = 1) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'memrewrite[bench]' for the chart") from error
    figure = Figure(figsize=(6 + 4 * panels, 5.5), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True)
    for one in axes if panels > 1 else [axes]:
        one.grid(alpha=0.2)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "memrewrite"}):  # a reproducible file
        figure.savefig(path, metadata={"Date": None})
