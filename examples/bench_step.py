"""Measure a training step of a Hugging Face LLaMA under many configurations; raw JSON out.

    python examples/bench_step.py --output docs/results/NAME.json

memory      Each configuration in a process of its own, repeats interleaved. On the CPU it is
            VmRSS and VmHWM, the peak reset before each phase and malloc told to give memory
            back at once; on CUDA, max_memory_allocated. "bare" is Python and torch alone;
            "idle" is after three steps: code, weights, optimizer state.
saved       What autograd keeps after one forward: unique storages, without parameters and
            buffers. Not a peak: it leaves out all that lives for a moment only.
first step  Forward, backward, optimizer and all compilation. Cold is the first memory repeat,
            whose caches start empty; the later ones find them warm.
step        One process per group holds all its configurations and runs their steps in turn, so
            that a slow minute of the machine hits all alike. The ratio to the group's baseline
            is the median of the ratios within a round.
gradient    All gradients of the first batch, concatenated, against eager's, before any
            optimizer step. Weights and tokens are random: no trained model's case.

MB are 10^6 bytes. The LoRA group draws B at random: with B = 0, as in training, the gradient
of A would be zero and no error in it could be seen.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config

BASELINES = {"base": "torch.compile", "lora": "lora compile"}
WARM_UP, MEASURED = 3, 2  # steps of the memory process
WARM_UP_ROUNDS = 2  # of the time process, after the first step
MARK = "bench_step: "  # before what a child tells its parent
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
CACHE = "TORCHINDUCTOR_CACHE_DIR"
Options = argparse.Namespace


@dataclass(frozen=True)
class Configuration:
    name: str
    engine: str = "eager"  # or "compile", "memrewrite"
    group: str = "base"
    checkpointing: bool = False
    functorch: dict[str, Any] = field(default_factory=dict)
    velora: Any = None  # the sites of memrewrite.VeLoRA; "peft" for PEFT's own


CONFIGURATIONS = (
    Configuration("eager"),
    Configuration("eager + checkpointing", checkpointing=True),
    Configuration("torch.compile", "compile"),
    Configuration("aggressive recompute", "compile", functorch={"aggressive_recomputation": True}),
    Configuration("budget 0.75", "compile", functorch={"activation_memory_budget": 0.75}),
    Configuration("budget 0.5", "compile", functorch={"activation_memory_budget": 0.5}),
    Configuration("compile + checkpointing", "compile", checkpointing=True),
    Configuration("memrewrite exact", "memrewrite"),
    Configuration("memrewrite velora auto", "memrewrite", velora="auto"),
    Configuration("memrewrite velora all", "memrewrite", velora="all"),
    Configuration(
        "memrewrite velora all + checkpointing", "memrewrite", checkpointing=True, velora="all"
    ),
    Configuration("lora eager", group="lora"),
    Configuration("lora compile", "compile", "lora"),
    Configuration("lora peft velora", group="lora", velora="peft"),
    Configuration("lora memrewrite velora", "memrewrite", "lora", velora=["*lora_A.default"]),
)


# --- the model under each configuration ------------------------------------------------


@dataclass
class Training:
    model: nn.Module
    tokens: Tensor
    optimizer: torch.optim.Optimizer

    def loss(self) -> Any:
        return self.model(input_ids=self.tokens, labels=self.tokens).loss

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> list[Tensor]:
        """Those of the batch, taken off the model; the optimizer does not move."""
        self.loss().backward()
        found = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad()
        return found


def prepare(configuration: Configuration, options: Options) -> Training:
    torch.manual_seed(0)
    model: Any = llama(options)
    if configuration.group == "lora":
        model = with_lora(model, options.subtoken if configuration.velora == "peft" else None)
    model.to(options.device, getattr(torch, options.dtype)).train()
    if configuration.checkpointing:
        model.gradient_checkpointing_enable()
    compile_in_place(model, configuration, options.subtoken)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(1)
    tokens = torch.randint(options.vocab, (options.batch, options.sequence))
    return Training(
        model, tokens.to(options.device), torch.optim.AdamW(trained, lr=1e-4, fused=True)
    )


def llama(options: Options) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        vocab_size=options.vocab,
        max_position_embeddings=options.sequence,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def with_lora(model: Any, subtoken: int | None) -> Any:
    """LoRA on the paper's sites; with a sub-token size, under PEFT's VeLoRA.

    PEFT takes one number of groups for all layers: each is set up anew with that of its width.
    Its v is memrewrite's and the paper's: the mean of the first batch, then frozen.
    """
    from peft import LoraConfig, VeloraConfig, get_peft_model
    from peft.tuners.lora.variants import VeloraLinearVariant

    config = LoraConfig(r=8, target_modules=["v_proj", "down_proj"], init_lora_weights=False)
    if subtoken:
        config.velora_config = VeloraConfig(init_type="batch_average_once")
    adapted: Any = get_peft_model(model, config)
    for module in adapted.modules():
        if hasattr(module, "lora_velora_num_groups"):
            groups = math.ceil(module.in_features / subtoken)
            config.velora_config = VeloraConfig(groups, init_type="batch_average_once")
            VeloraLinearVariant.init(module, "default", config)
    return adapted


def compile_in_place(model: nn.Module, configuration: Configuration, subtoken: int) -> None:
    if configuration.engine == "compile":
        model._compiled_call_impl = torch.compile(own_call(model, configuration.name))
    elif configuration.engine == "memrewrite":
        import memrewrite

        sites = configuration.velora
        velora = sites is not None and memrewrite.VeLoRA(subtoken_size=subtoken, sites=sites)
        memrewrite.compile(model, velora=velora)


def own_call(model: Any, name: str) -> Any:
    """The model's call, with a code object of its own.

    Dynamo caches by code object and does not guard on functorch's settings: with a shared
    one, every configuration of a process would run the first one's graph.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return type(model)._call_impl(model, *args, **kwargs)

    call.__code__ = call.__code__.replace(co_name="call_" + re.sub(r"\W", "_", name))
    return call


