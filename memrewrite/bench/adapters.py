"""LoRA adapters for the bench: PEFT's, its VeLoRA, and a base in NF4 (QLoRA).

Sources: Hu et al. 2021, arXiv:2106.09685; Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from memrewrite.bench.configurations import LORA_RANK, Configuration
from memrewrite.sites.select import select
from memrewrite.sites.weights import candidates

HEADS = {"classifier", "score"}  # new ones of classifiers, which every method trains exactly
BLOCKED = {*HEADS, "lm_head"}  # linears that QLoRA leaves in full precision


def adapted(model: Any, configuration: Configuration, trained: bool = False) -> Any:
    """The model with adapters on VeLoRA's auto sites; with a sub-token size, PEFT's VeLoRA.

    B is random unless `trained`: at zero, the gradient of A would be zero and show no error. PEFT
    has one number of groups for all layers: here each layer is set up with that of its width.
    Its v is, as in the paper and in memrewrite, the mean of the first batch, then frozen.
    """
    size, rank = configuration.peft_velora, configuration.lora or LORA_RANK
    from peft import LoraConfig, VeloraConfig, get_peft_model
    from peft.tuners.lora.variants import VeloraLinearVariant

    where = sorted(select(candidates(model), "auto"))
    heads = [name for name, _ in model.named_children() if name in HEADS]
    if configuration.nf4:
        _to_nf4(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=where,
        modules_to_save=heads or None,
        init_lora_weights=trained,
    )
    if size:
        config.velora_config = VeloraConfig(init_type="batch_average_once")
    found: Any = get_peft_model(model, config)
    for module in found.modules():
        if size and hasattr(module, "lora_velora_num_groups"):
            groups = math.ceil(module.in_features / size)
            config.velora_config = VeloraConfig(groups, init_type="batch_average_once")
            VeloraLinearVariant.init(module, "default", config)
    return found


def _to_nf4(model: nn.Module) -> None:
    """Every linear of the body in 4 bits, its scales in 8, as QLoRA has them."""
    import bitsandbytes

    bnb: Any = bitsandbytes.nn

    linears = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]
    for name, linear in linears:
        if BLOCKED.isdisjoint(name.split(".")):
            small = bnb.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=linear.weight.dtype,
                quant_type="nf4",
            )
            weight = linear.weight.data
            small.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4")
            small.bias = linear.bias
            model.set_submodule(name, small.to(weight.device))
