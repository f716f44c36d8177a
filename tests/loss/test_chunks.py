"""The loss in chunks: against eager PyTorch, and what is left alone."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import memrewrite
from memrewrite.loss import kept
from memrewrite.loss.lazy import LazyLogits
from memrewrite.session.session import session_of
from passes.chunked_loss import chunked_loss, op, workspace_of

V, D = 12, 5
Built = tuple[Tensor, Tensor]  # loss, logits


@given(
    rows=st.integers(1, 9),
    chunks=st.integers(0, 11),
    biased=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    steps=st.lists(st.sampled_from([0.5, -2.0, 0.0]), max_size=3),
    reduction=st.sampled_from(["sum", "mean"]),
    ignored=st.sets(st.integers(0, 8)),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_equal_to_cross_entropy_of_whole_logits(
    rows: int,
    chunks: int,
    biased: bool,
    smoothing: float,
    steps: list[float],
    reduction: str,
    ignored: set[int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    h, w, b = (torch.randn(s, dtype=torch.float64) for s in ((rows, D), (V, D), (V,)))
    y = torch.randint(0, V, (rows,))
    y[[i for i in ignored if i < rows]] = -1
    leaves = [t.requires_grad_() for t in (h, w, b)]
    z = F.linear(h, w, b if biased else None)
    for step in steps:
        z = z * step if step else z.tanh()
    want = F.cross_entropy(z, y, reduction=reduction, label_smoothing=smoothing, ignore_index=-1)
    mean = reduction == "mean"
    got = op(h, w, b if biased else None, y, steps, True, -1, smoothing, mean, chunks, True)[0]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)
    used = leaves if biased else leaves[:2]
    for mine, theirs in zip(
        torch.autograd.grad(3 * got, used), torch.autograd.grad(3 * want, used), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_a_label_out_of_range_raises() -> None:
    h, w, y = torch.randn(3, D), torch.randn(V, D), torch.tensor([0, V, 1])
    with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
        chunked_loss(h, w, None, y, [], True, -100, 0.0, True, 2, True)


# --- graphs ---------------------------------------------------------------------------------------


def shifted(z: Tensor, y: Tensor) -> Built:
    """As transformers 5: labels are padded and shifted."""
    y = F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(z.float().view(-1, V), y.view(-1), ignore_index=-100), z


def sliced(z: Tensor, y: Tensor) -> Built:
    """As older models: logits are sliced."""
    z = z / 4
    kept = z[..., :-1, :].contiguous()
    return F.cross_entropy(kept.view(-1, V), y[..., 1:].reshape(-1)), z


def capped(z: Tensor, y: Tensor) -> Built:
    """Gemma 2's soft cap; a sum over the number of items."""
    z = torch.tanh(z / 3) * 3
    return F.cross_entropy(z.reshape(-1, V), y.view(-1), reduction="sum") / 7, z


def smoothed(z: Tensor, y: Tensor) -> Built:
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=0.1), z


def alone(z: Tensor, y: Tensor) -> Built:
    """The logits are not returned."""
    loss = F.cross_entropy(z.view(-1, V), y.view(-1))
    return loss, loss.detach()


