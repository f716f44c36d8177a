"""What the report says of an optimizer, to the byte."""

from __future__ import annotations

import pytest
from galore_net import fit, net
from torch.optim import AdamW

import memrewrite
from memrewrite import GaLore


def test_report_before_and_after_the_first_step() -> None:
    model = net(GaLore(rank=2))
    early = memrewrite.report(model)
    assert "not attached yet" in str(early)
    optimizer = AdamW(model.parameters())
    fit(model, optimizer, range(1))
    late = memrewrite.report(model)
    assert "not attached yet" not in str(late)
    sizes = [[(r.name, r.bytes_before, r.bytes_after) for r in x.optimizer] for x in (early, late)]
    assert sizes[0] == sizes[1]
    held = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.ndim)
    assert late.totals["state_bytes_after"] == held
    rows = {row.name: row for row in late.optimizer}
    assert (rows["up"].side, rows["up"].rank, rows["up"].last_refresh) == ("right", 2, 1)
    assert 0 < (rows["up"].energy or 0) < 1
    assert rows["lm_head"].reason == "the output head"
    assert rows["embedding"].reason.startswith("an embedding")


@pytest.mark.parametrize("amsgrad", [True, False])
def test_report_counts_every_byte_of_the_state(amsgrad: bool) -> None:
    model = net()
    optimizer = AdamW(model.parameters(), amsgrad=amsgrad)
    fit(model, optimizer, range(1))
    held = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.ndim)
    full = sum(p.nbytes for p in model.parameters()) * (3 if amsgrad else 2)
    totals = memrewrite.report(model).totals
    assert (totals["state_bytes_before"], totals["state_bytes_after"]) == (full, held)
    partial = net(seed=1)
    fit(partial, AdamW(partial.up.parameters()), range(1))
    assert "not attached yet" in str(memrewrite.report(partial))
