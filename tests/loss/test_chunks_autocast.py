"""The loss in chunks in low precision: autocast, ambient and in the graph, float16, casts."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import memrewrite
from memrewrite.loss.autocast import autocast_at
from memrewrite.loss.lazy import LazyLogits
from passes.chunked_loss import op

BF16, FP16 = torch.bfloat16, torch.float16
SCALE = 2.0**16


class Head(nn.Module):
    """An embedding, whose gradient is that of h, and a head; logits through `loss`."""

    def __init__(
        self, loss: Any, vocabulary: int = 48, width: int = 24, bias: bool = False
    ) -> None:
        super().__init__()
        self.embedding, self.loss = nn.Embedding(vocabulary, width), loss
        self.head = nn.Linear(width, vocabulary, bias=bias)

    def forward(self, tokens: Tensor, labels: Tensor) -> Any:
        return self.loss(self.head, self.embedding(tokens), labels)


def plainly(head: nn.Module, h: Tensor, y: Tensor) -> Any:
    z = head(h)
    return F.cross_entropy(z.view(-1, z.shape[-1]), y.view(-1), ignore_index=-100), z


def upcast(head: nn.Module, h: Tensor, y: Tensor) -> Any:
    z = head(h)
    wide = z.float() * 0.5
    return F.cross_entropy(wide.view(-1, z.shape[-1]), y.view(-1), label_smoothing=0.1), z


def upcast_first(head: nn.Module, h: Tensor, y: Tensor) -> Any:
    z = head(h)
    return F.cross_entropy(z.float().flatten(0, 1), y.flatten()), z


def summed(head: nn.Module, h: Tensor, y: Tensor) -> Any:
    z = head(h)
    kept = z[:, :-1].reshape(-1, z.shape[-1]).float()
    return F.cross_entropy(kept, y[:, 1:].reshape(-1), reduction="sum") / y.numel(), z


def capped(head: nn.Module, h: Tensor, y: Tensor) -> Any:
    """Gemma 2's, in the dtype of the linear."""
    z = 30 * torch.tanh(head(h) / 30)
    return F.cross_entropy(z.view(-1, z.shape[-1]).float(), y.view(-1)), z


def under(dtype: torch.dtype | None) -> Any:
    return torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()


def compiled(model: nn.Module, chunks: Any = 3) -> nn.Module:
    return memrewrite.compile(copy.deepcopy(model), backend="aot_eager", loss_chunks=chunks)


def plain(model: nn.Module) -> nn.Module:
    return compiled(model, False)


def trained(model: nn.Module, inputs: Any, dtype: torch.dtype | None, scale: float = 1.0) -> Any:
    """The outputs of a step, and its gradients without the loss scale, in float64."""
    with under(dtype):
        out = model(**inputs)
    (scale * out[0].float()).backward()
    for p in model.parameters():
        assert p.grad is not None and p.grad.dtype == p.dtype
    return out, {n: p.grad.double() / scale for n, p in model.named_parameters()}  # type: ignore


def logits_of(out: Any) -> Tensor:
    return out.logits if hasattr(out, "logits") else out[1]


def no_worse(model: nn.Module, inputs: Any, dtype: Any, scale: float = 1.0) -> None:
    """In chunks the loss and its gradients have no larger errors than with whole logits."""
    (want, exact), (got, mine), (theirs, whole) = (
        trained(net, inputs, d, s)
        for net, d, s in (
            (copy.deepcopy(model).double(), None, 1.0),
            (compiled(model), dtype, scale),
            (plain(model), dtype, scale),
        )
    )
    loss, error = want[0], (theirs[0] - want[0]).abs()
    assert (got[0] - loss).abs() <= 1.05 * error + 1e-6 * loss
    assert got[0].dtype == theirs[0].dtype
    for name, value in exact.items():
        least = 1e-7 * value.norm()
        off, limit = (mine[name] - value).norm(), (whole[name] - value).norm()
        assert off <= 1.05 * limit + least, (name, off / limit)
    lazy, z = logits_of(got), logits_of(theirs)
    assert type(lazy) is LazyLogits and lazy.dtype == z.dtype
    assert torch.equal(lazy + 0, z)


