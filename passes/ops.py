"""The IR ops: named operations that passes match, and that `passes.lower` replaces by aten.

They are in the graph between the pass that inserts them and the lowering, so that passes
and dumps can name them; no compiled program contains them. They are inserted after
differentiation, so that, but for attach, they need no gradient formula.

With unit v in R^M, G = ceil(D / M), and x padded with zeros up to G * M channels:

    compress(x, v)        z[n, g]       = <x[n, gM : gM+M], v>      (N, D), (M,) -> (N, G)
    reconstruct(z, v, D)  x^[n, gM + j] = z[n, g] v[j],  gM + j < D  (N, G), (M,) -> (N, D)

Both are linear maps, and each is the transpose of the other. Sums run in v's dtype
(float32, or float64 for float64 inputs) and are rounded once to the input's dtype.
Source: Miles et al. 2024, arXiv:2405.17991, algorithm 1; the zero padding is PEFT's.

With P of r orthonormal columns, from the left or the right of an (O, D) gradient:

    project(G, P)        P^T G  (O, D), (O, r) -> (r, D)     G P    (O, D), (D, r) -> (O, r)
    project_back(Z, P)   P Z    (r, D), (O, r) -> (O, D)     Z P^T  (O, r), (D, r) -> (O, D)

Each is the transpose of the other, and project(project_back(Z)) = Z.
Source: Zhao et al. 2024, arXiv:2403.03507, equations 11 and 12 (one side at a time).

add_present(g, t)   g <- g + t; g is left as it is where the storage of t is empty (a zero t)
hold(z)             z; keeps a compiler from simplifying across the compressed activation
attach(y, ports)    y; makes y depend on inputs, so that autograd returns gradients for them.
                    A pass replaces these gradients, which are zeros, by small ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def compress(x: Tensor, v: Tensor) -> Tensor:
    """One number per sub-token: (N, D), (M,) -> (N, ceil(D / M))."""
    padded = F.pad(x, (0, -x.shape[1] % v.shape[0]))  # (N, G*M)
    subtokens = padded.view(x.shape[0], -1, v.shape[0])  # (N, G, M)
    return (subtokens.to(v.dtype) * v).sum(-1).to(x.dtype)  # (N, G)


def reconstruct(z: Tensor, v: Tensor, features: int) -> Tensor:
    """z (x) v, without the padding: (N, G), (M,) -> (N, features)."""
    outer = z.to(v.dtype).unsqueeze(-1) * v  # (N, G, M)
    return outer.to(z.dtype).flatten(1)[:, :features].clone()  # (N, D)


def _compress_shape(x: Tensor, v: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], -(-x.shape[1] // v.shape[0]))  # (N, G)


def _reconstruct_shape(z: Tensor, v: Tensor, features: int) -> Tensor:
    return z.new_empty(z.shape[0], features)  # (N, D)


def project(g: Tensor, p: Tensor, left: bool) -> Tensor:
    """The gradient g (O, D) in the coordinates of P: (r, D) if left, else (O, r)."""
    return p.t() @ g if left else g @ p


def project_back(z: Tensor, p: Tensor, left: bool) -> Tensor:
    """The transpose of `project`: coordinates back to (O, D)."""
    return p @ z if left else z @ p.t()


def attach(y: Tensor, ports: list[Tensor]) -> Tensor:
    """A copy of y: an op must not return its input."""
    return y.clone()


def held(z: Tensor) -> Tensor:
    """A copy of z: an op must not return its input."""
    return z.clone()


def add_in_place(g: Tensor, t: Tensor) -> None:
    """g <- g + t, unless the storage of t is empty."""
    if t.untyped_storage().nbytes():
        g.add_(t)


def _attach_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    return dy, [dy.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.ports]


def _attach_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.ports = [(port.shape, port.dtype) for port in inputs[1]]


_Library: Any = torch.library.Library
_library = _Library("memrewrite", "DEF")
_library.define("velora_compress(Tensor x, Tensor v) -> Tensor")
_library.define("velora_reconstruct(Tensor z, Tensor v, SymInt features) -> Tensor")
_library.define("galore_project(Tensor g, Tensor p, bool left) -> Tensor")
_library.define("galore_project_back(Tensor z, Tensor p, bool left) -> Tensor")
_library.define("add_present(Tensor(a!) g, Tensor t) -> ()")
_library.define("hold(Tensor z) -> Tensor")
_library.define("port_attach(Tensor y, Tensor[] ports) -> Tensor")
for _name, _kernel, _shape in (
    ("velora_compress", compress, _compress_shape),
    ("velora_reconstruct", reconstruct, _reconstruct_shape),
    ("galore_project", project, project),
    ("galore_project_back", project_back, project_back),
    ("hold", held, held),
    ("port_attach", attach, attach),
    ("add_present", add_in_place, lambda g, t: None),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"memrewrite::{_name}", _shape, lib=_library)

velora_compress = torch.ops.memrewrite.velora_compress.default
velora_reconstruct = torch.ops.memrewrite.velora_reconstruct.default
galore_project = torch.ops.memrewrite.galore_project.default
galore_project_back = torch.ops.memrewrite.galore_project_back.default
add_present = torch.ops.memrewrite.add_present.default
hold = torch.ops.memrewrite.hold.default
port_attach = torch.ops.memrewrite.port_attach.default
torch.library.register_autograd(
    "memrewrite::port_attach", _attach_backward, setup_context=_attach_context, lib=_library
)
