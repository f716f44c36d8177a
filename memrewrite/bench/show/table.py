"""A bench as a table, for a terminal or for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tabulate import tabulate

from memrewrite.bench.show.summary import problems

MB = 1e6
LEGEND = """\
memory: the highest of forward, backward, step and refresh: what is physically taken above the
idle process, plus weights, buffers and optimizer state to the byte. predicted: what
`memrewrite.estimate` says of it. saved: what autograd keeps after one forward. step s: the median;
ratio: the median of the ratios to the baseline's step of the same round, quartiles in brackets.
first s: the first step, compilation included, caches empty (with `pushed` the first two, each of
which compiles). off: relative error of all gradients of the first step against
the exact ones."""


def table(rows: Iterable[Mapping[str, Any]], style: str = "simple", anchors: str = "") -> str:
    """One line per configuration; MB are 10^6 bytes, ratios to the baseline in brackets.

    anchors: a prefix; if given, each name gets an HTML anchor.
    """
    header = (
        *("configuration", "memory MB", "predicted", "forward", "backward", "step", "refresh"),
        *("saved MB", "gradients", "state MB", "step s", "ratio", "refresh s", "first s"),
        *("graphs", "cosine", "off"),
    )
    cells = [_cells(row, anchors) for row in rows]
    keep = [i for i in range(len(header)) if i == 0 or any(line[i] for line in cells)]
    return tabulate(
        [[line[i] for i in keep] for line in cells],
        [header[i] for i in keep],
        style,
        disable_numparse=True,
        stralign="right",
        colalign=("left",),
    )


def anchor(prefix: str, name: str) -> str:
    """The name of a row's HTML anchor."""
    return f"{prefix}-{name}".replace("+", "-").replace(".", "-").replace(":", "-").lower()


def _cells(row: Mapping[str, Any], anchors: str) -> list[str]:
    found = row.get("summary", {})
    name = row["name"]
    if anchors:
        name = f'<a id="{anchor(anchors, name)}"></a>{name}'
    wrong = problems(dict(row))
    if wrong and "peak" not in found:
        what = wrong[0].removeprefix(f"{row['name']}: ").partition(":")[0]
        return [name, what, *[""] * 8, *_time(found), *[""] * 4]
    graphs = f"{found['graphs']}" if "graphs" in found else ""
    if found.get("recompiles"):
        graphs += f" + {found['recompiles']}"
    return [
        name,
        _mb(found, "peak"),
        _mb(found, "predicted_peak"),
        *(_mb(found, f"{phase}_peak") for phase in ("forward", "backward", "step", "refresh")),
        _mb(found, "saved"),
        _mb(found, "gradients", ratio=False),
        _mb(found, "state"),
        *_time(found),
        graphs,
        _number(found, "cosine", ".4f"),
        _number(found, "relative_error", ".1e"),
    ]


def _time(found: Mapping[str, Any]) -> list[str]:
    ratio = ""
    if "step_ratio" in found:
        low, high = found["step_ratio_spread"]
        ratio = f"{found['step_ratio']:.2f} [{low:.2f}, {high:.2f}]"
    return [
        f"{found['step_s']:.3f}" if "step_s" in found else "",
        ratio,
        f"{found['refresh_s']:.3f}" if "refresh_s" in found else "",
        f"{found['cold_first_step_s']:.1f}" if "cold_first_step_s" in found else "",
    ]


def _number(found: Mapping[str, Any], key: str, how: str) -> str:
    if key not in found:
        return ""
    return "not finite" if found[key] is None else format(found[key], how)


def _mb(found: Mapping[str, Any], key: str, ratio: bool = True) -> str:
    if key not in found:
        return ""
    text = f"{found[key] / MB:.1f}"
    if ratio and f"{key}_ratio" in found:
        text += f" ({found[f'{key}_ratio']:.2f})"
    return text


LOSS_LEGEND = """\
loss: validation, nats per label (of a text, per token), mean over the seeds at the row's best
learning rate, least and most in brackets. delta: to the baseline with the same seed. kept: of what
training these weights is worth: all where a row is as good as the best plain AdamW, be it the
baseline or the one that takes smaller steps on these weights (slowed), none where it is as bad as
freezing them; left out where freezing is no worse. (edge): the best learning rate is the sweep's
least or largest. memory: of a training step, as in the cost bench. accuracy: of a classifier, as
the loss. off: as in the cost bench, on the task's first batch."""


def loss_table(rows: Iterable[Mapping[str, Any]], style: str = "simple", anchors: str = "") -> str:
    """One line per configuration of a training bench."""
    known = list(rows)
    worth = {
        row["configuration"]["frozen"]: (_best_plain(known, row), row["summary"]["delta"])
        for row in known
        if row["configuration"]["frozen"] and "delta" in row.get("summary", {})
    }
    header = (
        *("configuration", "loss", "delta", "kept", "accuracy", "lr", "memory MB"),
        *("step s", "seeds", "off"),
    )
    cells = [_loss_cells(row, worth, anchors) for row in known]
    measured = ("accuracy", "off")
    keep = [
        i for i, name in enumerate(header) if name not in measured or any(line[i] for line in cells)
    ]
    return tabulate(
        [[line[i] for i in keep] for line in cells],
        [header[i] for i in keep],
        style,
        disable_numparse=True,
        stralign="right",
        colalign=("left",),
    )


def _best_plain(rows: Iterable[Mapping[str, Any]], frozen: Mapping[str, Any]) -> float:
    """Delta of the best AdamW on the weights that `frozen` freezes: at most the baseline's."""
    sites = frozen["configuration"]["frozen"]
    slowed = (row for row in rows if row["configuration"].get("slowed") == sites)
    deltas: list[float] = [r["summary"]["delta"] for r in slowed if "delta" in r["summary"]]
    return min([0.0, *deltas])


def _loss_cells(
    row: Mapping[str, Any], worth: Mapping[str, tuple[float, float]], anchors: str
) -> list[str]:
    found = row.get("summary", {})
    name = f'<a id="{anchor(anchors, row["name"])}"></a>{row["name"]}' if anchors else row["name"]
    if "loss" not in found:
        wrong = problems(dict(row)) or [f"{row['name']}: diverged"]
        return [name, wrong[0].removeprefix(f"{row['name']}: ").partition(":")[0], *[""] * 8]
    low, high = found["loss_spread"]
    delta = kept = ""
    if "delta" in found:
        least, most = found["delta_spread"]
        delta = f"{found['delta']:+.3f} [{least:+.3f}, {most:+.3f}]"
        configuration = row["configuration"]
        plain, frozen = worth.get(configuration["sites"], (0.0, 0.0))
        alone = not (configuration["galore"] or configuration["lora"])  # of these weights
        if frozen > plain and configuration["velora"] and alone:
            kept = f"{(frozen - found['delta']) / (frozen - plain):.0%}"
    return [
        name,
        f"{found['loss']:.3f} [{low:.3f}, {high:.3f}]",
        delta,
        kept,
        _accuracy(found),
        f"{found['lr']:g}{' (edge)' if found['at_edge'] else ''}",
        _mb(found, "peak", ratio=False),
        f"{found['step_s']:.3f}",
        f"{found['seeds']}",
        _number(found, "relative_error", ".1e"),
    ]


def _accuracy(found: Mapping[str, Any]) -> str:
    if "accuracy" not in found:
        return ""
    low, high = found["accuracy_spread"]
    return f"{found['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
