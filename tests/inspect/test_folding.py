"""Equal layers in one row of a report: what folds, what does not, and that nothing is lost."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from expecttest import assert_expected_inline
from hypothesis import given
from hypothesis import strategies as st
from models import Stack, loss_of

import memrewrite
from memrewrite import GaLore, VeLoRA
from memrewrite.inspect.folding import folded, unfolded
from memrewrite.inspect.optimizer_report import OptimizerRow
from memrewrite.inspect.report import Report, Row, _shown

indices = st.integers(0, 3).map(str)
words = st.sampled_from(["up", "down"])
names = st.one_of(
    st.tuples(st.just("layers"), indices, words),
    st.tuples(st.just("layers"), indices, st.just("experts"), indices, words),
    st.tuples(indices, words),
    st.tuples(words),
).map(".".join)
reasons = st.one_of(
    st.just("x kept"),
    st.lists(names, min_size=1, max_size=2).map(lambda ns: f"(x shared with {', '.join(ns)})"),
)


@st.composite
def tables(draw: st.DrawFn) -> list[Row]:
    found = draw(st.lists(names, unique=True, max_size=16))
    return [
        Row(name, (2, draw(st.integers(1, 2))), "exact", draw(reasons), draw(st.integers(0, 1)), 0)
        for name in found
    ]


def starred(text: str, by: str) -> str:
    return text.replace("*", by)


@given(tables())
def test_a_fold_stands_for_equal_rows_and_none_is_lost(rows: list[Row]) -> None:
    folds = folded(rows, _shown)
    held = [row for fold in folds for row in fold.rows]
    assert sorted(held, key=rows.index) == rows
    assert [rows.index(fold.first) for fold in folds] == sorted(
        rows.index(fold.first) for fold in folds
    )
    for fold in folds:
        assert fold.total(lambda r: r.bytes_before) == sum(r.bytes_before for r in fold.rows)
        assert len({_shown(row) for row in fold.rows}) == 1
        if len(fold.rows) == 1:
            assert (fold.name, fold.reason) == (fold.first.name, fold.first.reason)
        else:
            at = fold.name.split(".").index("*")
            for row in fold.rows:  # the name and the reason of each can be told again
                index = row.name.split(".")[at]
                assert starred(fold.name, index) == row.name
                assert starred(fold.reason, index) == row.reason


@given(tables())
def test_folding_depends_on_no_name_but_through_its_index(rows: list[Row]) -> None:
    def moved(text: str) -> str:
        return text.replace("layers", "blocks")

    before = folded(rows, _shown)
    others = [replace(r, name=moved(r.name), reason=moved(r.reason)) for r in rows]
    after = folded(others, _shown)
    assert [moved(f.label) for f in before] == [f.label for f in after]
    assert [f.label for f in unfolded(rows)] == [r.name for r in rows]


def row(name: str, reason: str = "") -> Row:
    return Row(name, (2, 2), "exact", reason, 4, 4)


def test_names_in_reasons_fold_within_the_layer_only() -> None:
    rows = [
        *(row(f"m.1{i}.k", f"shared with m.1{i}.q, m.1.q") for i in range(3)),
        *(row(f"m.{i}.q", f"0.25 of m.{i}.q") for i in (1, 10, 11, 12)),
        row("m.9.q", "shared with m.10.q"),  # of another layer
        row("m.8.q", "read by n.m.8.q"),  # of another model
    ]
    lines = [(fold.label, fold.reason) for fold in folded(rows, _shown)]
    assert lines == [
        ("m.*.k x 3", "shared with m.*.q, m.1.q"),
        ("m.*.q x 4", "0.25 of m.*.q"),
        ("m.9.q", "shared with m.10.q"),
        ("m.8.q", "read by n.m.8.q"),
    ]


def test_numbers_are_no_names() -> None:
    """The rows of an nn.Sequential start with their index."""
    rows = [row(f"{i}.up", f"0.25 and 1.5 of {i}.gate") for i in range(2)]
    rows += [row(f"{i}.gate") for i in range(2)]
    assert [f.reason for f in folded(rows, _shown)] == ["0.25 and 1.5 of *.gate", ""]


def deep() -> memrewrite.Report:
    torch.manual_seed(0)
    model = Stack(depth=4)
    velora = VeLoRA(8, ["*.down_proj"], init="ones")
    galore = GaLore(4, sites=["*.up_proj"])
    memrewrite.compile(model, velora=velora, galore=galore, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of(torch.randn(6, 32))(model).backward()
    optimizer.step()
    return memrewrite.report(model)


def optimizer_row(name: str, energy: float | None, **other: Any) -> OptimizerRow:
    decision, side = ("plain", "") if energy is None else ("projected", "left")
    values: dict[str, Any] = {"shape": (64, 32), "reason": "", "rank": 4, "last_refresh": 1}
    sizes = {"bytes_before": 16384, "bytes_after": 1024}
    sizes |= {"gradient_before": 8192, "gradient_after": 8192}
    values |= {"name": name, "decision": decision, "side": side, "energy": energy, **sizes}
    return OptimizerRow(failed_refreshes=0, **(values | other))


def test_what_is_printed() -> None:
    sites = [
        replace(row(f"h.{i}.{part}", reason), shape=(64, 32), bytes_before=1024 * (part == "q"))
        for i in range(3)
        for part, reason in [("q", f"x kept (x shared with h.{i}.k)"), ("k", "x kept")]
    ]
    sites[-1] = replace(sites[-1], decision="compressed")
    state = [
        *(optimizer_row(f"h.{i}.q", 0.9 + i / 100) for i in range(3)),
        *(optimizer_row(f"h.{i}.k", None, reason="not selected") for i in range(3)),
        optimizer_row("h.0.bias", None, shape=(64,)),
    ]
    report = Report(tuple(sites), {}, "saved: some", tuple(state), "state: some")
    narrow = re.sub(r"([ -])\1+", r"\1\1", str(report))  # columns without their padding
    # without the optimizer's columns of gradients, which are as wide as those of its state
    narrow = narrow.replace("gradient before  after  ", "").replace("24,576  24,576  ", "")
    assert_expected_inline(
        narrow,
        """\
