"""memrewrite bench [train | page]: flags and output."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from memrewrite.bench import configurations, sets, tasks
from memrewrite.bench.document import Document, title
from memrewrite.bench.run import quality
from memrewrite.bench.run.cost import Cost, Settings
from memrewrite.bench.run.subject import Request
from memrewrite.bench.show import chart, pairs, pareto
from memrewrite.bench.show.summary import problems, summarise, summarise_training
from memrewrite.bench.show.table import LEGEND, LOSS_LEGEND, loss_table, table
from memrewrite.bench.tasks import task
from memrewrite.predict import models, pretrained

SMALL_VOCABULARY = 2048  # of random weights that are trained: a larger one takes more steps
INTERRUPTED = 130  # exit status after Ctrl-C, by convention of shells


def main(argv: Sequence[str]) -> int:
    """Run the arguments that follow `memrewrite bench`. Returns the exit status.

    Raises ValueError, OSError and ImportError for requests that are not possible.
    """
    words = list(argv)
    kinds: dict[str, Callable[[list[str]], int]] = {"train": _train, "page": _page}
    if words and words[0] in kinds:
        return kinds[words[0]](words[1:])
    return _cost(words)


# --- cost ----------------------------------------------------------------------------------


def _cost(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="memrewrite bench",
        description="What each way of training a model costs, rivals included. "
        "See also: bench train, bench page.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=configurations.__doc__,
    )
    model_flags(parser, "llama-60m", batch=8, seq=256)
    common_flags(parser, "quick", Path("out/bench"))
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps (%(default)s)")
    parser.add_argument("--together", type=int, default=6, help="processes at once (%(default)s)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds an answer may take")
    given = parser.parse_args(words)
    _check(given)
    chosen = sets.chosen(given.configurations)
    asked = _request(given)
    print(weights_of(asked.model))
    document = Document(given.output, {"kind": "cost", **vars(asked)}, given.resume)
    how = Settings(given.repeats, given.rounds, given.together, given.timeout)
    with _progress() as (show, tick, expect):
        bench = Cost(document, asked, chosen, how, show, tick)
        expect(len(bench.remaining()))
        return _run(bench.run, document, lambda: write(document.data, given.output))


def write(data: dict[str, Any], folder: Path) -> None:
    """Write the table of a document, as text and Markdown, and its chart."""
    trained = data["request"]["kind"] == "train"
    if trained:
        summarise_training(data)
    else:
        summarise(data["rows"])
    rows = [row for row in data["rows"] if row["runs"] or row["skipped"]]
    tabled, legend = (loss_table, LOSS_LEGEND) if trained else (table, LEGEND)
    print(f"\n{tabled(rows)}\n\n{legend}\n")
    for line in [*data.get("warnings", ()), *(line for row in rows for line in problems(row))]:
        print(line)
    for line in pairs.lines_of(rows) if trained else ():
        print(line)
    for verdict in [] if trained else pareto.verdicts(rows):
        print(pareto.line_of(verdict).replace("**", ""))
    (folder / "table.md").write_text(tabled(rows, "github") + "\n")
    draw, name = (chart.losses, "losses.svg") if trained else (chart.pareto, "pareto.svg")
    try:
        draw(rows, title(data), folder / name)
    except ImportError as error:
        print(f"no chart: {error}")
    print(f"\nwritten: {folder}")


# --- training ------------------------------------------------------------------------------


def _train(words: list[str]) -> int:
    """`memrewrite bench train`."""
    parser = argparse.ArgumentParser(
        prog="memrewrite bench train",
        description="Validation loss of each way of training, from the same start on the same "
        "data: the same learning rates and seeds for every row.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=tasks.__doc__,
    )
    model_flags(parser, "llama-tiny", batch=8, seq=128, rank=32)
    common_flags(parser, "train", Path("out/bench_train"))
    how = quality.Settings()
    parser.add_argument("--steps", type=int, default=how.steps, help="%(default)s")
    parser.add_argument("--seeds", type=int, default=how.seeds, help="%(default)s")
    parser.add_argument("--lrs", default=",".join(f"{lr:g}" for lr in how.lrs), help="%(default)s")
    parser.add_argument("--refresh", type=int, default=100, help="steps between GaLore's")
    parser.add_argument("--data", type=Path, default=how.data, help="cache of tokenised text")
    parser.add_argument("--task", choices=task.TASKS, help="by default what fits the model")
    given = parser.parse_args(words)
    if not given.pretrained and given.vocab is None:
        given.vocab = SMALL_VOCABULARY
    return _training(given)


def _training(given: argparse.Namespace) -> int:
    """Run `bench train` with parsed flags."""
    _check(given)
    try:
        rates = sorted({float(word) for word in given.lrs.split(",")})
    except ValueError:
        raise ValueError(f"--lrs {given.lrs!r}: write numbers, separated by commas") from None
    if min(rates) <= 0:
        raise ValueError(f"--lrs {given.lrs!r}: learning rates are positive")
    chosen = sets.chosen(given.configurations)
    asked = quality.check(_request(given))
    print(weights_of(asked.model))
    request = {"kind": "train", "steps": given.steps, **vars(asked)}
    document = Document(given.output, request, given.resume)
    how = quality.Settings(given.steps, given.seeds, rates, given.data)
    with _progress() as (show, tick, expect):
        bench = quality.Quality(document, asked, chosen, how, show, tick)
        expect(bench.expected())
        return _run(bench.run, document, lambda: write(document.data, given.output))


# --- shared --------------------------------------------------------------------------------


def model_flags(
    parser: argparse.ArgumentParser, model: str, batch: int, seq: int, rank: int = 128
) -> None:
    """Add the flags of the model and its inputs."""
    parser.add_argument(
        "model",
        nargs="?",
        default=model,
        help=f"a config.json, {', '.join(models.NAMES)}, or module:function (%(default)s)",
    )
    parser.add_argument("--hf-config", metavar="FILE", help="the same as MODEL, for a config.json")
    parser.add_argument(
        "--pretrained",
        metavar="NAME|PATH",
        help=f"real weights: {', '.join(pretrained.PACKAGES)}, a folder or a GGUF file",
    )
    parser.add_argument("--batch", type=int, default=batch, help="%(default)s")
    parser.add_argument("--seq", type=int, default=seq, help="%(default)s")
    parser.add_argument("--vocab", type=int, help="another vocabulary than the model's")
    parser.add_argument("--layers", type=int, help="another depth than the model's")
    parser.add_argument("--dtype", choices=models.DTYPES, default="fp32", help="%(default)s")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (%(default)s)")
    parser.add_argument("--rank", type=int, default=rank, help="of GaLore (%(default)s)")
    parser.add_argument(
        "--dropout",
        action="store_true",
        help="keep the model's: gradients of two random draws cannot be compared",
    )


def common_flags(parser: argparse.ArgumentParser, default: str, output: Path) -> None:
    """Add the flags of the configurations and the output."""
    known = ", ".join(sets.SETS)
    parser.add_argument(
        "--configurations",
        default=default,
        help=f"names, patterns or sets ({known}, all), by commas (%(default)s)",
    )
    parser.add_argument("--output", type=Path, default=output, help="%(default)s")
    parser.add_argument("--resume", action="store_true", help="continue the bench in --output")


def _check(given: argparse.Namespace) -> None:
    for name, value in vars(given).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not positive")
    try:
        torch.empty(0, device=given.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {given.device} is not here: {reason}") from None
    if torch.device(given.device).type not in ("cpu", "cuda"):
        raise ValueError(f"--device {given.device}: memory is measured on cpu and cuda only")
    if given.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise ValueError("--device cpu reads memory from /proc, which only Linux has")


def _request(given: argparse.Namespace) -> Request:
    if given.pretrained and not pretrained.is_pretrained(given.pretrained):
        pretrained.source(given.pretrained)  # raises, and names the remedy
    model = given.pretrained or given.hf_config or given.model
    keys = ["batch", "seq", "vocab", "layers", "dtype", "device", "rank", "refresh", "dropout"]
    keys += ["task"]
    asked = Request(model, **{key: getattr(given, key) for key in keys if key in given})
    if ":" not in model:  # fail now for an unknown one, not in each process
        images = models.takes_images(models.from_config(model))
        return replace(asked, seq=None) if images else asked
    return asked


def weights_of(model: str) -> str:
    """One line on where the weights of a MODEL come from."""
    if pretrained.is_pretrained(model):
        return f"weights: {model}, SHA-256 {pretrained.source(model).digest()}"
    if ":" in model:
        return f"weights: those that {model} returns"
    return (
        "weights: random. Bytes and seconds do not depend on them; errors of gradients under "
        "rounding (fp8) do, and random ones flatter: --pretrained smollm2"
    )


def _run(work: Callable[[], None], document: Document, show: Callable[[], None]) -> int:
    """Run `work`, then `show` the results, also after an error."""
    status = 0
    try:
        work()
    except KeyboardInterrupt:
        status = INTERRUPTED
    finally:
        document.save()
    show()
    if status:
        print("interrupted; complete runs are saved. The same command with --resume continues.")
    elif all(problems(row) for row in document.data["rows"]):
        status = 1
    return status


@contextmanager
def _progress() -> Iterator[
    tuple[Callable[[str], None], Callable[[], None], Callable[[int], None]]
]:
    """Functions of a progress bar: (show a text, count one run, set the number of runs)."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield (lambda text: print(text, file=sys.stderr)), (lambda: None), (lambda total: None)
        return
    with tqdm(unit="run", dynamic_ncols=True, file=sys.stderr) as bar:

        def expect(total: int) -> None:
            bar.reset(total)

        def show(text: str) -> None:
            bar.set_description(text)

        yield show, bar.update, expect


# --- the page --------------------------------------------------------------------------


def _page(words: list[str]) -> int:
    from memrewrite.bench.show.page import write_page

    parser = argparse.ArgumentParser(
        prog="memrewrite bench page",
        description="The results page of all benches below a folder: README.md, and a chart each.",
    )
    parser.add_argument("folder", type=Path)
    given = parser.parse_args(words)
    print(write_page(given.folder))
    return 0
