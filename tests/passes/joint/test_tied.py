"""A tied embedding has one gradient of the vocabulary's size: the pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from graphs import Builder, execute, joint_graph, show
from hypothesis import given, settings
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import GPT2Config, GPT2LMHeadModel

import memrewrite
from memrewrite.compiler.pipeline import run
from passes.base import aten
from passes.joint.tied import add_rows_in_place
from passes.split.live import timeline

V, D, N = 7, 4, 5


def put(z: Tensor, i: Tensor, g: Tensor) -> Tensor:
    return z.index_put((i,), g, accumulate=True)


def tied(w: Tensor, i: Tensor) -> Tensor:
    return F.linear(torch.tanh(Lookup.apply(w, i)), w)  # (N, V)


class Lookup(torch.autograd.Function):
    """An embedding whose backward is what the compiler's decomposition of it is."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, i: Tensor) -> Tensor:
        ctx.save_for_backward(i)
        ctx.shape = w.shape
        return w[i]  # (N, D)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (i,) = ctx.saved_tensors
        return put(torch.full(ctx.shape, 0, dtype=g.dtype), i, g), None


def test_printed_form() -> None:
    gm = joint_graph(tied, [torch.randn(V, D)], [torch.randint(0, V, (N,))])
    (step,) = run(gm, [add_rows_in_place()])
    assert step.exact
    assert_expected_inline(
        show(gm),
        """\
index: [5, 4] = index.Tensor(arg0_1, [arg1_1])
tanh: [5, 4] = tanh.default(index)
t: [4, 7] = t.default(arg0_1)
mm: [5, 7] = mm.default(tanh, t)
t_1: [7, 5] = t.default(arg2_1)
mm_1: [7, 4] = mm.default(t_1, tanh)
t_2: [4, 7] = t.default(mm_1)
t_3: [7, 4] = t.default(t)
mm_2: [5, 4] = mm.default(arg2_1, t_3)
t_4: [7, 4] = t.default(t_2)
tanh_backward: [5, 4] = tanh_backward.default(mm_2, tanh)
index_put_default: [7, 4] = index_put.default(t_4, [arg1_1], tanh_backward, True)
return (mm, index_put_default, None)""",
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(1, 12), st.sampled_from(["w", "ww", "three"])
)
def test_the_gradient_is_the_same(v: int, d: int, n: int, how: str) -> None:
    programs: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "w": tied,
        "ww": lambda w, i: Lookup.apply(w, i) * Lookup.apply(w, i.flip(0)),  # two lookups, no head
        "three": lambda w, i: F.linear(Lookup.apply(w, i) + Lookup.apply(w, i.flip(0)), w),
    }
    w, i = torch.randn(v, d, dtype=torch.float64), torch.randint(0, v, (n,))
    gm = joint_graph(programs[how], [w], [i])
    dy = torch.randn_like(programs[how](w, i))
    before, text = execute(gm, w, i, dy), show(gm)
    run(gm, [add_rows_in_place()])
    assert show(gm) != text
    for was, now in zip(before, execute(gm, w, i, dy), strict=True):
        torch.testing.assert_close(now, was, rtol=1e-12, atol=1e-12)
    once = show(gm)
    run(gm, [add_rows_in_place()])
    assert show(gm) == once


def near_misses() -> dict[str, GraphModule]:
    found = {}

    def case(name: str, build: Callable[[Builder, Any, Any], Any], low: bool = False) -> None:
        b = Builder()
        a, i, g = b.place("a", V, D), b.place("i", N), b.place("g", N, D)
        i.meta["val"] = i.meta["val"].long()
        dtype = torch.bfloat16 if low else torch.float32
        for node in (a, g):
            node.meta["val"] = node.meta["val"].to(dtype)
        zeros = b.graph.call_function(aten.full.default, ([V, D], 0), {"dtype": dtype})
        with b.mode:
            zeros.meta["val"] = torch.zeros(V, D, dtype=dtype)
        rows = b.op(aten.index_put.default, zeros, [i], g, True)
        graph = b.returns(*build(b, b.op(aten.tanh.default, a), rows))
        graph.eliminate_dead_code()
        found[name] = GraphModule(nn.Module(), graph)

    def scaled(b: Builder, a: Any, p: Any) -> Any:
        node = b.op(aten.add.Tensor, a, p)
        node.kwargs = {"alpha": 2}
        return [node]

    def not_zeros(b: Builder, a: Any, p: Any) -> Any:
        p.args[0].args = ([V, D], 1)
        return [b.op(aten.add.Tensor, a, p)]

    def replaced(b: Builder, a: Any, p: Any) -> Any:
        p.args = (*p.args[:3], False)
        return [b.op(aten.add.Tensor, a, p)]

    def in_columns(b: Builder, a: Any, p: Any) -> Any:
        a.meta["val"] = a.meta["val"].t().contiguous().t()
        return [b.op(aten.add.Tensor, a, p)]

    case("in low precision", lambda b, a, p: [b.op(aten.add.Tensor, a, p)], low=True)
    case("multiplied", lambda b, a, p: [b.op(aten.mul.Tensor, a, p)])
    case("a read twice", lambda b, a, p: [b.op(aten.add.Tensor, a, p), b.op(aten.sin.default, a)])
    case("p read twice", lambda b, a, p: [b.op(aten.add.Tensor, a, p), b.op(aten.sin.default, p)])
    case("to itself", lambda b, a, p: [b.op(aten.add.Tensor, p, p)])
    case("to an input", lambda b, a, p: [b.op(aten.add.Tensor, a.args[0], p)])
    case("to a number", lambda b, a, p: [b.op(aten.add.Tensor, p, 1.0)])
    case("scaled", scaled)
    case("into ones", not_zeros)
    case("that replaces", replaced)
    case("in columns", in_columns)
    return found


@pytest.mark.parametrize("name", near_misses())
def test_near_misses_are_left_alone(name: str) -> None:
    gm = near_misses()[name]
    before = show(gm)
    add_rows_in_place().rewrite(gm)
    assert show(gm) == before


def test_predicted_backward_has_one_gradient() -> None:
    gm = joint_graph(tied, [torch.randn(V, D)], [torch.randint(0, V, (N,))])
    sizes = []
    for todo in ([], [add_rows_in_place()]):
        run(gm, todo)
        sizes.append(sum(buffer.bytes for buffer in timeline(gm.graph, {}).buffers))
    assert sizes[0] - sizes[1] == 2 * V * D * 4  # put and the sum: both are in dW's buffer


def test_a_tied_model_is_trained_as_without_the_pass(tmp_path: Path) -> None:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=96, n_positions=16, n_embd=16, n_layer=1, n_head=2, **dropout)
    model = GPT2LMHeadModel(config).double().train()
    tokens = torch.randint(0, 96, (2, 16))
    model(tokens).logits.square().mean().backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad()
    memrewrite.compile(model, backend="aot_eager")(tokens).logits.square().mean().backward()
    for w, p in zip(wanted, model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, w, rtol=1e-10, atol=1e-12)
    (graph,) = json.loads((memrewrite.dump(model, tmp_path) / "dump.json").read_text())["graphs"]
    (step,) = (s for s in graph["passes"] if s["name"] == "add_rows_in_place")
    assert step["inserted"] == 1