weight  shape  decision  bytes before  bytes after  reason
--  --  --  --  --  --
h.*.q x 3  64x32  exact  3,072  12  x kept (x shared with h.*.k)
h.*.k x 2  64x32  exact  0  8  x kept
h.2.k  64x32  compressed  0  4  x kept

saved: some

parameter  shape  decision  side  rank  state before  after  last refresh  energy  reason
--  --  --  --  --  --  --  --  --  --  --  --
h.*.q x 3  64x32  projected  left  4  49,152  3,072  1  0.900 to 0.920
h.*.k x 3  64x32  plain  4  49,152  3,072  1  not selected
1 vectors and scalars  plain  8,192  8,192  1,024  1,024  fewer than 2-D

state: some""",
    )


def test_layers_of_a_trained_model_fold() -> None:
    report = deep()
    lines = [line.split("  ")[0] for line in str(report).splitlines()]
    linears = [f"blocks.*.{part} x 4" for part in ("gate_proj", "up_proj", "down_proj")]
    assert lines[2:6] == [*linears, "head"]
    assert set(lines[10:]) >= {*linears, "head"}


def test_the_full_text_and_the_data_have_every_weight() -> None:
    report = deep()
    text, data = report.full(), report.to_dict()
    for kind in ("sites", "optimizer"):
        assert not any("*" in r["name"] for r in data[kind])
    for name in [f"blocks.{i}.{part}" for i in range(4) for part in ("gate_proj", "down_proj")]:
        assert f"\n{name} " in text and f"\n{name} " not in str(report)
        assert name in {r["name"] for r in data["sites"]}
    assert report.status in text and report.optimizer_status in text