class Model(nn.Module):
    def __init__(self, loss: Callable[..., Built], bias: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(V, D), nn.Linear(D, D)
        self.head, self.loss = nn.Linear(D, V, bias=bias), loss
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:
        z = self.head(torch.relu(self.body(self.embedding(tokens))))
        return z if labels is None else self.loss(z, labels)


def pair(loss: Callable[..., Built], **how: Any) -> tuple[Model, Model, Tensor]:
    """A model, its compiled copy, and tokens."""
    torch.manual_seed(0)
    model = Model(loss, how.pop("bias", False), how.pop("tied", False))
    options = {"backend": "aot_eager", "loss_chunks": 3, **how}
    return model, memrewrite.compile(copy.deepcopy(model), **options), torch.randint(0, V, (2, 7))


def same_gradients(mine: nn.Module, theirs: nn.Module) -> None:
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("loss", [shifted, sliced, capped, smoothed, alone])
@pytest.mark.parametrize("bias", [False, True])
def test_models_train_as_before_and_never_hold_their_logits(
    loss: Callable[..., Built], bias: bool
) -> None:
    model, compiled, tokens = pair(loss, bias=bias, tied=not bias)
    want, logits = model(tokens, tokens)
    got, lazy = compiled(tokens, tokens)
    assert type(lazy) is (Tensor if loss is alone else LazyLogits)
    torch.testing.assert_close(got, want)
    (2 * got).backward(), (2 * want).backward()
    same_gradients(compiled, model)
    torch.testing.assert_close(lazy + 0, logits)
    assert "in 3 chunks of " in str(memrewrite.report(compiled))
    (record,) = [b.variant.record for b in session_of(compiled).bindings()]
    stages = dict(record.listings())
    for stage in ("forward", "backward"):
        assert f"14, {V}]" not in stages[stage] and f"7, {V}]" not in stages[stage]


def test_a_second_loss_on_the_logits_is_differentiated() -> None:
    model, compiled, tokens = pair(sliced)
    for net in (model, compiled):
        loss, logits = net(tokens, tokens)
        (loss + logits.float().square().mean()).backward()
    same_gradients(compiled, model)
    for _ in range(2):  # one line of the report each, however often it runs
        compiled(tokens, tokens)[1].sum()
    read = [
        row for row in str(memrewrite.report(compiled)).splitlines() if "logits computed" in row
    ]
    assert len(read) == 2 and all(f"{__file__}:" in row for row in read)


def test_the_logits_alone_are_differentiated() -> None:
    model, compiled, tokens = pair(capped)
    for net in (model, compiled):
        net(tokens, tokens)[1].pow(3).sum().backward()
    same_gradients(compiled, model)


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z**3).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        return g * 3 * z**2


def through_a_function(z: Tensor) -> None:
    Cubed.apply(z).backward()  # type: ignore[no-untyped-call]


def from_outside(z: Tensor) -> None:
    torch.autograd.backward([z], [torch.ones(z.shape)])


def by_grad_of_a_view(z: Tensor) -> None:
    z[:, -1].exp().sum().backward()


@pytest.mark.parametrize("use", [through_a_function, from_outside, by_grad_of_a_view])
def test_autograd_reaches_the_model_whichever_way_the_logits_are_used(use: Any) -> None:
    model, compiled, tokens = pair(sliced)
    for net in (model, compiled):
        use(net(tokens, tokens)[1])
    same_gradients(compiled, model)


def test_metadata_and_detach_compute_nothing() -> None:
    model, compiled, tokens = pair(shifted)
    _, lazy = compiled(tokens, tokens)
    assert (lazy.shape, lazy.size(-1), lazy.dtype, lazy.ndim) == ((2, 7, V), V, torch.float32, 3)
    assert lazy.requires_grad and lazy.grad_fn is not None and lazy.device.type == "cpu"
    assert isinstance(lazy, Tensor) and lazy is not None and len(lazy) == 2
    small = lazy.detach()
    assert not small.requires_grad and small.shape == lazy.shape
    assert "logits computed" not in str(memrewrite.report(compiled))
    want = model(tokens)
    assert torch.equal(small.argmax(-1), want.argmax(-1)) and not (small + 1).requires_grad
    loaded = pickle.loads(pickle.dumps(small))
    assert type(loaded) is Tensor
    file = io.BytesIO()
    torch.save({"logits": small}, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=True)["logits"], want.detach())
    torch.testing.assert_close(torch.from_numpy(small.cpu().numpy()), want.detach())
    assert "tensor(" in repr(lazy)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("rows", [2, 2000])
def test_logits_read_after_the_step_are_those_before_it(optimizer: Any, rows: int) -> None:
    """Few rows are kept themselves; beside many the head's weight is copied, once."""
    _, compiled, _ = pair(shifted)
    tokens = torch.randint(0, V, (2, rows))
    steps = optimizer(compiled.parameters(), lr=0.1)
    outputs = []
    for _ in range(3):
        loss, lazy = compiled(tokens, tokens)
        outputs += [lazy, lazy.detach()]
        with torch.no_grad():
            outputs.append(compiled(tokens))
        loss.backward()
        steps.step()
    copies = {id(part) for made in (outputs[0], outputs[3]) for part in made._parts[1:2]}
    assert (outputs[0]._value is None) == (rows == 2000)
    assert rows == 2 or (len(copies) == 2 and id(compiled.head.weight) not in copies)
    shared = {made._parts[1].data_ptr() for made in outputs[:2]}
    assert len(shared) == 1 or rows == 2
    for i in range(0, 9, 3):
        torch.testing.assert_close(outputs[i], outputs[i + 2])
        torch.testing.assert_close(outputs[i + 1] + 0, outputs[i + 2])


