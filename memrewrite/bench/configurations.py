"""A way of training, written as its parts joined by `+`.

    eager                      no compiler
    torch.compile              the baseline of every ratio
    memrewrite                 exact rewrites only
    velora-SITES-M             memrewrite with VeLoRA; SITES is auto or all, M the sub-token size
    galore                     memrewrite with GaLore at --rank
    module:function            called with the model, which it compiles or wraps in place

    activations-NAME           memrewrite with a registered method for activations
    moments-NAME               memrewrite with a registered form of Adam's moments
    chunks-N                   memrewrite with loss_chunks=N; 0: whole logits
    dense                      VeLoRA with full-size gradients and moments
    pushed                     GaLore with gradients in the projector's coordinates
    staggered                  GaLore with refreshes spread over all steps
    checkpointing              of each layer, by the model's method for it
    aggressive                 torch's aggressive_recomputation
    budget-X                   torch's activation_memory_budget=X
    fp8-X                      torch's fp8 pass over saved activations of X MiB and more; fp8 is
                               fp8-2.5: attention masks do not survive it
    lora-R                     LoRA adapters of rank R on the value and down projections; lora is
                               lora-8
    peft-velora-M              PEFT's VeLoRA on them
    nf4                        QLoRA: the frozen linears in bitsandbytes' 4-bit NF4
    adamw8bit-torchao  adamw8bit-bitsandbytes  adafactor  galore-torch  apollo-torch
                               in place of fused AdamW
    frozen-SITES               those weights get no gradient: a control for `bench train`
    slowed-SITES-X             AdamW takes X times the step on those weights: another control.
                               SITES is auto or all, VeLoRA's, or galore, those it projects
    lr-sqrt                    VeLoRA(lr_scale="sqrt"): their steps divided by sqrt(M)

Parts compose: `velora-all-16+checkpointing+galore`. A name without eager or a part of
memrewrite is compiled by torch.compile, such as `checkpointing`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Literal

Engine = Literal["eager", "torch.compile", "memrewrite"]
Controlled = Literal["auto", "all", "galore"]
BASELINE = "torch.compile"
OPTIMIZERS = {  # part -> package that must be installed
    "adamw8bit-torchao": "torchao",
    "adamw8bit-bitsandbytes": "bitsandbytes",
    "adafactor": "torch",
    "galore-torch": "galore_torch",
    "apollo-torch": "apollo_torch",
}
CONTROLLED: tuple[Controlled, ...] = ("auto", "all", "galore")
PARAMETRIC = (
    *("velora-auto-16", "velora-all-16", "budget-0.5", "fp8-2.5", "peft-velora-16"),
    *("slowed-auto-0.25", "chunks-8", "lora-16"),
)
LORA_RANK = 8
# MiB; torch's default, 100, excludes the activations of small models. With 0 the masks of
# 8 x 256 tokens (2 MiB) are rounded too, and the gradients of LLaMA and GPT-2 are not finite.
FP8_FROM = 2.5


@dataclass(frozen=True)
class Configuration:
    """One row of the table.

    velora: M, or None. chunks: of the loss; None: as many as pay, 0: whole logits. budget, ...:
    torch's settings. exact: gradients are those of the plain model and the optimizer is Adam,
    so that only cost can differ. slowed: the sites with smaller steps, slowdown: their factor.
    """

    name: str
    engine: Engine = "torch.compile"
    own: str | None = None
    checkpointing: bool = False
    aggressive: bool = False
    budget: float | None = None
    fp8: float | None = None
    lora: int | None = None  # the rank
    peft_velora: int | None = None
    nf4: bool = False
    velora: int | None = None
    sites: Literal["auto", "all"] = "auto"
    dense: bool = False
    activations: str | None = None
    moments: str | None = None
    chunks: int | None = None
    galore: bool = False
    pushed: bool = False
    staggered: bool = False
    optimizer: str = "adamw"
    frozen: Controlled | None = None
    slowed: Controlled | None = None
    slowdown: float = 1.0
    lr_sqrt: bool = False

    @property
    def exact(self) -> bool:
        approximate = self.velora or self.peft_velora or self.nf4 or self.galore or self.own
        approximate = approximate or self.fp8 is not None or self.activations or self.moments
        controlled = self.frozen or self.slowed
        return not approximate and self.optimizer == "adamw" and not controlled

    @property
    def ours(self) -> bool:
        return self.engine == "memrewrite"

    @property
    def projected(self) -> bool:
        """Whether the optimizer refreshes projectors."""
        together = self.galore and not self.staggered
        return together or self.optimizer in ("galore-torch", "apollo-torch")

    @property
    def only_training(self) -> bool:
        """Whether it differs from another one only in the loss, not in its cost."""
        return bool(self.frozen or self.slowed or self.lr_sqrt)

    @property
    def baseline(self) -> str:
        """The name of the configuration that its ratios refer to."""
        return f"{self._adapters}+{BASELINE}" if self.lora else BASELINE

    @property
    def reference(self) -> str:
        """The name of the configuration with the exact gradients."""
        return f"{self._adapters}+eager" if self.lora else "eager"

    @property
    def _adapters(self) -> str:
        return "lora" if self.lora == LORA_RANK else f"lora-{self.lora}"

    @property
    def functorch(self) -> dict[str, Any]:
        wanted: dict[str, Any] = {}
        if self.aggressive:
            wanted["aggressive_recomputation"] = True
        if self.budget is not None:
            wanted["activation_memory_budget"] = self.budget
        return wanted

    @property
    def inductor(self) -> dict[str, Any]:
        """Inductor's settings of the fp8 pass, whose default is bf16 only."""
        if self.fp8 is None:
            return {}
        how = {
            "size_in_mb": self.fp8,
            "allowed_dtypes": "torch.float32;torch.bfloat16",
            "quant_type": "torch.float8_e5m2",
            "use_scaling": True,
        }
        return {"post_grad_fusion_options": {"activation_quantization_aten_pass": how}}

    def missing(self) -> str | None:
        """A required package that is not installed, or None."""
        wanted = [OPTIMIZERS.get(self.optimizer, "torch")]
        wanted += ["peft"] if self.lora else []
        wanted += ["bitsandbytes"] if self.nf4 else []
        return next((package for package in wanted if find_spec(package) is None), None)