def batch(vocabulary: int, *shape: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, vocabulary, shape)
    return {"tokens": tokens, "labels": torch.where(torch.rand(shape) < 0.2, -100, tokens)}


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("loss", "vocabulary", "width", "rows", "how"),
    [
        (plainly, 48, 24, 7, ""),
        (upcast, 301, 64, 50, "bias"),
        (summed, 64, 16, 33, "tied"),
        (capped, 48, 24, 7, ""),
    ],
)
def test_autocast_is_as_precise_as_whole_logits(
    dtype: Any, loss: Any, vocabulary: int, width: int, rows: int, how: str
) -> None:
    torch.manual_seed(0)
    model = Head(loss, vocabulary, width, how == "bias")
    if how == "tied":
        model.head.weight = model.embedding.weight
    no_worse(model, batch(vocabulary, 3, rows), dtype, SCALE if dtype == FP16 else 1.0)


@pytest.mark.parametrize("dtype", [None, BF16])
def test_a_model_in_float16_is_as_precise_as_whole_logits(dtype: Any) -> None:
    """Alone, and beside autocast to another dtype."""
    torch.manual_seed(0)
    model = Head(upcast_first, 301, 64, True).half()
    no_worse(model, batch(301, 3, 50), dtype, SCALE)


SMALL = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def llama() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, **SMALL, num_attention_heads=2)).train()


def texts() -> dict[str, Tensor]:
    tokens = torch.randint(3, 96, (4, 16))
    return {"input_ids": tokens, "labels": torch.where(torch.rand(4, 16) < 0.2, -100, tokens)}


CAPPED: dict[str, Any] = {
    "Gemma2": {"num_key_value_heads": 2, "head_dim": 16, "final_logit_softcapping": 2.0},
    "Granite": {"logits_scaling": 4.0},
}


@pytest.mark.parametrize("name", ["Llama", *CAPPED])
def test_hugging_face_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")
    own = {"num_attention_heads": 2, **CAPPED.get(name, {})}
    model = getattr(hf, f"{name}ForCausalLM")(config(**LLAMA, **SMALL, **own))
    no_worse(model.train(), texts(), BF16)


# --- float16 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wide", "scale"),  # given: of h and w; the linear is in float16
    [(FP16, True, SCALE), (torch.float32, True, SCALE), (FP16, False, 2.0**15)],
)
def test_gradients_do_not_underflow_before_the_loss_scale(
    given: torch.dtype, wide: bool, scale: float
) -> None:
    """Of the labels that never occur: p is 4e-7, and p / count below the least float16."""
    torch.manual_seed(0)
    h, w = torch.randn(2048, 8).to(given), (torch.randn(512, 8) / 8).to(given)
    bias = torch.where(torch.arange(512) < 16, 12.0, 0.0).to(given)
    y = torch.randint(0, 16, (2048,))
    grads = {}
    for dtype in (given, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (h, w, bias)]
        compute = FP16 if dtype == given else None
        loss = op(*leaves, y, [], wide, -100, 0.0, True, 4, True, None, compute)[0]
        assert loss.dtype == (dtype if dtype == torch.float64 or not wide else torch.float32)
        grads[dtype] = torch.autograd.grad(scale * loss.to(torch.float64), leaves)
    for mine, exact in zip(grads[given], grads[torch.float64], strict=True):
        assert mine.dtype == given
        assert (mine[16:] - exact[16:]).norm() < 2e-3 * exact[16:].norm()


def test_a_row_whose_probability_is_one_does_not_overflow() -> None:
    """Neither do the scales of the logits, nor sums over many rows of one label."""
    h, w = torch.full((4096, 2), 30.0, dtype=FP16), torch.eye(2, dtype=FP16)
    h[:, 1] = 0
    y, (h, w) = torch.ones(4096, dtype=torch.int64), (h.requires_grad_(), w.requires_grad_())
    for steps in ([], [8.0], [0.25, 3.0]):
        loss = op(h, w, None, y, steps, True, -100, 0.0, True, 1, True)[0]
        dh, dw = torch.autograd.grad(loss * 64, (h, w))
        scale = torch.tensor(steps).prod()
        torch.testing.assert_close(dw[0, 0].float(), 64 * 30 * scale)
        torch.testing.assert_close(dh[0, 0].float(), 64 * scale / 4096, rtol=1e-3, atol=0)


