"""The loss in chunks under the tools that train models: hooks, fully_shard, DDP, checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import memrewrite
from memrewrite.loss.lazy import LazyLogits
from tests.loss.test_chunks import pair, same_gradients, shifted


@pytest.fixture
def process_group() -> Iterator[None]:
    dist: Any = torch.distributed
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def read(model: Any) -> bool:
    return "logits computed" in str(memrewrite.report(model))


def test_a_hook_computes_nothing_and_sees_the_gradient_whichever_way_it_comes() -> None:
    model, compiled, tokens = pair(shifted)
    for net in (model, compiled):
        _, z = net(tokens, tokens)
        z.register_hook(lambda g: 2 * g)
        z.register_hook(lambda g: g + 1).remove()
        assert net is model or not read(compiled)
        z.square().sum().backward()
    same_gradients(compiled, model)
    seen: list[Tensor] = []
    _, z = compiled(tokens, tokens)
    z.register_hook(seen.append)
    torch.autograd.backward([z], [torch.ones(z.shape)])  # not through the values
    assert len(seen) == 1 and bool((seen[0] == 1).all())


def test_a_number_of_chunks_for_a_loss_outside_of_the_model_warns_once() -> None:
    model, whole = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)
    memrewrite.compile(model, backend="aot_eager", loss_chunks=4)
    memrewrite.compile(whole, backend="aot_eager")  # "auto" asks for nothing
    for net, expected in ((whole, 0), (model, 1)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(2):
                loss = F.cross_entropy(net(torch.randn(4, 8)), torch.randint(16, (4,)))
                loss.backward()
                optimizer.step()
        words = [str(w.message) for w in told if w.category is memrewrite.MemrewriteWarning]
        assert len(words) == expected
        assert all("Linear computes no cross entropy" in word for word in words)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own jvp
def test_transforms_of_torch_func_are_those_of_whole_logits_and_one_warning_says_so() -> None:
    model, compiled, tokens = pair(shifted)

    def of(net: Any) -> list[Any]:
        weights = {name: p.detach() for name, p in net.named_parameters()}

        def value(w: dict[str, Tensor], t: Tensor) -> Tensor:
            loss, z = torch.func.functional_call(net, w, (t, t))
            return loss + z.square().mean()

        both = torch.stack([tokens, tokens.flip(0)])
        ones = {name: torch.ones_like(w) for name, w in weights.items()}
        _, along = torch.func.jvp(lambda w: value(w, tokens), (weights,), (ones,))
        found = torch.func.grad(value)(weights, tokens)
        return [*found.values(), along, torch.func.vmap(lambda t: value(weights, t))(both)]

    with pytest.warns(memrewrite.MemrewriteWarning, match=r"transform of torch\.func"):
        got = of(compiled)
    torch.testing.assert_close(got, of(model))


def test_compiled_functions_of_the_logits() -> None:
    model, compiled, tokens = pair(shifted)
    for function in (lambda z: z.softmax(-1).max(-1).values.sum(), lambda z: (z**2).sum()):
        found = []
        for net in (model, compiled):
            net.zero_grad()
            z = net(tokens, tokens)[1]
            torch.compile(function, backend="aot_eager")(z.detach())
            value = torch.compile(function, backend="aot_eager")(z)
            value.backward()
            found.append(value)
        torch.testing.assert_close(*found)
        same_gradients(compiled, model)


@pytest.mark.parametrize("first", ["detached", "itself"])
def test_what_is_detached_shares_the_memory_of_the_logits(first: str) -> None:
    _, compiled, tokens = pair(shifted)
    _, z = compiled(tokens, tokens)
    small = z.detach()
    if first == "itself":
        z.sum()
    small[..., 0] = 7
    assert bool((z[..., 0] == 7).all()) and not (small + 0).requires_grad


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_a_first_read_without_gradients_leaves_them_to_the_second(context: Any) -> None:
    model, compiled, tokens = pair(shifted)
    for net in (model, compiled):
        _, z = net(tokens, tokens)
        with context():
            z.softmax(-1)
        z.square().sum().backward()
    same_gradients(compiled, model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_the_logits(reentrant: bool) -> None:
    model, compiled, tokens = pair(shifted)
    for net in (model, compiled):
        z = net(tokens, tokens)[1]
        checkpoint(lambda z: z.exp().sum(), z, use_reentrant=reentrant).backward()
    same_gradients(compiled, model)


def sharded(**how: Any) -> tuple[Any, Any, Tensor]:
    model, compiled, tokens = pair(shifted)
    for net in (model, compiled):
        fully_shard(net, **how)
    return model, compiled, tokens


@pytest.mark.parametrize("how", [{}, {"reshard_after_forward": True}])
def test_fully_shard_computes_no_logits(process_group: None, how: dict[str, Any]) -> None:
    model, compiled, tokens = sharded(**how)
    for _ in range(2):
        for net in (model, compiled):
            net.zero_grad()
            loss, z = net(tokens, tokens)
            loss.backward()
        assert type(z) is LazyLogits and not read(compiled)
        for p, q in zip(compiled.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p.grad.to_local(), q.grad.to_local())


def test_logits_are_read_before_fully_shard_frees_the_head_and_never_wrong_after(
    process_group: None,
) -> None:
    model, compiled, tokens = sharded()
    for net in (model, compiled):
        loss, z = net(tokens, tokens)
        (loss + z.square().mean()).backward()
    for p, q in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad.to_local(), q.grad.to_local())
    loss, late = compiled(tokens, tokens)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"freed the head's weight.*loss_chunks=False"):
        late.sum()
    torch.optim.SGD(compiled.parameters(), lr=0.1).step()
    compiled(tokens, tokens)  # the weight is there again, and is another
    with pytest.raises(RuntimeError, match=r"freed the head's weight"):
        late.sum()


def test_fully_shard_that_keeps_the_head_leaves_logits_after_the_step(process_group: None) -> None:
    _, compiled, tokens = sharded()
    compiled.set_reshard_after_backward(False)
    loss, z = compiled(tokens, tokens)
    want = compiled(tokens, tokens)[1] + 0
    loss.backward()
    torch.optim.SGD(compiled.parameters(), lr=0.1).step()
    torch.testing.assert_close(z, want)


@pytest.mark.parametrize("how", [{}, {"find_unused_parameters": True}])
def test_ddp(process_group: None, how: dict[str, Any]) -> None:
    model, compiled, tokens = pair(shifted)
    want, _ = model(tokens, tokens)
    ddp = DDP(compiled, **how)
    loss, z = ddp(tokens, tokens)
    want.backward(), loss.backward()
    same_gradients(compiled, model)
    assert how or not read(compiled)  # to find unused parameters, DDP clones its outputs
    torch.testing.assert_close(z + 0, model(tokens, tokens)[1])
