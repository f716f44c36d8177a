"""The command line: python -m memrewrite."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import memrewrite
from memrewrite.errors import UnsupportedError
from memrewrite.inspect import autodump
from memrewrite.inspect.dump import dump_session
from memrewrite.inspect.report import report_of
from memrewrite.predict import models
from memrewrite.predict.estimate import Estimate, by_depth, estimate
from memrewrite.predict.trace import trace

DEPTHS = (8, 12, 16)
DEEP = 24  # layers: a deeper model is estimated from shallower ones
PROBLEMS = (UnsupportedError, ValueError, TypeError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status: 2 for a request that is not supported."""
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"]:
        return _refusing("bench", lambda: _bench(words[1:]))
    ours, theirs = _split(words)
    arguments = parser.parse_args(ours)
    arguments.theirs = theirs
    if arguments.command is None:
        parser.print_help()
        return 0
    commands = {"sites": _sites, "estimate": _estimate, "report": _report, "dump": _dump}
    return _refusing(arguments.command, lambda: commands[arguments.command](arguments))


def _refusing(command: str, work: Callable[[], int]) -> int:
    """Run `work`; print an error as one line, and return 2."""
    try:
        return work()
    except PROBLEMS as error:
        print(f"memrewrite {command}: {error}", file=sys.stderr)
        return 2


