"""Two ranks against one process that sees both batches: `ranks.py` runs them all at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, TESTS

pytestmark = pytest.mark.slow  # a minute for all of them
Results = dict[str, dict[str, Any]]
SMALL = (
    *("static_graph", "bucket views", "bucket views, zeroed", "no_sync", "unused", "uneven"),
    *("unused, static", "clip and scaler", "graph break", "reentrant", "reentrant, static"),
    *("checkpoint", "bare", "bare, static", "boxed", "known hook", "order after", "order whole"),
    *("split", "each block", "nested backward", "rebuilt", "loaded", "used on one rank"),
)
ORDERS = ("shard, blocks", "blocks, shard", "shard, whole", "whole, shard")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of one pair of processes, whichever worker of the test run comes first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    told = folder / "told.txt"
    try:
        folder.mkdir()
    except FileExistsError:
        while not told.exists():
            time.sleep(0.5)
    else:
        part = folder / "part.txt"
        part.write_text(run_ranks(folder))
        part.replace(told)
    said = told.read_text()
    assert not said, said
    found: Results = json.loads((folder / "results.json").read_text())
    return found


def run_ranks(folder: Path) -> str:
    """What the ranks said, where one failed."""
    script, output = TESTS / "ranks.py", folder / "results.json"
    root = str(ROOT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    pair = [
        subprocess.Popen(
            [sys.executable, script, str(rank), folder / "store", output],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=540)[0] for process in pair]
    except subprocess.TimeoutExpired:
        said = ["the ranks wait for one another"]
    finally:
        for process in pair:
            process.kill()
    failed = [process.returncode for process in pair] != [0, 0]
    return "\n".join(said)[-4000:] or "no word" if failed else ""


@pytest.mark.parametrize(
    "mode", ["exact", "velora", "velora dense", "galore", "galore coordinates", "both"]
)
def test_twenty_steps_are_those_of_one_process(results: Results, mode: str) -> None:
    found = results[f"mode {mode}"]
    assert found["off"] < 1e-6
    assert found["bytes"] == found["alone"]
    assert found["ranks"] == 0.0


def test_what_is_sent_of_small_gradients(results: Results) -> None:
    """Nothing of ours where gradients are full; A, R or a sketch where they are not."""
    velora, galore = results["mode velora"], results["mode galore coordinates"]
    assert velora["full"] == velora["small"] * 8 == 20 * 4 * (16 * 32 + 32 * 16 + 16 * 4)
    assert velora["dense"] == galore["dense"] == 0
    usual = (32 * 2 + 2 * 32 + 2 * 16) * 4  # R of up, down, head
    sketched = (18 * 16 + 16 * 18 + 4 * 16) * 4  # r + 16 columns, or all
    refreshes = 5  # before steps 0, 2, 4, 7, 14
    assert galore["small"] == (20 - refreshes) * usual + refreshes * sketched
    assert galore["full"] == velora["full"]
    for mode in ("exact", "velora dense", "galore"):
        assert results[f"mode {mode}"]["full"] == 0


@pytest.mark.parametrize("name", SMALL)
def test_gradients_stay_small_and_right(results: Results, name: str) -> None:
    found = results[name]
    assert found["off"] < 1e-6
    assert found["bytes"] == found["alone"]
    assert found["ranks"] == 0.0
    assert found["dense"] == 0
    assert 0 < found["small"] < found["full"] / 3


def test_no_sync_sends_once_a_step(results: Results) -> None:
    assert results["no_sync"]["small"] == results["static_graph"]["small"]


def test_a_split_graph_is_split(results: Results) -> None:
    assert results["split"]["graphs"] > 2
    assert results["graph break"]["graphs"] == 2


def test_a_tied_weight_is_averaged_in_full(results: Results) -> None:
    found = results["tied"]
    assert found["off"] < 1e-6
    assert found["bytes"] == found["alone"]
    assert found["dense"] == 4 * 4 * 16 * 4  # steps, the table


def test_parts_of_a_model_in_two_ddps(results: Results) -> None:
    found = results["two in one loss"]
    assert found["off"] < 1e-6
    assert found["bytes"] == found["alone"]
    assert min(found["sent"]) > 0


def test_a_dropped_ddp_leaves_nothing(results: Results) -> None:
    assert results["rebuilt"]["alive"] is False
    assert results["rebuilt"]["hooks"] == 0


@pytest.mark.parametrize("name", ["midway", "copied"])
def test_full_state_goes_on(results: Results, name: str) -> None:
    found = results[name]
    assert found["off"] < 1e-6
    assert found["bytes"] == found["alone"]


def test_a_hook_of_the_users_own_keeps_gradients_full(results: Results) -> None:
    found = results["strange hook"]
    assert found["off"] < 1e-6  # of small gradients' steps
    assert len(found["said"]) == 1
    assert "communication hook _strange" in found["said"][0]
    assert "gradients='dense'" in found["said"][0]


def test_uneven_inputs_keep_gradients_full(results: Results) -> None:
    said = results["joined from the start"]["said"]
    assert len(said) == 1
    assert "uneven inputs (join)" in said[0]
    later = results["joined later"]
    assert later["error"] == "UnsupportedError"
    assert "up.weight (32, 16)" in later["text"]
    assert "gradients='dense'" in later["text"]


def test_an_end_of_backward_that_cannot_be_seen_raises(results: Results) -> None:
    found = results["boxed and reentrant"]
    assert found["error"] == "UnsupportedError"
    assert "use_reentrant=False" in found["text"]


def test_ranks_with_another_basis_raise(results: Results) -> None:
    found = results["another basis"]
    assert found["error"] == "UnsupportedError"
    assert "up.weight (32, 16) comes in another basis" in found["text"]


@pytest.mark.parametrize("order", ORDERS)
def test_fully_shard_in_any_order(results: Results, order: str) -> None:
    """The step is that of small gradients, the state is full-size, and both are said."""
    found = results[f"fsdp {order}"]
    assert found["off"] < 1e-6
    assert found["bytes"] == results["fsdp exact"]["bytes"] > found["alone"]
    assert len(found["said"]) == 1
    assert "fully_shard takes full gradients" in found["said"][0]
    assert found["small"] is None
    assert all("fully_shard" in reason for reason in found["reasons"])
    assert found["reasons"]


def test_fully_shard_with_exact_rewrites_alone_says_nothing(results: Results) -> None:
    assert results["fsdp exact"]["off"] < 1e-6
    assert results["fsdp exact"]["said"] == []


@pytest.mark.parametrize("order", ["shard, blocks", "blocks, shard"])
def test_galore_projects_sharded_weights(results: Results, order: str) -> None:
    """Moments and projectors are those of one process, on every rank."""
    found = results[f"galore {order}"]
    assert found["off"] < 1e-6
    assert found["bytes"] < results["fsdp exact"]["bytes"]
