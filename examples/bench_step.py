"""Measure one training step of a Hugging Face LLaMA under many configurations; raw JSON out.

    python examples/bench_step.py --output docs/results/NAME.json [--markdown NAME.md]

What is measured, and how:

    memory     each configuration in a fresh process, repeats interleaved (A B C A B C).
               On the CPU it is physical: VmRSS and VmHWM of /proc, the peak reset before
               each phase, malloc told to hand every larger block straight back. "idle" is
               after three steps: weights, optimizer state and code. "bare" is the process
               before it builds the model. On CUDA: max_memory_allocated and _reserved.
    saved      bytes that autograd keeps after one forward: unique storages, parameters
               and buffers apart. Not a peak: it leaves out all that lives for a moment.
    time       one process per group holds every configuration and runs steps (forward,
               backward, optimizer) in turn, so that a slow minute of the machine hits all
               alike. The ratio is the median over rounds of the ratio within a round.
    first step forward, backward, optimizer and all compilation, with empty caches (the
               first memory repeat; the later ones find that repeat's caches warm).
    gradient   all gradients of the first batch, concatenated, against eager's: cosine and
               relative error, before any optimizer step.

MB are 10^6 bytes. The LoRA group draws B at random, not zero as in training: with B = 0
the gradient of A is zero, and no error in it could be seen.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config

BASELINES = {"base": "torch.compile", "lora": "lora compile"}
WARM_UP_STEPS, WARM_UP_ROUNDS, MEASURED_STEPS = 3, 2, 2
MARK = "bench_step result: "
# One arena, and every block from 64 KiB on its own mapping: freed memory leaves the RSS at once.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


@dataclass(frozen=True)
class Configuration:
    """One row: how the model is built and what compiles it."""

    name: str
    engine: str = "eager"  # or "compile", "memrewrite"
    checkpointing: bool = False
    functorch: dict[str, Any] = field(default_factory=dict)
    velora: Any = None  # the sites of memrewrite.VeLoRA
    group: str = "base"
    peft_velora: bool = False

    def missing(self) -> str | None:
        needed = ["transformers"] + ["peft"] * (self.group == "lora")
        needed += ["memrewrite"] * (self.engine == "memrewrite")
        return next((p for p in needed if importlib.util.find_spec(p) is None), None)


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
    Configuration("lora compile", "compile", group="lora"),
    Configuration("lora peft velora", group="lora", peft_velora=True),
    Configuration("lora memrewrite velora", "memrewrite", velora=["*lora_A.default"], group="lora"),
)


# --- the model under each configuration ------------------------------------------------


@dataclass
class Training:
    """A model, its optimizer and the one batch that it sees."""

    model: nn.Module
    tokens: Tensor
    optimizer: torch.optim.Optimizer

    def loss(self) -> Tensor:
        loss: Tensor = self.model(input_ids=self.tokens, labels=self.tokens).loss
        return loss

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> list[Tensor]:
        """Those of the batch, taken off the model; the optimizer is left alone."""
        self.loss().backward()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        found = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in trained]
        self.optimizer.zero_grad(set_to_none=True)
        return found


def prepare(configuration: Configuration, options: argparse.Namespace) -> Training:
    torch.manual_seed(0)
    model: Any = llama(options)
    if configuration.group == "lora":
        model = with_lora(model, options.subtoken if configuration.peft_velora else None)
    model = model.to(options.device, getattr(torch, options.dtype)).train()
    if configuration.checkpointing:
        model.gradient_checkpointing_enable()
    compile_in_place(model, configuration, options.subtoken)
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(options.vocab, (options.batch, options.sequence), generator=draw)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    return Training(model, tokens.to(options.device), optimizer)


def llama(options: argparse.Namespace) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=options.hidden,
            intermediate_size=options.intermediate,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.heads,
            vocab_size=options.vocab,
            max_position_embeddings=options.sequence,
            use_cache=False,
        )
    )


def with_lora(model: nn.Module, subtoken: int | None) -> nn.Module:
    """LoRA on the paper's two sites; with a sub-token size, under PEFT's own VeLoRA."""
    from peft import LoraConfig, VeloraConfig, get_peft_model

    # Like the paper and memrewrite: v is the mean of the first batch, then frozen.
    velora = VeloraConfig(init_type="batch_average_once") if subtoken else None
    config = LoraConfig(
        r=8,
        target_modules=["v_proj", "down_proj"],
        init_lora_weights=False,
        velora_config=velora,
    )
    adapted = get_peft_model(model, config)
    if subtoken:
        set_subtokens(adapted, config, subtoken)
    return adapted


def set_subtokens(model: nn.Module, config: Any, subtoken: int) -> None:
    """PEFT takes one number of groups for all layers; give each layer that of its width."""
    from peft import VeloraConfig
    from peft.tuners.lora.variants import VeloraLinearVariant

    for module in model.modules():
        if hasattr(module, "lora_velora_num_groups"):
            groups = -(-module.in_features // subtoken)
            config.velora_config = VeloraConfig(groups, init_type="batch_average_once")
            VeloraLinearVariant.init(module, "default", config)


def compile_in_place(model: nn.Module, configuration: Configuration, subtoken: int) -> None:
    if configuration.engine == "compile":
        model._compiled_call_impl = torch.compile(own_call(model, configuration.name))
    elif configuration.engine == "memrewrite":
        import memrewrite

        sites = configuration.velora
        velora = sites is not None and memrewrite.VeLoRA(subtoken_size=subtoken, sites=sites)
        memrewrite.compile(model, velora=velora)


def own_call(model: nn.Module, name: str) -> Any:
    """The model's call with a code object of its own.

    Dynamo caches by code object and does not guard on functorch's settings: with a
    shared one, all configurations of a process would run the first one's graph.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return type(model)._call_impl(model, *args, **kwargs)

    call.__code__ = call.__code__.replace(co_name="call_" + re.sub(r"\W", "_", name))
    return call


