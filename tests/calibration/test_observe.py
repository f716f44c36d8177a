"""Reading the inputs of weights: nothing runs twice that may not, and v is the oracle's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from models import loss_of, vectors_of
from quick import only
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memrewrite
from memrewrite import VeLoRA
from memrewrite.session.session import session_of

SIZE = 8
seen: list[str] = []  # what the custom operation below was called with


@torch.library.custom_op("test_calibrate::note", mutates_args=())
def note(x: Tensor, what: str) -> Tensor:
    seen.append(what)
    return x.clone()


@note.register_fake
def _(x: Tensor, what: str) -> Tensor:
    return torch.empty_like(x)


note.register_autograd(lambda ctx, g: (g, None))


@torch.library.custom_op("test_calibrate::count", mutates_args=("counter",))
def count(x: Tensor, counter: Tensor) -> None:
    seen.append("count")
    counter.add_(1)


@torch.library.custom_op("test_calibrate::double_", mutates_args=("x",))
def double_(x: Tensor) -> None:
    x.mul_(2)


class Twice(torch.autograd.Function):
    """x W^T, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x


class Net(nn.Module):
    """Two layers and whatever stands between."""

    counter: Tensor

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        self.norm, self.mha = nn.BatchNorm1d(32), nn.MultiheadAttention(32, 2)
        self.average = nn.Parameter(torch.ones(32))
        self.register_buffer("counter", torch.zeros(()))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)


def hook_on_hidden(s: Net, x: Tensor) -> Tensor:
    h = torch.tanh(s.a(x))
    h.register_hook(lambda g: g * 0.5)
    return s.b(h)


def hook_on_output(s: Net, x: Tensor) -> Tensor:
    y = s.b(torch.tanh(s.a(x)))
    y.register_hook(lambda g: g * 0.5)
    return y


def hook_on_input(s: Net, x: Tensor) -> Tensor:
    x = x * s.average
    x.register_hook(lambda g: g * 0.5)
    return s.b(torch.tanh(s.a(x)))