def test_nothing_is_kept_for_logits_that_are_dead_or_of_another_optimizer() -> None:
    _, compiled, _ = pair(shifted)
    tokens = torch.randint(0, V, (2, 2000))
    loss, lazy = compiled(tokens, tokens)
    loss.backward()
    torch.optim.SGD(compiled.body.parameters(), lr=0.1).step()
    assert lazy._parts[1] is compiled.head.weight
    known = len(kept._living)
    del lazy, loss
    assert len(kept._living) < known


def test_a_head_that_trains_alone_gets_the_gradient_of_logits_read_after_the_step() -> None:
    """Legal without us too: the gradient of W needs h alone."""
    model, compiled, _ = pair(shifted)
    tokens = torch.randint(0, V, (2, 2000))
    for net in (model, compiled):
        net.body.requires_grad_(False), net.embedding.requires_grad_(False)
        loss, z = net(tokens, tokens)
        loss.backward(retain_graph=True)
        torch.optim.SGD(net.parameters(), lr=0.1).step()
        net.zero_grad()
        z.square().sum().backward()
    same_gradients(compiled, model)


def test_logits_of_a_head_that_was_written_to_otherwise_raise() -> None:
    _, compiled, tokens = pair(shifted)
    _, lazy = compiled(tokens, tokens)
    _, early = compiled(tokens, tokens)
    before = early.sum()
    with torch.no_grad():
        compiled.head.weight.mul_(2)
    assert early.sum() == before
    with pytest.raises(RuntimeError, match="written to outside of an optimizer's step"):
        lazy.sum()


def test_without_labels_or_gradients_nothing_changes() -> None:
    model, compiled, tokens = pair(shifted)
    assert type(compiled(tokens)) is Tensor
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, tokens), model(tokens, tokens))
        assert type(compiled(tokens, tokens)[1]) is Tensor


def test_a_frozen_head() -> None:
    model, compiled, tokens = pair(shifted, bias=True)
    for net in (model, compiled):
        net.head.requires_grad_(False)
        net(tokens, tokens)[0].backward()
    same_gradients(compiled, model)
    assert compiled.head.weight.grad is None


@pytest.mark.parametrize("how", [{"velora": memrewrite.VeLoRA(5, ["body"])}, {"galore_rank": 2}])
@pytest.mark.parametrize("budget", [1.0, 0.1])
def test_beside_other_methods(how: dict[str, Any], budget: float) -> None:
    model, compiled, tokens = pair(shifted, **how)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        loss, logits = compiled(tokens, tokens)
        loss.backward()
    assert type(logits) is LazyLogits
    want, _ = model(tokens, tokens)
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(compiled.embedding.weight.grad, model.embedding.weight.grad)