# --- memory: one configuration in one process ------------------------------------------


def measure_memory(configuration: Configuration, options: Options) -> None:
    device = options.device
    found = {"bare_mb": megabytes(device)}
    training = prepare(configuration, options)
    with functorch_config.patch(configuration.functorch):
        found[f"{options.child}_first_step_s"] = seconds(training, device)
        for _ in range(WARM_UP - 1):
            training.step()
        reset(device)
        found["idle_mb"] = megabytes(device)
        loss = training.loss()
        found["forward_mb"] = megabytes(device, peak=True)
        del loss
        reset(device)
        for _ in range(MEASURED):
            training.step()
        found["peak_mb"] = megabytes(device, peak=True)
        if device == "cuda":
            found["peak_reserved_mb"] = torch.cuda.max_memory_reserved() / 1e6
        found["saved_mb"] = saved_bytes(training) / 1e6
    for of, above in (("forward", "idle"), ("peak", "idle"), ("peak", "bare")):
        found[f"{of}_above_{above}_mb"] = found[f"{of}_mb"] - found[f"{above}_mb"]
    emit(configuration.name, memory=found, **remarks(configuration, training.model))


def reset(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def megabytes(device: str, peak: bool = False) -> float:
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e6
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index("VmHWM:" if peak else "VmRSS:") + 1]) * 1024 / 1e6