def hook_in_checkpoint(s: Net, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(lambda x: s.b(hook_on_hidden(s, x)), x, use_reentrant=False)
    return y


def hook_on_a_weight(s: Net, x: Tensor) -> Tensor:
    s.a.weight.register_hook(lambda g: g * 0.5)
    return s.b(torch.tanh(s.a(x)))


def region(s: Net, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(lambda x: torch.tanh(s.a(x)), x, use_reentrant=False)
    return s.b(y)


def leaf(s: Net, x: Tensor) -> Tensor:
    h = torch.tanh(s.a(x)).detach().requires_grad_()
    return s.b(h * s.average)


def written(s: Net, x: Tensor) -> Tensor:
    h = s.a(x)
    h.view(-1).mul_(2)
    h[0] = 0.5
    h += 1
    double_(h)
    F.leaky_relu(h, 0.1, True)
    return s.b(h)


def input_written(s: Net, x: Tensor) -> Tensor:
    x.add_(1)
    return s.b(torch.tanh(s.a(x)))


def teacher(s: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = s.b(s.a(x + 3))
    return s.b(torch.tanh(s.a(x))) - target


def buffers(s: Net, x: Tensor) -> Tensor:
    h = F.dropout(s.norm(s.a(x)), 0.3)
    with torch.no_grad():
        s.counter += 1
    return s.b(h * s.counter)


def averaged(s: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        s.average.mul_(0.5)
    return s.b(torch.tanh(s.a(x * s.average.detach())))


def noted(s: Net, x: Tensor) -> Tensor:
    h = torch.tanh(s.a(x))
    note(h.detach(), "aside")
    count(h.detach(), s.counter)
    return note(s.b(h), "after")


def function(s: Net, x: Tensor) -> Tensor:
    y: Any = Twice.apply(torch.tanh(s.b(x)), s.a.weight)
    return y


def autocast(s: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        h = s.a(x)
        h = h.float() + s.b(x * 2).float()
    return torch.tanh(h)


def attention(s: Net, x: Tensor) -> Tensor:
    y: Tensor = s.mha(x[None], x[None], x[None], need_weights=False)[0][0]
    return s.b(torch.tanh(s.a(y)))


def broken(s: Net, x: Tensor) -> Tensor:
    h = torch.tanh(s.a(x))
    torch._dynamo.graph_break()
    return s.b(h)


def branch(s: Net, x: Tensor) -> Tensor:
    y: Any = torch.cond(x.sum() > 1e6, lambda x: torch.sin(x), lambda x: torch.cos(x), (x,))
    return s.b(torch.tanh(s.a(y)))


def inner_gradient(s: Net, x: Tensor) -> Tensor:
    g: Tensor = torch.func.grad(lambda x: torch.sin(x * s.average).square().sum())(x)
    return s.b(torch.tanh(s.a(g)))


def raw(s: Net, x: Tensor) -> Tensor:
    return torch.addmm(s.b.bias, x @ s.a.weight.T, s.b.weight.mT)


PROGRAMS = [
    *(hook_on_hidden, hook_on_output, hook_on_input, hook_in_checkpoint, hook_on_a_weight),
    *(region, leaf, written, input_written, teacher, buffers, averaged),
    *(noted, function, autocast, attention, broken, branch, inner_gradient, raw),
]
OTHERWISE: dict[Any, Any] = {  # inputs of `a` and `b` that no module of the program is called with
    function: lambda s, x: {"a": [torch.tanh(s.b(x))], "b": [x]},
    raw: lambda s, x: {"a": [x], "b": [x @ s.a.weight.T]},
}


CASES = list(product(PROGRAMS, ("batch_mean", "running_mean")))
QUICK = [(program, "batch_mean") for program in (hook_on_hidden, hook_in_checkpoint)]
QUICK += [(program, "batch_mean") for program in (written, input_written, teacher)]
QUICK += [(program, "batch_mean") for program in (autocast, attention, broken, raw)]
QUICK += [(buffers, "running_mean"), (hook_on_a_weight, "running_mean")]


def named(value: Any) -> str:
    return value if isinstance(value, str) else value.__name__


def inputs_of(model: Net, x: Tensor) -> dict[str, list[Tensor]]:
    """What each weight's linears read while gradients are on, eagerly."""
    if model.between in OTHERWISE:
        found: dict[str, list[Tensor]] = OTHERWISE[model.between](model, x)
        return found
    found = {"a": [], "b": []}
    for name in found:

        def hook(module: nn.Module, args: Any, name: str = name) -> None:
            if torch.is_grad_enabled():
                found[name].append(args[0].detach().clone())

        getattr(model, name).register_forward_pre_hook(hook)
    model(x.clone())
    return found


def trained(model: Net, x: Tensor, init: Any) -> dict[str, Any]:
    """Everything that a step leaves behind."""
    seen.clear()
    memrewrite.compile(
        model, velora=VeLoRA(subtoken_size=SIZE, sites=["a", "b"], init=init), backend="aot_eager"
    )
    torch.manual_seed(3)
    given = x.clone()
    y = model(given)
    y.float().square().mean().backward()
    biases = {n: p.grad for n, p in model.named_parameters() if p.ndim == 1 and p.grad is not None}
    return {
        "y": y.detach(),
        "given": given,
        "random": torch.rand(3),
        "autocast": torch.tensor(torch.is_autocast_enabled("cpu")),
        **dict(model.named_buffers()),
        **{n: p.detach() for n, p in model.named_parameters()},
        **{f"gradient of {n}": g for n, g in biases.items()},
    }


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("program", "init"), only(CASES, *QUICK), ids=named)
def test_a_step_is_what_it_is_without_calibration(program: Any, init: Any) -> None:
    torch.manual_seed(0)
    model, x = Net(program), torch.randn(6, 32)
    twin, plain = copy.deepcopy(model), copy.deepcopy(model)
    theirs = trained(plain, x, "ones")
    noted_once = list(seen)
    ours = trained(model, x, init)
    assert seen == noted_once
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    torch.manual_seed(3)
    expected = inputs_of(twin, x)
    vectors = vectors_of(model)
    assert vectors and session_of(model).vectors.unseen == set()
    if program is buffers and init == "running_mean":
        return  # compiled, dropout draws another mask than eagerly
    for name, v in vectors.items():
        other = oracle.unit_mean([t.float() for t in expected[name]], SIZE)
        torch.testing.assert_close(v, other.float(), rtol=1e-5, atol=1e-5)


def test_only_what_is_needed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No linear for its own sake, and nothing behind the last x; what is not written is no copy."""
    from memrewrite.calibration import replay

    ran: list[str] = []
    copied: list[Any] = []
    run, copy_of = replay.Replay.call_function, replay._copy

    def call(self: Any, target: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(target, "__name__", str(target))
        if name in ("linear", "tanh", "tag_activation_checkpoint"):  # a hook has many names
            ran.append(name)
        return run(self, target, args, kwargs)

    monkeypatch.setattr(replay.Replay, "call_function", call)
    monkeypatch.setattr(replay, "_copy", lambda v: copied.append(v) or copy_of(v))
    trained(Net(hook_on_hidden), torch.randn(6, 32), "batch_mean")
    assert ran == ["linear", "tanh"] and copied == []
    ran.clear()
    trained(Net(hook_in_checkpoint), torch.randn(6, 32), "batch_mean")
    assert ran == ["tag_activation_checkpoint", "linear", "tanh", "linear"]
    trained(Net(input_written), torch.randn(6, 32), "batch_mean")
    assert len(copied) == 1
    trained(Net(averaged), torch.randn(6, 32), "batch_mean")
    assert len(copied) == 2


@torch.library.custom_op("test_calibrate::once", mutates_args=())
def once(x: Tensor) -> Tensor:
    seen.append("once")
    if len(seen) == 1:
        raise RuntimeError("may not be called without gradients")
    return x.clone()


@once.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


once.register_autograd(lambda ctx, g: g)


def test_what_cannot_be_replayed_costs_v_and_says_so() -> None:
    def program(s: Net, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = once(torch.tanh(s.a(x).float()))
        return s.b(h)

    seen.clear()
    model, x = Net(program), torch.randn(6, 32)
    velora = VeLoRA(subtoken_size=SIZE, sites=["a", "b"])
    memrewrite.compile(model, velora=velora, backend="aot_eager")
    with pytest.warns(memrewrite.MemrewriteWarning) as caught:
        loss_of(x)(model).backward()
    (warning,) = [str(w.message) for w in caught]
    assert warning.startswith("no v for b: calibration runs what their inputs need once more")
    assert "once" in warning and "RuntimeError: may not be called without gradients" in warning
    assert "init='ones' or 'random'" in warning and "leave them out of sites" in warning
    assert not torch.is_autocast_enabled("cpu")  # the region was left
    vectors = vectors_of(model)
    torch.testing.assert_close(vectors["b"], torch.ones(SIZE) / SIZE**0.5)
    torch.testing.assert_close(vectors["a"].double(), oracle.unit_mean([x], SIZE))
    rows = {row.name: row.reason for row in memrewrite.report(model).sites}
    assert "v is ones, because what x needs cannot be run twice (h, a once" in rows["b"]
    assert "v is" not in rows["a"]
    loss_of(x)(model).backward()  # and training goes on, without another word


def test_inside_vmap_there_is_no_x_to_read_but_what_runs_is_seen() -> None:
    for init in ("batch_mean", "running_mean"):
        model, x = Net(lambda s, x: s.b(torch.vmap(s.a)(x))), torch.randn(6, 32)
        trained(model, x, init)
        found = vectors_of(model)["a"].double()
        torch.testing.assert_close(found, oracle.unit_mean([x], SIZE), rtol=1e-5, atol=1e-5)
