"""Sets of configurations, and configurations chosen by names, sets and patterns."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from memrewrite.bench.configurations import Configuration, parse

SETS: dict[str, Sequence[str]] = {
    "quick": (
        "torch.compile",
        "torch.compile+checkpointing",
        "budget-0.5",
        "memrewrite",
        "velora-all-16",
        "velora-all-16+checkpointing",
    ),
    "activations": (
        "eager",
        "eager+checkpointing",
        "torch.compile",
        "aggressive",
        "budget-0.75",
        "budget-0.5",
        "budget-0.25",
        "torch.compile+checkpointing",
        "fp8",
        "memrewrite",
        "velora-auto-16",
        "velora-all-8",
        "velora-all-16",
        "velora-all-16+dense",
        "velora-all-32",
        "velora-all-64",
        "memrewrite+checkpointing",
        "velora-auto-16+checkpointing",
        "velora-all-16+checkpointing",
        "velora-all-16+budget-0.5",
        "memrewrite+fp8",
        "velora-all-16+fp8",
        "activations-int8",
        "activations-int4",
        "activations-int8+checkpointing",
        "activations-int8+moments-int8",
        "activations-int4+moments-int8",
    ),
    "optimizers": (
        "torch.compile",
        "adamw8bit-torchao",
        "adamw8bit-bitsandbytes",
        "adafactor",
        "galore-torch",
        "apollo-torch",
        "moments-int8",
        "galore",
        "galore+moments-int8",
        "galore+pushed",
        "velora-auto-16+galore+pushed",
        "velora-all-16+galore",
    ),
    "lora": (
        "lora+eager",
        "lora+torch.compile",
        "lora+peft-velora-16",
        "lora+velora-all-16",
        "lora+nf4+torch.compile",
    ),
    "train": (  # within an hour on two cores; with train-more, two
        "torch.compile",
        "velora-auto-16+lr-sqrt",
        "slowed-auto-0.25",
        "frozen-auto",
        "velora-all-16+lr-sqrt",
        "slowed-all-0.25",
        "frozen-all",
        "slowed-galore-0.25",
        "galore-torch",
        "galore",
    ),
    "finetune": (  # of real weights: bench train --pretrained
        "torch.compile",
        "memrewrite",
        "frozen-all",
        "frozen-auto",
        "slowed-all-0.25",
        "lora+torch.compile",
        "lora-16+torch.compile",
        "lora+peft-velora-16",
        "lora+velora-all-16",
        "lora+checkpointing",
        "lora+nf4+torch.compile",
        "lora+nf4+peft-velora-16",
        "lora+nf4+velora-all-16",
        "velora-auto-16",
        "velora-auto-16+lr-sqrt",
        "velora-all-8+lr-sqrt",
        "velora-all-16",
        "velora-all-16+lr-sqrt",
        "velora-all-32+lr-sqrt",
        "galore",
        "galore+pushed",
        "fp8",
        "adamw8bit-torchao",
        "adamw8bit-bitsandbytes",
        "moments-int8",
        "galore+moments-int8",
        "activations-int8+moments-int8",
        "activations-int4+moments-int8",
    ),
    "train-more": (
        "velora-auto-16",
        "velora-all-8",
        "velora-all-16",
        "velora-all-64",
        "galore+staggered",
        "galore+pushed",
        "velora-auto-16+galore",
        "velora-auto-16+galore+pushed",
        "activations-int8+moments-int8",
        "activations-int4+moments-int8",
        "galore+moments-int8",
    ),
}


def chosen(text: str) -> list[Configuration]:
    """Configurations by names, sets, and patterns over all sets, separated by commas.

    Raises ValueError for anything else.
    """
    everything = dict.fromkeys(name for names in SETS.values() for name in names)
    found: dict[str, Configuration] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word == "all":
            names = [name for name in everything if not parse(name).only_training]
        elif any(c in word for c in "*?["):
            names = [name for name in everything if fnmatchcase(name, word)]
            if not names:
                raise ValueError(f"no configuration matches {word!r}")
        else:
            names = list(SETS.get(word, [word]))
        for name in names:
            found.setdefault(name, parse(name))
    if not found:
        raise ValueError(f"name a configuration, or a set: {', '.join(SETS)}, all")
    return list(found.values())
