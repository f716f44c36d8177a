"""bench page: write the results in a folder of benches as one Markdown page, README.md.

Every `bench.json` below the folder is a section, which includes a `notes.md` of the same folder;
other Markdown files of the folder are linked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from memrewrite.bench.document import FILE, load, title
from memrewrite.bench.sets import SETS
from memrewrite.bench.show import chart, pairs, pareto
from memrewrite.bench.show.summary import problems, summarise, summarise_training
from memrewrite.bench.show.table import LEGEND, LOSS_LEGEND, anchor, loss_table, table
from memrewrite.predict.pretrained import is_pretrained

Data = Mapping[str, Any]
INTRO = """\
# Results

Written by `python -m memrewrite bench page docs/results` from the JSON files in these folders:
nothing here is typed by hand but the notes. Every row that was measured is printed, those that we
lose too. Ratios are to `torch.compile` with fused AdamW, unless a row says otherwise."""
HEADLINE = (*SETS["quick"], "galore-torch", "galore", "galore+pushed")


def write_page(folder: Path) -> Path:
    """Write README.md in `folder`, and a chart in the folder of each bench.

    Raises ValueError if it has no bench, OSError where it cannot be written.
    """
    benches = {path.parent: load(path) for path in sorted(folder.glob(f"**/{FILE}"))}
    if not benches:
        raise ValueError(f"no {FILE} below {folder}: run `memrewrite bench --output {folder}/NAME`")
    costs = {at: data for at, data in benches.items() if data["request"]["kind"] == "cost"}
    trainings = {at: data for at, data in benches.items() if at not in costs}
    parts = [INTRO]
    for data in costs.values():
        summarise(data["rows"])
    if costs:
        parts += ["## In short", _headline(folder, costs)]
    for at, data in costs.items():
        parts += _cost(folder, at, data)
    for at, data in trainings.items():
        summarise_training(dict(data))
        parts += _training(folder, at, data)
    parts += _others(folder)
    path = folder / "README.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path


def _headline(folder: Path, costs: Mapping[Path, Data]) -> str:
    """Memory and time of a few configurations, over all benches."""
    lines = []
    for name in HEADLINE:
        cells = [_two(data["rows"], name) for data in costs.values()]
        if any(cells):
            lines.append([f"`{name}`", *cells])
    titles = [f"[{_name(folder, at)}](#{_slug(folder, at)})" for at in costs]
    text = tabulate(lines, ["memory, time", *titles], "github", disable_numparse=True)
    return f"{text}\n\nMemory of a whole training step and its time, as ratios to `torch.compile`."


def _two(rows: Sequence[Data], name: str) -> str:
    row = next((row for row in rows if row["name"] in (name, f"lora+{name}")), None)
    place = pareto.point(row) if row else None
    return f"{place[1]:.2f}, {place[0]:.2f}" if place else ""


def _cost(folder: Path, at: Path, data: Data) -> Iterator[str]:
    rows = [row for row in data["rows"] if row["runs"] or row["skipped"]]
    slug = _slug(folder, at)
    yield from _opening(folder, at, data)
    yield table(rows, "github", slug)
    yield from _problems(data, rows)
    yield from _random(data, rows)
    yield LEGEND
    chart.pareto(rows, title(data), at / "pareto.svg")
    yield f"![memory against time]({_name(folder, at)}/pareto.svg)"
    found = pareto.verdicts(rows)
    if found:
        yield (
            "Every exact rival, and the fastest memrewrite configuration with no more memory and "
            "no more time:"
        )
        yield "\n".join(pareto.line_of(verdict) for verdict in found)
    names = ", ".join(row["name"] for row in pareto.front(rows))
    yield f"Beaten by none in both memory and time, the fastest first: {names}."


def _training(folder: Path, at: Path, data: Data) -> Iterator[str]:
    rows = [row for row in data["rows"] if row["runs"] or row["skipped"]]
    yield from _opening(folder, at, data)
    yield loss_table(rows, "github", _slug(folder, at))
    yield from _problems(data, rows)
    yield LOSS_LEGEND
    alike = list(pairs.lines_of(rows))
    if alike:
        yield "\n".join(f"- {line}" for line in alike)
    chart.losses(rows, title(data), at / "losses.svg")
    yield f"![loss against memory]({_name(folder, at)}/losses.svg)"


def _opening(folder: Path, at: Path, data: Data) -> Iterator[str]:
    yield f'<a id="{_slug(folder, at)}"></a>\n\n## {title(data)}'
    yield f"{_conditions(data)} Raw: [{FILE}]({_name(folder, at)}/{FILE})."
    notes = at / "notes.md"
    if notes.exists():
        yield notes.read_text().strip()


def _conditions(data: Data) -> str:
    asked, where = data["request"], data["environment"]
    machine = where["card"] or f"{where['threads']} threads of {where['cpu'] or 'a CPU'}"
    versions = ", ".join(f"{k} {where[k]}" for k in ("torch", "transformers") if k in where)
    date = where["date"].partition("T")[0]
    where_and_when = f"{machine}; {versions}; {date}; GaLore at rank {asked['rank']}."
    if asked["kind"] == "train":
        return f"{asked['steps']} steps; {where_and_when}"
    repeats = max((len(row["runs"]) for row in data["rows"]), default=0)
    return f"{repeats} fresh process{'es' if repeats > 1 else ''} a configuration; {where_and_when}"


def _problems(data: Data, rows: Sequence[Data]) -> Iterator[str]:
    lines = [*data.get("warnings", ())]
    lines += [line for row in rows for line in problems(dict(row))]
    if lines:
        yield "\n".join(f"- {line}" for line in lines)


def _random(data: Data, rows: Sequence[Data]) -> Iterator[str]:
    """A mark on rows that round, where the weights are random."""
    found = ((row["name"], row["configuration"].get("fp8")) for row in rows)
    rounded = [f"`{name}`" for name, fp8 in found if fp8 is not None and fp8 is not False]
    if rounded and not is_pretrained(data["request"]["model"]):
        yield (
            "Errors of gradients under rounding are of random weights alone, which flatter them: "
            f"{', '.join(rounded)}."
        )


def _others(folder: Path) -> Iterator[str]:
    pages = [p for p in sorted(folder.glob("*.md")) if p.name != "README.md"]
    if pages:
        yield "## Other measurements"
        yield "\n".join(f"- [{_heading(p)}]({p.name})" for p in pages)


def _heading(path: Path) -> str:
    first = path.read_text().splitlines()[0]
    return first.lstrip("# ").strip()


def _name(folder: Path, at: Path) -> str:
    return at.relative_to(folder).as_posix()


def _slug(folder: Path, at: Path) -> str:
    return anchor("at", _name(folder, at).replace("/", "-"))
