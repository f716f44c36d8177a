"""Adam's fused op in plain aten, with every hyperparameter a tensor.   [exact]

    hyperparameters_as_inputs
        _fused_adamw_(..., lr=1e-3, beta1=0.9, ...) --> _fused_adamw_(..., lr=lr, beta1=beta1, ...)
        lr, beta1, beta2, weight_decay and eps become 0-d float64 inputs, so that a
        scheduler needs no recompile. A weight decay of 0 stays a constant.

    lower_fused_adam, per parameter, with t = step (already incremented) and g the gradient:
        g <- -g                    if maximize
        g <- g + wd w              if the decay is L2        w <- (1 - lr wd) w  if decoupled
        m <- b1 m + (1 - b1) g     v <- b2 v + (1 - b2) g^2  u = max(u, v) if amsgrad, else v
        w <- w - lr / (1 - b1^t) * m / (sqrt(u) / sqrt(1 - b2^t) + eps)

Identity: the definition of torch's fused kernel (aten/src/ATen/native/FusedAdam.cpp),
which computes bfloat16 and float16 in float32 and rounds at each store.
Source: Kingma & Ba 2015; Loshchilov & Hutter 2019 (decoupled); Reddi et al. 2018 (amsgrad).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass, aten, insert, widened

FUSED = (aten._fused_adam_.default, aten._fused_adamw_.default)
DECOUPLED = aten._fused_adamw_.default
HYPERPARAMETERS = ("lr", "beta1", "beta2", "weight_decay", "eps")


def hyperparameters_as_inputs() -> Pass:
    """Replace the hyperparameters of all fused nodes by shared inputs, after the others."""

    def rewrite(gm: GraphModule) -> None:
        for name in HYPERPARAMETERS:
            written = [n for n in _fused(gm) if isinstance(n.kwargs[name], float)]
            written = [n for n in written if (name, n.kwargs[name]) != ("weight_decay", 0.0)]
            if written:
                place = _input(gm, name)
                for node in written:
                    node.update_kwarg(name, place)

    identity = "a number and a 0-d input that holds it are the same number"
    return Pass("hyperparameters_as_inputs", rewrite, exact=True, identity=identity)


def lower_fused_adam() -> Pass:
    """Replace every fused node by the aten ops that define it."""

    def rewrite(gm: GraphModule) -> None:
        for fused in _fused(gm):
            for w, g, m, v, *rest in zip(*filter(None, fused.args), strict=True):
                _update(fused, w, g, m, v, *rest)
            gm.graph.erase_node(fused)

    identity = "the definition of torch's fused Adam(W) kernel, in plain aten"
    return Pass("lower_fused_adam", rewrite, exact=True, identity=identity)


def _fused(gm: GraphModule) -> list[Node]:
    return [n for target in FUSED for n in gm.graph.find_nodes(op="call_function", target=target)]


def _input(gm: GraphModule, name: str) -> Node:
    places = gm.graph.find_nodes(op="placeholder")
    fake_mode = places[0].meta["val"].fake_mode
    with gm.graph.inserting_after(places[-1]):
        node = gm.graph.placeholder(name)
    with fake_mode:
        node.meta["val"] = torch.empty((), dtype=torch.float64)
    node.meta.update(argument=len(places), hyperparameter=True)
    return node


def _update(fused: Node, w: Node, g: Node, m: Node, v: Node, *rest: Node) -> None:
    def emit(target: Any, *args: Any) -> Node:
        return insert(fused, target, *args)

    def scaled(x: Node, factor: Node) -> Node:
        return emit(aten.mul.Tensor, x, factor)

    def one_minus(x: Node) -> Node:
        return emit(aten.rsub.Scalar, x, 1)

    def wide(x: Node) -> Node:
        return widened(fused, x)

    set_: Any = fused.kwargs
    lr, b1, b2, eps, decay = (set_[k] for k in ("lr", "beta1", "beta2", "eps", "weight_decay"))
    step = insert(fused, aten._to_copy.default, rest[-1], dtype=torch.float64)
    bias1 = one_minus(emit(aten.pow.Tensor_Tensor, b1, step))
    root2 = emit(aten.sqrt.default, one_minus(emit(aten.pow.Tensor_Tensor, b2, step)))
    length = emit(aten.div.Tensor, lr, bias1)

    grad, weight = wide(g), wide(w)
    if set_["maximize"]:
        grad = emit(aten.neg.default, grad)
    if decay != 0.0 and fused.target is DECOUPLED:
        weight = scaled(weight, one_minus(scaled(lr, decay)))
    elif decay != 0.0:
        grad = emit(aten.add.Tensor, grad, scaled(weight, decay))
    first = emit(aten.add.Tensor, scaled(wide(m), b1), scaled(grad, one_minus(b1)))
    square = emit(aten.mul.Tensor, grad, grad)
    second = emit(aten.add.Tensor, scaled(wide(v), b2), scaled(square, one_minus(b2)))
    stored = [(m, first), (v, second)]
    if set_["amsgrad"]:
        second = emit(aten.maximum.default, wide(rest[0]), second)
        stored.append((rest[0], second))
    root = emit(aten.div.Tensor, emit(aten.sqrt.default, second), root2)
    move = emit(aten.div.Tensor, scaled(first, length), emit(aten.add.Tensor, root, eps))
    stored.append((w, emit(aten.sub.Tensor, weight, move)))
    for target, value in stored:
        emit(aten.copy_.default, target, value)