def full(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if type(gradient) is memrewrite.ProjectedGrad else gradient


VELORA = [
    {"velora": memrewrite.VeLoRA(1 + size, ["head", "body"], scale=scale, gradients=form)}
    for size, scale, form in [(1, 1.0, "coordinates"), (4, 1.0, "dense"), (1, 2.0, "coordinates")]
]


@pytest.mark.parametrize("how", [*VELORA, {**VELORA[0], "bias": True}, {**VELORA[0], "tied": True}])
@pytest.mark.parametrize("loss", [shifted, capped])
def test_velora_at_the_head_is_that_of_whole_logits(how: dict[str, Any], loss: Any) -> None:
    """Same v, same z: the coordinates are equal, and no gradient of the head is full-size."""
    _, whole, tokens = pair(loss, loss_chunks=False, **how)
    _, compiled, _ = pair(loss, **how)
    for _ in range(2):
        for net in (whole, compiled):
            net.zero_grad()
            value, z = net(tokens, tokens)
            (3 * value).backward()
        assert type(z) is LazyLogits
        for p, q in zip(compiled.parameters(), whole.parameters(), strict=True):
            assert type(p.grad) is type(q.grad)
            torch.testing.assert_close(full(p.grad), full(q.grad))


GALORE = [
    {"galore": memrewrite.GaLore(2, 2, sites=sites, gradients="coordinates")}
    for sites in (["head"], ["head", "body"], ["embedding"])  # which a tied head shares
]


@pytest.mark.parametrize(
    "how", [*GALORE[:2], {**GALORE[0], "bias": True}, {**GALORE[2], "tied": True}]
)
@pytest.mark.parametrize("loss", [shifted, capped])
def test_galore_at_the_head_is_that_of_whole_logits(how: dict[str, Any], loss: Any) -> None:
    """Coordinates of either side, that of a refresh and that between two of them."""
    nets = [pair(loss, loss_chunks=chunks, **how)[1] for chunks in (False, 3)]
    steps = [torch.optim.AdamW(net.parameters(), lr=0.1, eps=0.1) for net in nets]
    tokens, shapes = pair(loss)[2], set()
    for _ in range(4):
        for net, step in zip(nets, steps, strict=True):
            net.zero_grad()
            value, z = net(tokens, tokens)
            (3 * value).backward()
            shapes.add(net.head.weight.grad.coordinates.shape)
            step.step()
        assert type(z) is LazyLogits
        same = zip(nets[1].parameters(), nets[0].parameters(), strict=True)
        for p, q in same:
            torch.testing.assert_close(p, q)
    assert len(shapes) == 2


def test_a_head_that_another_method_takes_stays_whole() -> None:
    other = memrewrite.VeLoRA(5, ["head"], init="running_mean")
    _, compiled, tokens = pair(shifted, velora=other)
    with pytest.warns(memrewrite.MemrewriteWarning, match="leave it out of memrewrite.VeLoRA"):
        _, logits = compiled(tokens, tokens)
    assert type(logits) is Tensor


def test_the_estimate_is_of_the_loss_in_chunks_beside_whole_logits() -> None:
    model, compiled, tokens = pair(shifted)
    compiled(tokens, tokens)
    mine, whole = (
        memrewrite.estimate(compiled, tokens, tokens),
        memrewrite.estimate(model, tokens, tokens),
    )
    totals = memrewrite.report(compiled).to_dict()["totals"]
    assert mine.rewritten.saved == totals["saved_bytes_after"] < whole.rewritten.saved
    assert mine.plain == whole.plain
    assert "in 3 chunks of 5 rows, exact" in mine.logits and mine.logits in str(mine)


def test_dynamic_shapes() -> None:
    model, compiled, _ = pair(shifted, dynamic=True)
    for rows in (3, 5, 8):
        tokens = torch.randint(0, V, (2, rows))
        model.zero_grad(), compiled.zero_grad()
        got, want = compiled(tokens, tokens), model(tokens, tokens)
        got[0].backward(), want[0].backward()
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1] + 0, want[1])
        same_gradients(compiled, model)


# --- left alone -----------------------------------------------------------------------------------


def transposed(z: Tensor, y: Tensor) -> Built:
    return F.cross_entropy(z.transpose(1, 2), y), z


def written(z: Tensor, y: Tensor) -> Built:
    return F.cross_entropy(z.mul_(2).view(-1, V), y.view(-1)), z


def two(z: Tensor, y: Tensor) -> Built:
    z = z.view(-1, V)
    return F.cross_entropy(z, y.view(-1)) + F.cross_entropy(z, y.view(-1) * 0), z


def soft(z: Tensor, y: Tensor) -> Built:
    return F.cross_entropy(z.view(-1, V), F.one_hot(y.view(-1), V).float()), z


def late_slice(z: Tensor, y: Tensor) -> Built:
    return F.cross_entropy(z.view(-1, V)[:-1], y.reshape(-1)[1:]), z