def saved_bytes(training: Training) -> int:
    kept: dict[int, Any] = {}  # holds the storages: a freed one's address could come again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        training.loss()
    for tensor in chain(training.model.parameters(), training.model.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def remarks(configuration: Configuration, model: nn.Module) -> dict[str, Any]:
    if configuration.engine == "memrewrite":
        import memrewrite

        return {"report_totals": memrewrite.report(model).to_dict()["totals"]}
    groups = {n: getattr(m, "lora_velora_num_groups", {}) for n, m in model.named_modules()}
    return {"num_groups": {n.rpartition(".")[2]: g["default"] for n, g in groups.items() if g}}


# --- time and gradients: a group in one process ----------------------------------------


def measure_time(members: list[Configuration], options: Options) -> None:
    eager = next(c for c in CONFIGURATIONS if c.group == members[0].group)
    reference = prepare(eager, options).gradients()
    trainings: dict[str, Training] = {}
    for configuration in members:
        with noted(configuration.name, "time, first step", trainings):
            trainings[configuration.name] = first_step(configuration, options, reference)
    for number in range(-WARM_UP_ROUNDS, options.steps):
        gc.collect()
        for name, training in list(trainings.items()):
            before = unique_graphs()
            with noted(name, f"time, round {number}", trainings):
                took = seconds(training, options.device)
                key = "step_s" if number >= 0 else "warm_up_step_s"
                emit(name, **{key: took}, recompiles=unique_graphs() - before)


def first_step(configuration: Configuration, options: Options, reference: list[Tensor]) -> Training:
    before = unique_graphs()
    training = prepare(configuration, options)
    with functorch_config.patch(configuration.functorch):
        gradient = compare(training.gradients(), reference)
    emit(configuration.name, gradient=gradient, graphs=unique_graphs() - before)
    return training


@contextlib.contextmanager
def noted(name: str, where: str, running: dict[str, Training]) -> Iterator[None]:
    """A configuration that raises is out; the others go on."""
    try:
        yield
    except Exception as error:
        running.pop(name, None)
        emit(name, errors=f"{where}: {type(error).__name__}: {error}")


def seconds(training: Training, device: str) -> float:
    begin = time.perf_counter()
    training.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def unique_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def compare(mine: list[Tensor], theirs: list[Tensor]) -> dict[str, float]:
    a, b = (torch.cat([g.flatten().double() for g in all_of]) for all_of in (mine, theirs))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
    return {"cosine": float(cosine), "relative_error": float((a - b).norm() / b.norm())}


def emit(name: str, **facts: Any) -> None:
    print(MARK + json.dumps({"name": name, **facts}), flush=True)


# --- the parent: rows, medians, table --------------------------------------------------


class Bench:
    """The rows so far; the file is rewritten whenever one of them learns something."""

    def __init__(self, chosen: list[Configuration], options: Options) -> None:
        self.options = options
        self.rows = {c.name: new_row(c) for c in chosen}
        self.runnable = [c for c in chosen if not self.rows[c.name]["skipped"]]
        self.started = environment(options.device)

    def run(self) -> None:
        with tempfile.TemporaryDirectory(prefix="bench_step_") as caches:
            for repeat in range(self.options.repeats):
                task = "warm" if repeat else "cold"
                for place, c in enumerate(self.runnable):
                    self.child(task, [c], {**MALLOC, CACHE: f"{caches}/{place}"})
            for group in BASELINES:
                if members := [c for c in self.runnable if c.group == group]:
                    self.child("time", members, {CACHE: f"{caches}/{group}"})

    def child(self, task: str, members: list[Configuration], env: dict[str, str]) -> None:
        names = ",".join(c.name for c in members)
        print(f"{task}: {names}", file=sys.stderr)
        command = [sys.executable, __file__, *sys.argv[1:], "--configurations", names]
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                [*command, "--child", task],
                env={**os.environ, **env},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as process,
        ):
            for line in process.stdout or ():
                if line.startswith(MARK):
                    self.learn(**json.loads(line.removeprefix(MARK)))
            if process.wait():
                errors.seek(0)
                for c in members:
                    self.learn(c.name, errors=f"{task}: exit {process.returncode}: {errors.read()}")

    def learn(self, name: str, **facts: Any) -> None:
        """A list of the row grows by what is new, anything else is replaced."""
        row = self.rows[name]
        for key, value in facts.items():
            row[key] = [*row[key], value] if isinstance(row.get(key), list) else value
        self.save()

    def save(self) -> None:
        for row in self.rows.values():
            row["summary"] = medians(row)
        for row in self.rows.values():
            row["summary"] |= ratios(row, self.rows.get(BASELINES[row["group"]]))
        settings = dict(vars(self.options))
        path: Path = settings.pop("output")
        del settings["markdown"], settings["child"]
        rows = list(self.rows.values())
        document = {"environment": self.started, "arguments": settings, "rows": rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(document, indent=1) + "\n")
        path.with_suffix(".tmp").replace(path)


def new_row(configuration: Configuration) -> dict[str, Any]:
    needed = {"transformers", "peft" if configuration.group == "lora" else "torch"}
    needed |= {"memrewrite"} & {configuration.engine}
    missing = sorted(p for p in needed if importlib.util.find_spec(p) is None)
    skipped = f"not installed: {', '.join(missing)}" if missing else None
    lists = ("errors", "memory", "warm_up_step_s", "step_s", "recompiles")
    return {**asdict(configuration), "skipped": skipped, **{key: [] for key in lists}}