# --- memory: one configuration in one process ------------------------------------------


class HostMeter:
    """Physical memory of this process, in MB."""

    def reset(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    def now(self) -> dict[str, float]:
        return {"mb": self._read("VmRSS")}

    def peak(self) -> dict[str, float]:
        return {"mb": self._read("VmHWM")}

    def _read(self, key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(key))


class CardMeter:
    """The CUDA allocator's own count, in MB."""

    def reset(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def now(self) -> dict[str, float]:
        cuda = torch.cuda
        return {"mb": cuda.memory_allocated() / 1e6, "reserved_mb": cuda.memory_reserved() / 1e6}

    def peak(self) -> dict[str, float]:
        torch.cuda.synchronize()
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"mb": allocated / 1e6, "reserved_mb": reserved / 1e6}


def measure_memory(configuration: Configuration, options: argparse.Namespace) -> None:
    """Emit one repeat."""
    meter = CardMeter() if options.device == "cuda" else HostMeter()
    if configuration.engine == "memrewrite":
        import memrewrite  # noqa: F401  (its code is no part of a step's memory)
    meter.reset()
    found = {"bare": meter.now()}
    training = prepare(configuration, options)
    with functorch_config.patch(configuration.functorch):
        first = seconds(training.step, options.device)
        for _ in range(WARM_UP_STEPS - 1):
            training.step()
        meter.reset()
        found["idle"] = meter.now()
        loss = training.loss()
        found["forward"] = meter.peak()
        del loss
        meter.reset()
        for _ in range(MEASURED_STEPS):
            training.step()
        found["peak"] = meter.peak()
        saved = saved_bytes(training)
    numbers = {f"{phase}_{unit}": n for phase, units in found.items() for unit, n in units.items()}
    repeat = {**numbers, **differences(numbers), "saved_bytes": saved, "first_step_s": first}
    emit(configuration.name, memory=repeat, **remarks(training.model, configuration))


def differences(mb: dict[str, float]) -> dict[str, float]:
    return {
        "peak_above_idle_mb": mb["peak_mb"] - mb["idle_mb"],
        "peak_minus_bare_mb": mb["peak_mb"] - mb["bare_mb"],
        "forward_above_idle_mb": mb["forward_mb"] - mb["idle_mb"],
    }


def saved_bytes(training: Training) -> int:
    kept: dict[int, Any] = {}  # holds the storages: a freed one's address could come again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        training.loss()
    model = training.model
    lasting = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    return sum(s.nbytes() for address, s in kept.items() if address not in lasting)


def remarks(model: nn.Module, configuration: Configuration) -> dict[str, Any]:
    """What a row should say of its model besides numbers."""
    if configuration.engine == "memrewrite":
        import memrewrite

        return {"report_totals": memrewrite.report(model).to_dict()["totals"]}
    named = {
        n.rpartition(".")[2]: getattr(m, "lora_velora_num_groups", {})
        for n, m in model.named_modules()
    }
    groups = {name: found["default"] for name, found in named.items() if found}
    return {"num_groups": groups} if groups else {}


# --- time and gradients: a group in one process ----------------------------------------


def measure_time(chosen: Sequence[Configuration], options: argparse.Namespace) -> None:
    """Emit each configuration's gradients and graphs, then every round's steps."""
    plain = Configuration("reference", group=chosen[0].group)
    reference = prepare(plain, options).gradients()
    trainings: dict[str, Training] = {}
    for configuration in chosen:
        with reported(configuration.name, "first step of the time process"):
            trainings[configuration.name] = first_step(configuration, options, reference)
    for number in range(WARM_UP_ROUNDS + options.steps):
        key = "step_s" if number >= WARM_UP_ROUNDS else "warm_up_step_s"
        gc.collect()
        for name, training in list(trainings.items()):
            graphs = unique_graphs()
            with reported(name, f"timed round {number}", trainings):
                took = seconds(training.step, options.device)
                emit(name, **{key: took}, recompiles=unique_graphs() - graphs)


def first_step(
    configuration: Configuration, options: argparse.Namespace, reference: list[Tensor]
) -> Training:
    graphs = unique_graphs()
    training = prepare(configuration, options)
    with functorch_config.patch(configuration.functorch):
        fidelity = compare(training.gradients(), reference)
    emit(configuration.name, gradient=fidelity, graphs=unique_graphs() - graphs)
    return training


def compare(mine: Iterable[Tensor], theirs: Iterable[Tensor]) -> dict[str, float]:
    """Sums in float64, tensor by tensor: the concatenation itself is never needed."""
    dot = own = other = off = 0.0
    for a, b in ((a.double(), b.double()) for a, b in zip(mine, theirs, strict=True)):
        dot, own, other = (
            dot + float((a * b).sum()),
            own + float(a.square().sum()),
            other + float(b.square().sum()),
        )
        off += float((a - b).square().sum())
    return {"cosine": dot / (own * other) ** 0.5, "relative_error": (off / other) ** 0.5}


# --- what a child tells its parent ------------------------------------------------------


def emit(name: str, **facts: Any) -> None:
    print(MARK + json.dumps({"name": name, **facts}), flush=True)


@contextlib.contextmanager
def reported(name: str, where: str, running: dict[str, Any] | None = None) -> Iterator[None]:
    """An exception becomes the row's own; the row leaves those still running."""
    try:
        yield
    except Exception as error:
        emit(name, errors=f"{where}: {type(error).__name__}: {error}"[:2000])
        if running is not None:
            del running[name]


def seconds(work: Any, device: str) -> float:
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def unique_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


# --- the parent -------------------------------------------------------------------------


class Bench:
    """The rows so far; the file is rewritten whenever one of them learns something."""

    def __init__(self, chosen: Sequence[Configuration], options: argparse.Namespace) -> None:
        self.options = options
        self.rows = {c.name: new_row(c) for c in chosen}
        self.document = {
            "environment": environment(options.device),
            "arguments": {k: v for k, v in vars(options).items() if k != "child"},
            "rows": list(self.rows.values()),
        }
        self.runnable = [c for c in chosen if self.rows[c.name]["skipped"] is None]

    def run(self) -> None:
        with tempfile.TemporaryDirectory(prefix="bench_step_") as caches:
            for repeat in range(self.options.repeats):
                for place, configuration in enumerate(self.runnable):
                    env = {**MALLOC, "TORCHINDUCTOR_CACHE_DIR": f"{caches}/{place}"}
                    self.child("memory", [configuration], env, f"repeat {repeat}")
            for group in BASELINES:
                members = [c for c in self.runnable if c.group == group]
                if members:
                    env = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/time-{group}"}
                    self.child("time", members, env, f"group {group}")

    def child(
        self, task: str, members: Sequence[Configuration], env: dict[str, str], what: str
    ) -> None:
        """Run one measurement in a process of its own; a crash is noted in its rows."""
        names = ",".join(c.name for c in members)
        note(f"{task}, {what}: {names}")
        command = [sys.executable, __file__, *sys.argv[1:], "--configurations", names]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [*command, "--child", task],
                env=os.environ | env,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            with process:
                self.listen(process.stdout or ())
            if process.returncode:
                errors.seek(0)
                text = f"{task}, {what}: exit status {process.returncode}: {errors.read()[-2000:]}"
                for configuration in members:
                    self.rows[configuration.name]["errors"].append(text)
        self.save()

    def listen(self, lines: Iterable[str]) -> None:
        """Merge each finding into its row: a list grows by it, anything else is replaced."""
        for line in lines:
            if not line.startswith(MARK):
                continue
            event = json.loads(line.removeprefix(MARK))
            row = self.rows[event.pop("name")]
            for key, value in event.items():
                if isinstance(row.get(key), list):
                    row[key].append(value)
                else:
                    row[key] = value
                if key == "errors":
                    note(f"  {row['name']}: {value}")
            self.save()

    def save(self) -> None:
        summarise(self.rows)
        path: Path = self.options.output
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.document, indent=1, default=str) + "\n")
        temporary.replace(path)