def test_no_label_at_all_in_float16() -> None:
    h, w = (torch.randn(s, dtype=FP16, requires_grad=True) for s in ((4, 3), (5, 3)))
    loss = op(h, w, None, torch.full((4,), -100), [], True, -100, 0.0, True, 2, True)[0]
    assert loss.isnan() and not any(g.any() for g in torch.autograd.grad(loss * 0 + loss, (h, w)))


def test_the_operation_does_not_know_the_autocast_around_it() -> None:
    torch.manual_seed(0)
    h, w, y = torch.randn(6, 5), torch.randn(7, 5), torch.randint(0, 7, (6,))
    got, want = [], []
    for dtype, found in ((BF16, got), (None, want)):
        with under(dtype):
            found += op(h, w, None, y, [], True, -100, 0.0, True, 2, True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- autocast in the graph ------------------------------------------------------------------------


def entered(head: nn.Module, h: Tensor, y: Tensor) -> Any:
    with torch.autocast("cpu", BF16):
        return plainly(head, h, y)


def left_before_the_loss(head: nn.Module, h: Tensor, y: Tensor) -> Any:
    with torch.autocast("cpu", BF16):
        z = head(h)
    return F.cross_entropy(z.view(-1, z.shape[-1]).float(), y.view(-1)), z


def off_in_the_middle(head: nn.Module, h: Tensor, y: Tensor) -> Any:
    with torch.autocast("cpu", BF16):
        with torch.autocast("cpu", enabled=False):
            z = head(h + 0)
        return F.cross_entropy(z.view(-1, z.shape[-1]), y.view(-1)), z


@pytest.mark.parametrize("loss", [entered, left_before_the_loss, off_in_the_middle])
@pytest.mark.parametrize("ambient", [None, BF16])
def test_autocast_in_the_graph(loss: Any, ambient: Any) -> None:
    torch.manual_seed(0)
    no_worse(Head(loss), batch(48, 3, 20), ambient)


def test_autocast_at_a_node() -> None:
    enter, leave = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
    graph = torch.fx.Graph()
    nodes = [graph.placeholder("x")]
    outer = graph.call_function(enter, ("cpu", FP16, True, True))
    nodes.append(graph.call_function(torch.relu, (nodes[0],)))
    other = graph.call_function(enter, ("cuda", BF16, True, True))
    inner = graph.call_function(enter, ("cpu", None, True, True))
    nodes.append(graph.call_function(torch.relu, (nodes[0],)))
    off = graph.call_function(enter, ("cpu", BF16, False, True))
    nodes.append(graph.call_function(torch.relu, (nodes[0],)))
    for entered in (off, inner, other):
        graph.call_function(leave, (entered,))
    nodes.append(graph.call_function(torch.relu, (nodes[0],)))
    graph.call_function(leave, (outer,))
    nodes.append(graph.call_function(torch.relu, (nodes[0],)))
    inside = [FP16, BF16, None, FP16]
    for ambient in (None, BF16):
        with under(ambient):
            assert [autocast_at(n, "cpu") for n in nodes] == [ambient, *inside, ambient]


def test_logits_are_computed_as_in_the_forward_whatever_holds_when_they_are_read() -> None:
    torch.manual_seed(0)
    model, inputs = Head(plainly), batch(48, 2, 9)
    nets = compiled(model), plain(model)
    with under(BF16):
        lazy, z = (net(**inputs)[1] for net in nets)
    for dtype in (None, FP16, BF16):
        with under(dtype):
            value = lazy.detach() + 0
        assert value.dtype == BF16 and torch.equal(value, z)
    (z**2).sum().backward(), (lazy**2).sum().backward()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_accelerate_trains_as_without_chunks_and_reads_no_logits() -> None:
    inputs, losses, nets = texts(), [], []
    for chunks in (3, False):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        net = memrewrite.compile(llama(), backend="aot_eager", loss_chunks=chunks)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        net, optimizer = accelerator.prepare(net, optimizer)
        for _ in range(4):
            out = net(**inputs)
            assert out.logits.dtype == torch.float32
            assert type(out.logits) is (LazyLogits if chunks else Tensor)
            accelerator.backward(out.loss)
            optimizer.step(), optimizer.zero_grad()
            losses.append(out.loss.item())
        nets.append(net)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    torch.testing.assert_close(losses[:4], losses[4:], rtol=1e-3, atol=0)
    told = str(memrewrite.report(nets[0]))
    assert "in 3 chunks of" in told and "logits computed" not in told


# --- casts of the logits --------------------------------------------------------------------------


def returns(change: Callable[[Tensor], Any]) -> Callable[..., Any]:
    def loss(head: nn.Module, h: Tensor, y: Tensor) -> Any:
        found, z = plainly(head, h, y)
        return found, change(z)

    return loss


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z.float(),
        lambda z: z.to(torch.float32) / 3,
        lambda z: z.to(dtype=torch.float32).tanh() * 2,
    ],
)
def test_logits_may_be_cast_and_scaled_on_their_way_out(change: Any) -> None:
    torch.manual_seed(0)
    no_worse(Head(returns(change)), batch(48, 3, 20), BF16)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda z: (z, z.float()), "more than once"),
        (lambda z: (z.float(), z.float() * 2), "more than once"),
        (lambda z: (y := z.float(), y * 2), "y reads the logits too"),
        (lambda z: z.float().softmax(-1), "softmax reads the logits too"),
        (lambda z: z.float().sum() + z.float(), "reads the logits too"),
    ],
)
def test_other_readers_of_the_logits_are_declined(change: Any, why: str) -> None:
    model = compiled(Head(returns(change)))
    with pytest.warns(memrewrite.MemrewriteWarning, match=why), under(BF16):
        model(**batch(48, 3, 20))


