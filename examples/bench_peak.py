"""Predicted against physical peak memory of training steps; raw JSON out.

    python examples/bench_peak.py --output docs/results/NAME.json

Each model, batch and way to compile runs in a process of its own. "physical" is the resident
high-water mark of a phase above the idle process (after a few steps, gradients dropped), plus
the exact bytes of weights, buffers and optimizer state that idle holds. "predicted" is
memrewrite.estimate's figure for the phase.
MB are 10^6 bytes. CPU only: on a GPU the allocator's own peak is the figure to compare.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import memrewrite
from memrewrite.bench.run import meters, optimizers

BATCHES = (2, 4, 8)
WAYS = ("torch.compile", "memrewrite velora all")
TOKENS = {"vocab_size": 4096, "use_cache": False, "pad_token_id": 0}
PHASES = ("forward", "backward", "step")
AdamW = functools.partial(torch.optim.AdamW, fused=True)


def llama() -> tuple[nn.Module, Callable[[int], dict[str, Tensor]]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **TOKENS,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
    )
    return LlamaForCausalLM(config), _labelled


def gpt2() -> tuple[nn.Module, Callable[[int], dict[str, Tensor]]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**TOKENS, n_embd=512, n_layer=4, n_head=8)), _labelled


def bert() -> tuple[nn.Module, Callable[[int], dict[str, Tensor]]]:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
    )
    return BertForMaskedLM(config), _labelled


def vit() -> tuple[nn.Module, Callable[[int], dict[str, Tensor]]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6
    )

    def images(batch: int) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.randn(batch, 3, 224, 224),
            "labels": torch.zeros(batch, dtype=torch.int64),
        }

    return ViTForImageClassification(config), images


def t5() -> tuple[nn.Module, Callable[[int], dict[str, Tensor]]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        **TOKENS, d_model=512, d_ff=1024, num_layers=3, num_heads=8, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config), _labelled


def _labelled(batch: int) -> dict[str, Tensor]:
    tokens = torch.randint(3, 4096, (batch, 256))
    return {"input_ids": tokens, "labels": tokens}


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "vit": vit, "t5": t5}


# --- one process -------------------------------------------------------------------------


def child(name: str, batch: int, way: str) -> dict[str, Any]:
    """Train a few steps and measure one."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    given = inputs(batch)
    optimizer = AdamW(model.train().parameters())
    if way == "torch.compile":
        model.compile()
    else:
        memrewrite.compile(model, velora=memrewrite.VeLoRA(sites="all"))
    reading = meters.meter("cpu")
    for _ in range(3):
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    idle = reading.settle()
    held = [*model.parameters(), *model.buffers(), *optimizers.state_tensors(optimizer)]
    exact = meters.unique_bytes(held)
    marks = {}
    loss = model(**given).loss
    marks["forward"] = reading.peak()
    reading.reset()
    loss.backward()
    marks["backward"] = reading.peak()
    reading.reset()
    optimizer.step()
    marks["step"] = reading.peak()
    return {phase: mark - idle + exact for phase, mark in marks.items()}


# --- all of them ---------------------------------------------------------------------------


def predict(name: str, batch: int) -> memrewrite.Estimate:
    """From the meta device: nothing is allocated."""
    with torch.device("meta"):
        model, inputs = MODELS[name]()
        given = inputs(batch)
    memrewrite.compile(model.train(), velora=memrewrite.VeLoRA(sites="all"))
    return memrewrite.estimate(model, optimizer=AdamW, **given)


def run(name: str, batch: int, way: str) -> dict[str, Any]:
    """One child's figures."""
    with tempfile.TemporaryDirectory() as cache:
        result = subprocess.run(
            [sys.executable, __file__, "--child", name, str(batch), way],
            env={**os.environ, **meters.FREE_AT_ONCE, "TORCHINDUCTOR_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures


def row(
    name: str, batch: int, way: str, predicted: Any, physical: dict[str, Any]
) -> dict[str, Any]:
    guess = {phase: getattr(predicted, f"{phase}_peak") for phase in PHASES}
    return {
        "model": name,
        "batch": batch,
        "way": way,
        "predicted": guess,
        "physical": physical,
        "ratio": max(guess.values()) / max(physical.values()),
    }


def table(rows: list[dict[str, Any]], style: str = "github") -> str:
    """The rows as text."""
    header = ["model", "batch", "way"]
    header += [f"{phase} {kind}" for phase in PHASES for kind in ("predicted", "physical")]
    cells = [
        [r["model"], r["batch"], r["way"]]
        + [round(r[kind][p] / 1e6, 1) for p in PHASES for kind in ("predicted", "physical")]
        + [round(r["ratio"], 3)]
        for r in rows
    ]
    return tabulate(cells, [*header, "peak ratio"], tablefmt=style)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--child", nargs=3)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.child:
        name, batch, way = options.child
        print(json.dumps(child(name, int(batch), way)))
        return
    rows = []
    for name in options.models.split(","):
        for batch in map(int, options.batches.split(",")):
            guess = predict(name, batch)
            for way, program in zip(WAYS, (guess.plain, guess.rewritten), strict=True):
                rows.append(row(name, batch, way, program, run(name, batch, way)))
                print(table(rows[-1:], "plain"), flush=True)
    print(table(rows))
    if options.output:
        facts = {"torch": torch.__version__, "machine": platform.machine(), "rows": rows}
        options.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