def view_returned(z: Tensor, y: Tensor) -> Built:
    z = z.view(-1, V)
    return F.cross_entropy(z, y.view(-1)), z


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (transposed, "not one of rows"),
        (written, "mul_ stands between"),
        (two, "2 calls"),
        (soft, "not one of rows"),
        (late_slice, "sliced after a view"),
        (view_returned, "as a view"),
    ],
)
def test_other_losses_stay_whole_and_say_why(loss: Callable[..., Built], why: str) -> None:
    model, compiled, tokens = pair(loss)
    with pytest.warns(memrewrite.MemrewriteWarning, match=why):
        got, want = compiled(tokens, tokens), model(tokens, tokens)
    assert type(got[1]) is Tensor
    torch.testing.assert_close(got, want)
    got[0].backward(), want[0].backward()
    same_gradients(compiled, model)
    assert why in str(memrewrite.report(compiled)).replace("\n", " ")


@pytest.mark.parametrize(
    ("wrong", "error"), [("all", TypeError), (True, TypeError), (0, ValueError)]
)
def test_wrong_numbers_of_chunks_raise(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="loss_chunks"):
        memrewrite.compile(nn.Linear(2, 2), loss_chunks=wrong)


@pytest.mark.inductor
def memory_of(run: Callable[[], Any]) -> tuple[int, int]:
    """(the most bytes that are alive in it, the bytes that are alive after it)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = run()
    events = seen.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert kept is not None
    return max(itertools.accumulate(sizes)), sum(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [torch.float32, None])
def test_the_memory_within_the_operation_is_that_predicted(dtype: Any, weight: Any) -> None:
    graph = torch.fx.Graph()
    h, w = torch.randn(512, 16, dtype=dtype), torch.randn(4096, 16).to(weight or dtype)
    y = torch.randint(4096, (512,))
    given: list[Any] = [h, w, None, y, [], True, -100, 0.0, True, 4, True, None, dtype]
    nodes = []
    for value in given:
        node = graph.placeholder("t") if isinstance(value, Tensor) else value
        if isinstance(value, Tensor):
            node.meta["val"] = value
        nodes.append(node)
    predicted = workspace_of(graph.call_function(op, tuple(nodes)))
    most, after = memory_of(lambda: op(*given))
    assert most - after == pytest.approx(predicted, rel=0.02)


def largest_allocation(run: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_inductor(dtype: torch.dtype) -> None:
    """Against float64; and neither forward nor backward allocates tokens x vocabulary."""
    errors, sizes = [], []
    length = 512 if dtype == torch.float32 else 2048  # oneDNN's scratch memory, 72 kB, is smaller
    for chunks in (8, False) if dtype == torch.bfloat16 else (8,):
        torch.manual_seed(0)
        model = Model(shifted)
        exact, tokens = copy.deepcopy(model.to(dtype)).double(), torch.randint(0, V, (4, length))
        memrewrite.compile(model, loss_chunks=chunks)

        def step(model: Model = model, tokens: Tensor = tokens) -> None:
            model.zero_grad()
            model(tokens, tokens)[0].backward()

        step()
        sizes.append(largest_allocation(step) / (tokens.numel() * V * dtype.itemsize))
        exact(tokens, tokens)[0].backward()
        grad, want = model.head.weight.grad.double(), exact.head.weight.grad
        errors.append(((grad - want).norm() / want.norm()).item())
    assert sizes[0] < 1
    if dtype == torch.float32:
        assert errors[0] < 1e-5
    else:
        assert errors[0] <= 1.1 * errors[1] < 0.05 and sizes[1] >= 1


def test_torchs_fp8_pass_rounds_no_gradient() -> None:
    """Of a mean's loss the forward would save dW, and the pass rounds what it saves."""
    torch.manual_seed(0)
    model = Model(shifted).float()
    exact, tokens = copy.deepcopy(model), torch.randint(0, V, (1, 4))
    least = model.head.weight.numel() * 4 / 2**20 / 2  # MiB: dW is larger, all else is smaller
    how = {"size_in_mb": least, "allowed_dtypes": "torch.float32", "use_scaling": True}
    options = {"post_grad_fusion_options": {"activation_quantization_aten_pass": how}}
    memrewrite.compile(model, loss_chunks=2, options=options)
    for net in (model, exact):
        net(tokens, tokens)[0].backward()
    assert "computed again in backward" in str(memrewrite.report(model))
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)