def test_mixed_dtypes_outside_of_autocast_raise_as_before() -> None:
    model = compiled(Head(plainly))
    model.head.bfloat16()
    with pytest.warns(memrewrite.MemrewriteWarning, match="differ in dtype"):
        with pytest.raises(RuntimeError, match="same dtype"):
            model(**batch(48, 3, 20))


CASTS: list[tuple[Any, torch.dtype]] = [
    (lambda z: z.float(), torch.float32),
    (lambda z: z.double(), torch.float64),
    (lambda z: z.half(), FP16),
    (lambda z: z.to(torch.float32), torch.float32),
    (
        lambda z: z.to(
            "cpu",
            torch.float32,
        ),
        torch.float32,
    ),
    (lambda z: z.to(device="cpu", dtype=torch.float32, non_blocking=True), torch.float32),
    (lambda z: z.type(torch.float64), torch.float64),
    (lambda z: z.float().double(), torch.float64),
    (lambda z: z.to("cpu").bfloat16(), BF16),
]


def test_casts_of_lazy_logits_stay_lazy() -> None:
    torch.manual_seed(0)
    model, inputs = Head(plainly), batch(48, 3, 20)
    mine, whole = compiled(model), plain(model)
    with under(BF16):
        lazy, z = mine(**inputs)[1], whole(**inputs)[1]
    assert lazy.to(BF16) is lazy and lazy.bfloat16() is lazy and lazy._value is None
    for cast, dtype in CASTS:
        made, want = cast(lazy), cast(z)
        assert type(made) is LazyLogits and made._value is None
        assert made.dtype == want.dtype == dtype and made.shape == want.shape
        assert made.requires_grad and not cast(lazy.detach()).requires_grad
        with torch.no_grad():
            frozen = cast(lazy)
        assert frozen is lazy or not (frozen.requires_grad or frozen.half().requires_grad)
        value = made + 0
        assert value.dtype == dtype and torch.equal(value, want)
        for net, y in ((mine, cast(lazy)), (whole, want)):
            net.zero_grad()
            y.square().sum().backward(retain_graph=True)
        for p, q in zip(mine.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    lazy.sum()
    assert type(lazy.float()) is Tensor  # its values are there


def test_what_is_more_than_a_cast_reads_the_logits() -> None:
    torch.manual_seed(0)
    model, inputs = compiled(Head(plainly)), batch(48, 2, 5)
    for read in (
        lambda z: z.to(torch.float32, copy=True),
        lambda z: z.to(torch.zeros(1)),
        lambda z: z.to("meta"),
        lambda z: z.int(),
        lambda z: z.type(),
    ):
        lazy = model(**inputs)[1]
        assert type(read(lazy)) is not LazyLogits and lazy._value is not None


def test_a_cast_of_logits_that_are_out_of_date_is_out_of_date() -> None:
    model, inputs = compiled(Head(plainly)), batch(48, 2, 5)
    lazy = model(**inputs)[1]
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="written to outside"):
        lazy.double().sum()