@dataclass
class _Reading:
    """The facts of the parts that are parsed so far."""

    fields: dict[str, Any] = field(default_factory=dict)

    def say(self, part: str, **facts: Any) -> None:
        for key, value in facts.items():
            if self.fields.get(key, value) != value:
                raise ValueError(f"{part!r} and an earlier part disagree about {key}")
            self.fields[key] = value


def parse(name: str) -> Configuration:
    """The configuration of that name. Raises ValueError for an unknown part."""
    said = _Reading()
    for part in name.split("+"):
        said.say(part, **_meaning(part))
    found = replace(Configuration(name), **said.fields)
    if found.dense and found.velora is None:
        raise ValueError(f"{name!r}: dense says how velora returns its gradients")
    if found.pushed and not found.galore:
        raise ValueError(f"{name!r}: pushed says how galore takes its gradients")
    if found.staggered and (found.pushed or not found.galore):
        raise ValueError(f"{name!r}: staggered says when galore refreshes, from full gradients")
    if found.lr_sqrt and found.velora is None:
        raise ValueError(f"{name!r}: lr-sqrt divides the steps of velora's weights")
    if found.lr_sqrt and found.dense:
        raise ValueError(f"{name!r}: lr-sqrt needs velora's small gradients")
    if found.slowed and (found.optimizer != "adamw" or found.velora or found.galore):
        raise ValueError(f"{name!r}: slowed is a control, of AdamW and nothing else")
    if found.peft_velora and not found.lora:
        raise ValueError(f"{name!r}: PEFT's VeLoRA needs lora")
    if found.nf4 and not found.lora:
        raise ValueError(f"{name!r}: weights in NF4 are not trained; nf4 needs lora")
    return found


def _meaning(part: str) -> dict[str, Any]:
    plain: dict[str, dict[str, Any]] = {
        "eager": {"engine": "eager"},
        "torch.compile": {"engine": "torch.compile"},
        "memrewrite": {"engine": "memrewrite"},
        "checkpointing": {"checkpointing": True},
        "aggressive": {"aggressive": True},
        "fp8": {"fp8": FP8_FROM},
        "lora": {"lora": LORA_RANK},
        "nf4": {"nf4": True},
        "dense": {"dense": True},
        "pushed": {"pushed": True},
        "staggered": {"staggered": True},
        "galore": {"engine": "memrewrite", "galore": True},
        "lr-sqrt": {"lr_sqrt": True},
        **{f"frozen-{sites}": {"frozen": sites} for sites in CONTROLLED},
        **{optimizer: {"optimizer": optimizer} for optimizer in OPTIMIZERS},
    }
    if part in plain:
        return plain[part]
    if ":" in part:
        return {"engine": "eager", "own": part}
    for kind in ("activations", "moments"):  # the model's own module may register the name
        if name := part.removeprefix(f"{kind}-").removeprefix(part):
            return {"engine": "memrewrite", kind: name}
    kind, _, value = part.rpartition("-")
    if kind == "budget" and _is_share(value):
        return {"budget": float(value)}
    if kind == "fp8" and value.replace(".", "", 1).isdecimal():
        return {"fp8": float(value)}
    for controlled in CONTROLLED:
        if kind == f"slowed-{controlled}" and _is_share(value):
            return {"slowed": controlled, "slowdown": float(value)}
    if kind == "chunks" and value.isdecimal():
        return {"engine": "memrewrite", "chunks": int(value)}
    if value.isdecimal() and int(value):
        if kind == "lora":
            return {"lora": int(value)}
        if kind == "peft-velora":
            return {"engine": "eager", "peft_velora": int(value)}
        for sites in ("auto", "all"):
            if kind == f"velora-{sites}":
                return {"engine": "memrewrite", "velora": int(value), "sites": sites}
    known = [*plain, *PARAMETRIC]
    near = difflib.get_close_matches(part, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(
        f"no part of a configuration is named {part!r}{hint} There are {', '.join(known)}, "
        "and module:function"
    )


def _is_share(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal() and 0 <= float(text) <= 1
