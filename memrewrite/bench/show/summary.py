"""Summary of a row's runs: medians, quartiles, ratios to the baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from statistics import mean, median, quantiles
from typing import Any

from memrewrite.bench.configurations import BASELINE

Row = dict[str, Any]


def summarise(rows: Iterable[Row]) -> None:
    """Write `row["summary"]` for all rows, which must include the baselines for ratios."""
    known = {row["name"]: row for row in rows}
    for row in known.values():
        row["summary"] = _medians(row["runs"])
    for row in known.values():
        base = known.get(row["baseline"])
        row["summary"] |= _ratios(row["summary"], base["summary"] if base else {})


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    measured = [run["memory"] for run in runs if "memory" in run]
    for key in dict.fromkeys(chain(*measured)):
        values = [m[key] for m in measured if key in m]
        found[key] = median(values)
        found[f"{key}_spread"] = [min(values), max(values)]
    steps = list(chain(*(run.get("step_s", ()) for run in runs)))
    if steps:
        found |= {"step_s": median(steps), "step_s_spread": _middle(steps)}
    refreshes = list(chain(*(run.get("refresh_s", ()) for run in runs)))
    if refreshes:
        found["refresh_s"] = median(refreshes)
    ratios = list(chain(*(run.get("ratios", ()) for run in runs)))
    if ratios:
        found |= {"step_ratio": median(ratios), "step_ratio_spread": _middle(ratios)}
    for key, wanted in (("cold_first_step_s", True), ("warm_first_step_s", False)):
        firsts = [r["first_step_s"] for r in runs if "first_step_s" in r and r["cold"] is wanted]
        if firsts:
            found[key] = median(firsts)
    started = [run for run in runs if "graphs" in run]
    if started:
        found["graphs"] = started[0]["graphs"]
        found["recompiles"] = max(run.get("recompiles", 0) for run in started)
        found |= started[0].get("gradient", {})
    predicted = next((run["predicted"] for run in runs if "predicted" in run), None)
    if predicted:
        found["predicted_peak"] = predicted["peak"]
    return found


def _middle(values: Sequence[float]) -> list[float]:
    """The quartiles."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return [low, high]


def _ratios(mine: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    keys = ("peak", "above_idle", "saved", "state", "gradients", "cold_first_step_s")
    return {f"{key}_ratio": mine[key] / base[key] for key in keys if key in mine and base.get(key)}


def problems(row: Row) -> list[str]:
    """Why a row was skipped, and where its runs failed."""
    if row["skipped"]:
        return [f"{row['name']}: skipped: {row['skipped']}"]
    found = []
    for run in (*row["runs"], row.get("failure", {})):
        if error := run.get("error"):
            what = "out of memory" if error["out_of_memory"] else error["type"]
            first = error["message"].strip().splitlines()[:1]
            found.append(f"{row['name']}: {what} at {error['stage']}: {''.join(first)[:300]}")
    return list(dict.fromkeys(found))


# --- training ------------------------------------------------------------------------------


def best_rate(runs: Sequence[dict[str, Any]]) -> float | None:
    """The best learning rate of the first seed; None if every run failed or diverged."""
    swept = [(run["loss"], run["lr"]) for run in runs if run["seed"] == 0 and run["loss"]]
    return min(swept)[1] if swept else None


def summarise_training(data: dict[str, Any]) -> None:
    """Write `row["summary"]` for all rows of a training document."""
    rows = {row["name"]: row for row in data["rows"]}
    for row in rows.values():
        row["summary"] = _of_training(row)
    base = _losses(rows[BASELINE]["runs"]) if BASELINE in rows else {}
    for row in rows.values():
        mine = _losses(row["runs"])
        pairs = [mine[seed] - base[seed] for seed in mine if seed in base]
        if pairs:
            row["summary"] |= {"delta": mean(pairs), "delta_spread": [min(pairs), max(pairs)]}


def _of_training(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = dict(row.get("memory", {}))
    found |= row.get("first", {}).get("gradient", {})
    losses = _losses(row["runs"])
    if not losses:
        return found
    rates = sorted({run["lr"] for run in row["runs"] if run["seed"] == 0 and run["lr"]})
    best = best_rate(row["runs"])
    steps = [run["step_s"] for run in row["runs"] if run["loss"]]
    values = list(losses.values())
    right = [run["accuracy"] for run in row["runs"] if run["lr"] == best and "accuracy" in run]
    if right:
        found |= {"accuracy": mean(right), "accuracy_spread": [min(right), max(right)]}
    return found | {
        "lr": best,
        "at_edge": best in (rates[0], rates[-1]),
        "loss": mean(values),
        "loss_spread": [min(values), max(values)],
        "seeds": len(values),
        "step_s": median(steps),
    }


def _losses(runs: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Validation loss at the best learning rate, by seed."""
    best = best_rate(runs)
    return {run["seed"]: run["loss"] for run in runs if run["lr"] == best and run["loss"]}
