"""python -m memrewrite: what can be asked from a shell."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import memrewrite


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="memrewrite", description="Training memory under torch.compile."
    )
    parser.add_argument("--version", action="version", version=memrewrite.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    sites = commands.add_parser(
        "sites", help="list what VeLoRA would select in a Hugging Face config's model"
    )
    sites.add_argument("config", help="a config.json, as saved beside a Hugging Face model")
    sites.add_argument("--select", default="auto", help="auto, all, or one fnmatch pattern")
    arguments = parser.parse_args(argv)
    if arguments.command == "sites":
        return _sites(arguments.config, arguments.select)
    parser.print_help()
    return 0


def _sites(config: str, chosen: str) -> int:
    import torch
    from tabulate import tabulate
    from transformers import AutoConfig, AutoModelForCausalLM

    from memrewrite.sites import candidates, select

    architectures: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = architectures.from_config(AutoConfig.from_pretrained(config))
    found = candidates(model)
    selected = select(found, chosen if chosen in ("auto", "all") else [chosen])
    rows = [
        (c.name, "x".join(map(str, c.shape)), "yes" if c.name in selected else "")
        for c in found
        if c.kind != "raw" or c.name in selected
    ]
    print(tabulate(rows, ("weight", "shape", "selected")))
    return 0