def _bench(words: list[str]) -> int:
    from memrewrite.bench.cli import main as bench

    return bench(words)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """(our arguments, the script's): what follows the script of `dump` belongs to it."""
    if argv[:1] == ["dump"]:
        for index, word in enumerate(argv):
            if word.endswith(".py"):
                return argv[: index + 1], argv[index + 1 :]
    return argv, []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memrewrite", description="Training memory under torch.compile."
    )
    parser.add_argument("--version", action="version", version=memrewrite.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser(
        "bench", help="what each way of training costs, rivals included; bench train; bench page"
    )
    sites = commands.add_parser(
        "sites", help="list what VeLoRA would select in a Hugging Face config's model"
    )
    sites.add_argument("config", help="a config.json, as saved beside a Hugging Face model")
    sites.add_argument("--select", default="auto", help="auto, all, or one fnmatch pattern")
    guess = commands.add_parser(
        "estimate", help="what training a model will take, without running it"
    )
    _add_arguments(guess)
    guess.add_argument("--optimizer", default="adamw", help="adamw, adam, sgd or none")
    guess.add_argument("--dynamic", action="store_true", help="formulas in B and S")
    guess.add_argument("--fit", metavar="MEMORY", help="the largest batch, as in --fit 24GiB")
    guess.add_argument("--whole", action="store_true", help="never estimate a deep stack by lower")
    guess.add_argument("--json", action="store_true", help="print data instead of a table")
    report = commands.add_parser("report", help="what would be rewritten in a model, and why not")
    _add_arguments(report)
    report.add_argument("--full", action="store_true", help="a row for every weight, none folded")
    dump = commands.add_parser(
        "dump", help="run a script and dump its compiled models, or dump a model without running"
    )
    _add_arguments(dump, script=True)
    dump.add_argument("--out", default="memrewrite_dump", help="directory (%(default)s)")
    return parser


def _sites(arguments: argparse.Namespace) -> int:
    from tabulate import tabulate

    from memrewrite.sites.select import select
    from memrewrite.sites.weights import candidates

    found = candidates(models.from_config(arguments.config))
    chosen = arguments.select
    selected = select(found, chosen if chosen in ("auto", "all") else [chosen])
    rows = [
        (c.name, "x".join(map(str, c.shape)), "yes" if c.name in selected else "")
        for c in found
        if c.kind != "raw" or c.name in selected
    ]
    print(tabulate(rows, ("weight", "shape", "selected")))
    return 0


def _estimate(arguments: argparse.Namespace) -> int:
    budget = models.parse_bytes(arguments.fit) if arguments.fit else None
    dynamic = arguments.dynamic or budget is not None
    found = (None if dynamic else _by_depth(arguments)) or _whole(arguments, dynamic)
    if budget is not None:
        sequence = {"S": arguments.seq} if "S" in found.symbols else {}
        plain, rewritten = found.largest("B", budget, **sequence)
        print(f"largest batch within {arguments.fit} at sequence {arguments.seq}:")
        print(f"torch.compile {plain}, memrewrite {rewritten}\n")
    if not arguments.dynamic and dynamic:
        sizes = {"B": arguments.batch, "S": arguments.seq}
        found = found.evaluate(**{s: sizes[s] for s in found.symbols})
    if arguments.json:
        import json

        print(json.dumps(found.to_dict(), indent=1))
    else:
        print(found)
    return 0


def _whole(arguments: argparse.Namespace, dynamic: bool) -> Estimate:
    model, given, named = load(arguments)
    optimizer = models.optimizer(arguments.optimizer)
    return estimate(model, *given, optimizer=optimizer, dynamic=dynamic, **named)


def _by_depth(arguments: argparse.Namespace) -> Estimate | None:
    """The estimate of a deep model by extrapolation from three shallower ones; None if not deep."""
    depth = _depth(arguments)
    if depth is None or depth <= DEEP or arguments.whole:
        return None
    changed = argparse.Namespace(**vars(arguments))
    lower = {}
    for changed.layers in DEPTHS:
        lower[changed.layers] = _whole(changed, dynamic=False)
    return by_depth(lower, depth)


def _report(arguments: argparse.Namespace) -> int:
    model, given, named = load(arguments)
    session, _ = trace(model, given, named, dynamic=False)
    found = report_of(session, model)
    print(found.full() if arguments.full else found)
    return 0


def _dump(arguments: argparse.Namespace) -> int:
    if arguments.model.endswith(".py"):
        return _dump_script(arguments)
    model, given, named = load(arguments)
    session, _ = trace(model, given, named, dynamic=False)
    print(dump_session(session, model, Path(arguments.out)) / "index.html")
    return 0


def _dump_script(arguments: argparse.Namespace) -> int:
    """Run a script as `python SCRIPT ARGS` would, with dumps requested by the environment."""
    os.environ[autodump.VARIABLE] = str(Path(arguments.out).resolve())
    before, path = sys.argv, sys.path[0]
    sys.argv = [arguments.model, *arguments.theirs]
    sys.path[0] = str(Path(arguments.model).resolve().parent)
    try:
        runpy.run_path(arguments.model, run_name="__main__")
    finally:
        sys.argv, sys.path[0] = before, path
        autodump.write_all()
        del os.environ[autodump.VARIABLE]
        written = sorted(Path(arguments.out).glob("**/index.html"))
        if not written:
            print(f"{arguments.model}: no model was compiled by memrewrite", file=sys.stderr)
        for page in written:
            print(page)
    return 0 if written else 2


# --- a model by its flags ---------------------------------------------------------------------


def _add_arguments(parser: argparse.ArgumentParser, script: bool = False) -> None:
    """Add the flags for a model, its inputs and the options of `compile`."""
    what = "a script.py, or " if script else ""
    parser.add_argument(
        "model",
        nargs="?",
        default="",
        help=f"{what}a config.json, {', '.join(models.NAMES)}, or module:function",
    )
    parser.add_argument("--hf-config", metavar="FILE", help="the same as MODEL, for a config.json")
    parser.add_argument("--batch", type=_positive, default=1)
    parser.add_argument("--seq", type=_positive, default=2048)
    parser.add_argument("--vocab", type=_positive, help="another vocabulary than the model's")
    parser.add_argument("--layers", type=_positive, help="another depth than the model's")
    parser.add_argument("--dtype", choices=models.DTYPES, default="bf16")
    parser.add_argument("--checkpointing", action="store_true", help="of each layer")
    parser.add_argument("--velora", action="store_true")
    parser.add_argument("--subtoken-size", type=_positive, default=16)
    parser.add_argument("--sites", default="auto", help="of velora: auto, all or a pattern")
    parser.add_argument("--galore-rank", type=_positive)
    parser.add_argument("--activations", metavar="NAME", help="a registered method")
    parser.add_argument("--moments", metavar="NAME", help="a registered form of Adam's moments")


def load(arguments: argparse.Namespace) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """(model, args, kwargs) for the flags; the model is compiled with their options."""
    name = arguments.hf_config or arguments.model
    if not name:
        raise ValueError("name a model: a config.json, a known shape, or module:function")
    given: tuple[Any, ...] = ()
    if ":" in name:
        model, given, named = models.called(name)
    else:
        model = models.from_config(name, arguments.vocab, arguments.layers)
        model.to(dtype=models.DTYPES[arguments.dtype])
        if arguments.checkpointing:
            checkpointed: Any = model
            checkpointed.gradient_checkpointing_enable()
        with torch.device("meta"):
            named = models.inputs(
                model, arguments.batch, arguments.seq, models.DTYPES[arguments.dtype]
            )
    sites = arguments.sites if arguments.sites in ("auto", "all") else [arguments.sites]
    velora = memrewrite.VeLoRA(arguments.subtoken_size, sites) if arguments.velora else False
    other: Any = {"activations": arguments.activations, "moments": arguments.moments}
    memrewrite.compile(model, velora=velora, galore_rank=arguments.galore_rank, **other)
    return model, given, named


def _depth(arguments: argparse.Namespace) -> int | None:
    """The number of layers in a model's config; None if it has none."""
    name = arguments.hf_config or arguments.model
    if ":" in name or not name:
        return None
    if arguments.layers is not None:
        return int(arguments.layers)
    return getattr(models.config_of(name), "num_hidden_layers", None)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value