def new_row(configuration: Configuration) -> dict[str, Any]:
    missing = configuration.missing()
    return {
        **asdict(configuration),
        "baseline": BASELINES[configuration.group],
        "skipped": f"the package {missing} is not installed" if missing else None,
        **{k: [] for k in ("errors", "memory", "warm_up_step_s", "step_s", "recompiles")},
    }


def summarise(rows: dict[str, dict[str, Any]]) -> None:
    """Medians over the raw repeats, then their ratios to the group's baseline."""
    for row in rows.values():
        repeats = row["memory"]
        row["median"] = {k: statistics.median(r[k] for r in repeats) for k in (repeats or [{}])[0]}
        row["cold_first_step_s"] = repeats[0]["first_step_s"] if repeats else None
        if steps := row["step_s"]:
            numbers = statistics.median(steps), min(steps), max(steps)
            row["step"] = dict(zip(("median_s", "min_s", "max_s"), numbers, strict=True))
    for row in rows.values():
        base = rows.get(row["baseline"])
        row["ratio"] = ratios(row, base) if base else {}


def ratios(row: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    keys = (
        "peak_mb",
        "peak_above_idle_mb",
        "peak_minus_bare_mb",
        "forward_above_idle_mb",
        "saved_bytes",
    )
    mine, theirs = row["median"], base["median"]
    found = {k: mine[k] / theirs[k] for k in keys if k in mine and theirs.get(k)}
    rounds = [a / b for a, b in zip(row["step_s"], base["step_s"], strict=False)]
    return found | ({"step": statistics.median(rounds)} if rounds else {})


def environment(device: str) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {
        p: importlib.metadata.version(p)
        for p in ("torch", "transformers", "peft")
        if importlib.util.find_spec(p)
    }
    return {
        "versions": versions,
        "python": platform.python_version(),
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "card": torch.cuda.get_device_name() if device == "cuda" else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- tables and arguments ------------------------------------------------------------------

COLUMNS: tuple[tuple[str, str, str], ...] = (  # header, path in the row, format
    ("peak MB", "median.peak_mb", "{:,.0f}"),
    ("above idle", "median.peak_above_idle_mb", "{:,.1f}"),
    ("ratio", "ratio.peak_above_idle_mb", "{:.2f}"),
    ("forward", "median.forward_above_idle_mb", "{:,.1f}"),
    ("ratio", "ratio.forward_above_idle_mb", "{:.2f}"),
    ("saved MB", "median.saved_bytes", "{:,.1f}"),
    ("ratio", "ratio.saved_bytes", "{:.2f}"),
    ("step s", "step.median_s", "{:.3f}"),
    ("ratio", "ratio.step", "{:.2f}"),
    ("first step s", "cold_first_step_s", "{:.1f}"),
    ("graphs", "graphs", "{}"),
    ("recompiles", "recompiles", "{}"),
    ("cosine", "gradient.cosine", "{:.4f}"),
    ("rel. error", "gradient.relative_error", "{:.1e}"),
)


def table(rows: Iterable[dict[str, Any]], style: str) -> str:
    body = [[row["name"], *(cell(row, *column[1:]) for column in COLUMNS)] for row in rows]
    headers = ["configuration", *(column[0] for column in COLUMNS)]
    aligned = ["left", *["right"] * len(COLUMNS)]
    return tabulate(body, headers, style, disable_numparse=True, colalign=aligned)


def cell(row: dict[str, Any], path: str, form: str) -> str:
    value: Any = row
    for key in path.split("."):
        value = (value or {}).get(key)
    if path == "recompiles":
        value = sum(value) if value else None
    if path == "median.saved_bytes" and value is not None:
        value /= 1e6
    return "-" if value is None else form.format(value)


def arguments() -> tuple[argparse.Namespace, list[Configuration]]:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"layers": 8, "hidden": 512, "intermediate": 1376, "heads": 8, "vocab": 4096}
    sizes |= {"batch": 8, "sequence": 256, "subtoken": 16, "repeats": 3, "steps": 15}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--configurations", default="all", help="names or base, lora, all")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    parser.add_argument("--child", choices=("memory", "time"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    if options.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        parser.error("--device cpu reads the peak from /proc, which only Linux has")
    try:
        return options, chosen(options.configurations)
    except ValueError as error:
        parser.error(str(error))


def chosen(text: str) -> list[Configuration]:
    """In the order of the table. Raises ValueError for a name that is none of them."""
    asked = {part.strip() for part in text.split(",")}
    known = {"all", *BASELINES, *(c.name for c in CONFIGURATIONS)}
    if unknown := sorted(asked - known):
        names = ", ".join(repr(c.name) for c in CONFIGURATIONS)
        raise ValueError(f"no configuration {unknown[0]!r}; choose of base, lora, all, {names}")
    return [c for c in CONFIGURATIONS if asked & {"all", c.group, c.name}]


def main() -> None:
    options, picked = arguments()
    if options.child == "memory":
        with reported(picked[0].name, "memory"):
            measure_memory(picked[0], options)
    elif options.child == "time":
        measure_time(picked, options)
    else:
        bench = Bench(picked, options)
        try:
            bench.run()
        finally:
            bench.save()
            show(bench, options)


def show(bench: Bench, options: argparse.Namespace) -> None:
    print(table(bench.rows.values(), "simple"))
    for row in bench.rows.values():
        for reason in filter(None, [row["skipped"], *row["errors"]]):
            print(f"\n{row['name']}: {reason}")
    if options.markdown:
        options.markdown.write_text(table(bench.rows.values(), "github") + "\n")


if __name__ == "__main__":
    main()
