"""Means over ranks without a second process: one rank, and ranks that are played."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Stack, gradients, loss_of, relative_errors
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import memrewrite
from memrewrite import UnsupportedError, VeLoRA
from memrewrite.gradients.basis import Vector
from memrewrite.gradients.gradient import ProjectedGrad
from memrewrite.parallel import averaging
from memrewrite.parallel.averaging import Averager

dist = torch.distributed
V = torch.ones(4) / 2


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_of_one_rank_keeps_gradients_small_and_right(one_rank: None) -> None:
    model, x = Stack(1), torch.randn(4, 32)
    alone = copy.deepcopy(model)
    for each in (model, alone):
        memrewrite.compile(each, velora=VeLoRA(8, sites="all"), backend="aot_eager")
    loss_of(x)(DDP(model)).backward()
    loss_of(x)(alone).backward()
    small = [p.grad for p in model.parameters() if isinstance(p.grad, ProjectedGrad)]
    assert len(small) == 4 and not any(grad.is_dense for grad in small)
    assert max(relative_errors(gradients(model), gradients(alone)).values()) < 1e-6


class Other:
    """Another rank: it tells and sends what `answer` makes of what this one does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
        self.sizes: list[int] = []
        self.answer = answer
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        monkeypatch.setattr(averaging, "_takes_cpu", lambda group: True)

    def all_reduce(self, t: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        self.sizes.append(t.nbytes)
        theirs = self.answer(t.clone())
        t.copy_(torch.maximum(t, theirs) if op == dist.ReduceOp.MAX else t + theirs)


def test_a_mean_goes_in_chunks_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Other(monkeypatch, lambda t: 3 * t)
    monkeypatch.setattr(averaging, "CHUNK", 40)
    tensors = [torch.randn(3), torch.randn(2, 3).double(), torch.randn(5), torch.randn(9)]
    expected = [2 * t for t in tensors]
    averaging.mean(tensors, None)
    torch.testing.assert_close(tensors, expected)
    assert other.sizes == [(3 + 5) * 4, 6 * 8, 9 * 4]  # in each dtype up to 40 bytes, or one


def averager(dense: bool = False) -> tuple[Averager, Any]:
    weight: Any = nn.Parameter(torch.zeros(6, 8))
    small = ProjectedGrad(torch.randn(6, 2), Vector(V), weight.shape)
    weight.grad = small.to_dense() if dense else small
    return Averager([("up.weight", weight)]), weight


def test_coordinates_alone_are_sent_where_all_ranks_have_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Other(monkeypatch, lambda t: 3 * t if t.is_floating_point() else t)
    ours, weight = averager()
    before = weight.grad.to_dense()
    ours.average(None, lambda weight: None)
    assert not weight.grad.is_dense
    torch.testing.assert_close(weight.grad.to_dense(), 2 * before)
    assert (ours.sent.small, ours.sent.dense, ours.sent.full) == (6 * 2 * 4, 0, 6 * 8 * 4)


def test_one_dense_gradient_makes_all_of_them_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(t: Tensor) -> Tensor:
        if t.dtype == torch.int64:
            t[0, averaging.DENSE] = 1
        return t

    Other(monkeypatch, answer)
    ours, weight = averager()
    before = weight.grad.to_dense()
    ours.average(None, lambda weight: None)
    assert type(weight.grad) is Tensor
    torch.testing.assert_close(weight.grad, before)
    assert (ours.sent.small, ours.sent.dense) == (0, 6 * 8 * 4)


def test_another_basis_on_another_rank_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(t: Tensor) -> Tensor:
        t[0, averaging.MARK] += 5
        t[0, averaging.MINUS_MARK] -= 5
        return t

    Other(monkeypatch, answer)
    ours, _ = averager()
    with pytest.raises(UnsupportedError, match=r"up\.weight \(6, 8\) comes in another basis"):
        ours.average(None, lambda weight: None)