def medians(row: dict[str, Any]) -> dict[str, float]:
    keys = dict.fromkeys(chain(*row["memory"]))
    found = {k: median(r[k] for r in row["memory"] if k in r) for k in keys}
    if steps := row["step_s"]:
        found |= {"step_s": median(steps), "step_min_s": min(steps), "step_max_s": max(steps)}
        found |= {"graphs": row["graphs"], "recompiles": sum(row["recompiles"])}
    return {**found, **row.get("gradient", {})}


def ratios(row: dict[str, Any], base: dict[str, Any] | None) -> dict[str, float]:
    if base is None:
        return {}
    mine, theirs = row["summary"], base["summary"]
    keys = [k for k in mine if k.endswith("_mb") and theirs.get(k)]
    found = {f"{k}_ratio": mine[k] / theirs[k] for k in keys}
    rounds = [a / b for a, b in zip(row["step_s"], base["step_s"], strict=False)]
    return found | ({"step_ratio": median(rounds)} if rounds else {})


def environment(device: str) -> dict[str, Any]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = [p for p in ("torch", "transformers", "peft") if importlib.util.find_spec(p)]
    return {
        **{p: importlib.metadata.version(p) for p in packages},
        "cpu": cpu and cpu.group(1),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "card": torch.cuda.get_device_name() if device == "cuda" else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


COLUMNS = {  # key in the summary: header, format
    "peak_mb": ("peak MB", ".0f"),
    "peak_above_idle_mb": ("above idle", ".1f"),
    "peak_above_idle_mb_ratio": ("ratio", ".2f"),
    "forward_above_idle_mb": ("forward", ".1f"),
    "saved_mb": ("saved MB", ".1f"),
    "saved_mb_ratio": ("ratio", ".2f"),
    "step_s": ("step s", ".3f"),
    "step_ratio": ("ratio", ".2f"),
    "cold_first_step_s": ("first s", ".1f"),
    "graphs": ("graphs", ".0f"),
    "recompiles": ("recompiles", ".0f"),
    "cosine": ("cosine", ".4f"),
    "relative_error": ("rel. error", ".1e"),
}


def table(rows: Iterable[dict[str, Any]], style: str) -> str:
    headers, formats = zip(("configuration", ""), *COLUMNS.values(), strict=True)
    body = [[row["name"], *(row["summary"].get(key) for key in COLUMNS)] for row in rows]
    return tabulate(body, headers, style, floatfmt=formats, missingval="-")


def arguments() -> tuple[Options, list[Configuration]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"layers": 8, "hidden": 512, "intermediate": 1376, "heads": 8, "vocab": 4096}
    sizes |= {"batch": 8, "sequence": 256, "subtoken": 16, "repeats": 3, "steps": 15}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--configurations", default="all", help="names or base, lora, all")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    parser.add_argument("--markdown", type=Path, help="the table, as a file")
    parser.add_argument("--child", choices=("cold", "warm", "time"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    asked = {part.strip() for part in options.configurations.split(",")}
    names = ["base", "lora", "all", *(c.name for c in CONFIGURATIONS)]
    if unknown := sorted(asked.difference(names)):
        parser.error(f"no configuration is named {unknown[0]!r}; there are {', '.join(names)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    if options.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        parser.error("--device cpu reads memory from /proc, which only Linux has")
    return options, [c for c in CONFIGURATIONS if asked & {"all", c.group, c.name}]


def main() -> None:
    options, chosen = arguments()
    if options.child is None:
        lead(Bench(chosen, options), options.markdown)
    elif options.child == "time":
        measure_time(chosen, options)
    else:
        with noted(chosen[0].name, options.child, {}):
            measure_memory(chosen[0], options)


def lead(bench: Bench, markdown: Path | None) -> None:
    try:
        bench.run()
    finally:
        bench.save()
        rows = bench.rows.values()
        print(table(rows, "simple"))
        for row in rows:
            for reason in filter(None, [row["skipped"], *row["errors"]]):
                print(f"{row['name']}: {reason[:300]}")
        if markdown:
            markdown.write_text(table(rows, "github") + "\n")


if __name__ == "__main__":
    main()
