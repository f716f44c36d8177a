"""estimate(model, *inputs): predict the memory of a training step without running it.

The model is copied to fake tensors, captured, rewritten and partitioned exactly as for training;
no code is generated and no step is run. Saved bytes are those of the compiled program; peaks are
predictions from the liveness of its graphs.

    forward    weights + state + the peak of the forward
    backward   weights + state + saved activations, temporaries and gradients at the peak
    step       weights + state + all gradients + the optimizer's temporaries
    refresh    the same with a projector's decomposition in place of the temporaries; or, with
               gradients in coordinates, the peak of a step whose gradients are sketched

Excludes code, the interpreter and the workspaces of libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import sympy
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim import Optimizer

from memrewrite.compiler.liveness import dominates
from memrewrite.errors import UnsupportedError
from memrewrite.parallel.wrapped import inner
from memrewrite.predict.optimizer_state import Kept, state_of
from memrewrite.predict.trace import moving_bytes, small_gradients, trace
from memrewrite.record.decision import GraphRecord, MemoryRecord
from memrewrite.record.formulas import Bytes, largest, read, symbols_of
from memrewrite.session.session import Session, known_session
from memrewrite.sites.options import refuse_options

MakeOptimizer = Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None


@dataclass(frozen=True)
class Program:
    """Bytes of one training program: what it holds, and the predicted peak of each phase.

    saved: exact bytes of activations between forward and backward, including inputs that
        backward reads.
    refresh_peak: None if nothing is projected.
    """

    parameters: Bytes
    buffers: Bytes
    gradients: Bytes
    optimizer_state: Bytes
    saved: Bytes
    forward_peak: Bytes
    backward_peak: Bytes
    step_peak: Bytes
    refresh_peak: Bytes | None = None

    @property
    def peak(self) -> Bytes:
        """The peak of a whole training step."""
        peaks = [self.forward_peak, self.backward_peak, self.step_peak]
        if self.refresh_peak is not None:
            peaks.append(self.refresh_peak)
        return largest(peaks)


@dataclass(frozen=True)
class Estimate:
    """The plain and the rewritten program; printable as a table.

    symbols: the meaning of each free symbol; empty unless dynamic.
    dominates: a sentence on the largest shares of the rewritten program's activation peak.
    logits: a line on the loss in chunks, or on why it is not; "" where there is no loss.
    """

    plain: Program
    rewritten: Program
    symbols: dict[str, str]
    dominates: str
    logits: str = ""

    def evaluate(self, **sizes: int) -> Estimate:
        """The estimate in numbers, `evaluate(B=8, S=512)`. Raises ValueError for missing sizes."""
        missing = sorted(set(self.symbols) - set(sizes))
        if missing or set(sizes) - set(self.symbols):
            known = ", ".join(f"{s} ({m})" for s, m in self.symbols.items()) or "no symbol"
            raise ValueError(f"this estimate is in {known}; got {sorted(sizes) or 'nothing'}")
        values = {sympy.Symbol(k, integer=True, positive=True): v for k, v in sizes.items()}

        def number(value: Bytes) -> Bytes:
            if isinstance(value, sympy.Max):
                return max(map(number, value.args))
            return int(value.subs(values)) if isinstance(value, sympy.Basic) else value

        def program(of: Program) -> Program:
            return Program(**{key: number(value) for key, value in vars(of).items()})

        given = "at the sizes that were given to estimate: "
        logits = self.logits and given + self.logits
        plain, rewritten = program(self.plain), program(self.rewritten)
        return Estimate(plain, rewritten, {}, given + self.dominates, logits)

    def largest(self, symbol: str, budget: int, **sizes: int) -> tuple[int, int]:
        """The largest `symbol` whose peak fits `budget` bytes: (plain, rewritten); 0 if none.

        The other symbols are fixed by `sizes`. Raises ValueError as `evaluate` does.
        """

        def fits(which: str, value: int) -> bool:
            peak: int = getattr(self.evaluate(**{symbol: value}, **sizes), which).peak
            return peak <= budget

        def search(which: str) -> int:
            high = 1
            while fits(which, high) and high < 2**40:
                high *= 2
            low = high // 2
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if fits(which, middle) else (low, middle)
            return low

        return search("plain"), search("rewritten")

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain data; formulas are strings."""

        def plain(of: Program) -> dict[str, Any]:
            values = {**vars(of), "peak": of.peak}
            return {k: str(v) if isinstance(v, sympy.Basic) else v for k, v in values.items()}

        return {
            "torch.compile": plain(self.plain),
            "memrewrite": plain(self.rewritten),
            "symbols": dict(self.symbols),
            "dominates": self.dominates,
            "logits": self.logits,
        }

    def __str__(self) -> str:
        keys = [*(k for k, v in vars(self.rewritten).items() if v is not None), "peak"]
        rows = [
            (k.replace("_", " "), getattr(self.plain, k), getattr(self.rewritten, k)) for k in keys
        ]
        meanings = [f"{symbol}: {meaning}" for symbol, meaning in self.symbols.items()]
        shown = _formulas(rows) if self.symbols else _numbers(rows)
        logits = [self.logits] if self.logits else []
        return "\n".join([shown, "", *meanings, *logits, self.dominates])


def _numbers(rows: list[tuple[str, Bytes, Bytes]]) -> str:
    cells = [(name, _shown(a), _shown(b), _ratio(a, b)) for name, a, b in rows]
    header = ("bytes", "torch.compile", "memrewrite", "ratio")
    return tabulate(cells, header, tablefmt="simple", stralign="right", disable_numparse=True)


def _formulas(rows: list[tuple[str, Bytes, Bytes]]) -> str:
    """Formulas, one per line, as they are long."""
    lines = []
    for name, before, after in rows:
        lines += [name, f"  torch.compile  {_shown(before)}", f"  memrewrite     {_shown(after)}"]
    return "\n".join(lines)


def _shown(value: Bytes | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else str(value)


def _ratio(before: Bytes | None, after: Bytes | None) -> str:
    if isinstance(before, int) and isinstance(after, int) and before:
        return f"{after / before:.3f}"
    return ""


def estimate(
    model: nn.Module,
    *args: Any,
    optimizer: MakeOptimizer = None,
    dynamic: bool = False,
    **kwargs: Any,
) -> Estimate:
    """Predict the memory of training `model(*args, **kwargs)`, without allocating it.

    The rewritten program has the options of `memrewrite.compile`, or only exact rewrites if the
    model is not compiled. `optimizer` is an optimizer over the model's parameters, a callable that
    makes one (`torch.optim.AdamW`), or None for no state. With `dynamic=True` the sizes of the
    inputs are symbols: B and S are the first two dimensions of the first input. Tensors on the
    meta device count as CPU tensors.

    Raises UnsupportedError where capture fails, where nothing is trained, or where the state of
    the optimizer is not known.
    """
    refuse_options(model, kwargs, "estimate")
    session, model = known_session(model), inner(model)
    galore = session.galore if session else None
    traced, fake = trace(model, args, kwargs, dynamic)
    records = _records(traced)
    if not records:
        raise UnsupportedError(
            "nothing in this call is trained: no parameter requires a gradient, or the model "
            "runs under torch.no_grad()"
        )
    symbols = symbols_of(records)
    small = small_gradients(traced, fake)
    named = dict(model.named_parameters())
    factored: dict[Tensor, tuple[int, int]] = {
        named[n]: (one.size, one.basis) for n, one in small.items() if one.factored
    }
    projected: set[Tensor] = {named[n] for n, one in small.items() if not one.factored}
    moments = session.moments if session else None
    plain, rewritten = state_of(model, optimizer, galore, factored, projected, moments)
    gradients = {name: one.size for name, one in small.items()}
    program = _program(fake, records, "after", rewritten, symbols, gradients)
    if any(one.moves for one in small.values()):
        program = _with_sketches(program, model, args, kwargs, dynamic, rewritten)
    whole, chunked = records, [b.variant.chunked for b in traced.bindings() if b.variant.chunked]
    if any(one.head for one in chunked):
        whole = _records(trace(model, args, kwargs, dynamic, chunked=False)[0])
    return Estimate(
        _program(fake, whole, "before", plain, symbols_of(whole)),
        program,
        {str(symbol): meaning for symbol, meaning in symbols.values()},
        dominates(records),
        "\n".join(dict.fromkeys(one.told for one in chunked if one.told)),
    )


def by_depth(shallow: Mapping[int, Estimate], depth: int) -> Estimate | None:
    """The estimate of a deep model by extrapolation from three shallower ones, or None.

    Valid where every figure grows by a constant per layer: each must be linear in the three
    depths, which are equally far apart.
    """
    (a, first), (b, second), (c, third) = sorted(shallow.items())
    if b - a != c - b:
        raise ValueError(f"depths {a}, {b} and {c} are not equally far apart")

    def line(of: str) -> Program | None:
        values: dict[str, Bytes] = {}
        for key, y in vars(getattr(first, of)).items():
            z, w = (vars(getattr(other, of))[key] for other in (second, third))
            if y is None:
                values[key] = None
            elif z - y != w - z or (w - z) % (c - b):
                return None
            else:
                values[key] = w + (w - z) // (c - b) * (depth - c)
        return Program(**values)

    plain, rewritten = line("plain"), line("rewritten")
    if plain is None or rewritten is None:
        return None
    owners = f"from depths {a}, {b} and {c}; at {c}, {third.dominates}"
    return Estimate(plain, rewritten, {}, owners, third.logits)


# --- totals --------------------------------------------------------------------------------


def _records(traced: Session) -> list[GraphRecord]:
    """Those of the graphs that train."""
    records = (binding.variant.record for binding in traced.bindings())
    return [record for record in records if not record.inference]


def _with_sketches(
    program: Program, model: nn.Module, args: Any, kwargs: Any, dynamic: bool, kept: Kept
) -> Program:
    """The program with the peak of the steps whose gradients are sketched."""
    traced, fake = trace(model, args, kwargs, dynamic, settled=False)
    records = _records(traced)
    peaks = _program(fake, records, "after", kept, symbols_of(records))
    bases = moving_bytes(traced)  # in addition to projectors
    found = [peaks.forward_peak + bases, peaks.backward_peak + bases]
    found += [] if program.refresh_peak is None else [program.refresh_peak]
    return replace(program, refresh_peak=largest(found))


def _program(
    model: nn.Module,
    records: list[GraphRecord],
    when: str,
    kept: Kept,
    symbols: dict[str, Any],
    small: Mapping[str, int] = MappingProxyType({}),
) -> Program:
    """The program of graphs that run in order forward, and in reverse order backward."""
    saved = [read(getattr(r, f"formula_{when}"), symbols) for r in records]
    memory = [_memory(r, when) for r in records]
    gradients = [m.gradients for m in memory]
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    total = sum(small.get(name, p.nbytes) for name, p in trained)
    parameters = sum(p.nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    always = parameters + buffers + kept.state
    forward, backward = [], []
    for index, record in enumerate(memory):
        earlier = sum(saved[:index], 0)
        later = sum(gradients[index + 1 :], 0)
        forward += [always + earlier + read(peak, symbols) for peak in record.forward_peaks]
        backward += [
            always + earlier + later + read(peak, symbols) for peak in record.backward_peaks
        ]
    return Program(
        parameters=parameters,
        buffers=buffers,
        gradients=total,
        optimizer_state=kept.state,
        saved=sum(saved, 0),
        forward_peak=largest(forward),
        backward_peak=largest(backward),
        step_peak=always + total + kept.step,
        refresh_peak=None if kept.refresh is None else always + total + kept.refresh,
    )


def _memory(record: GraphRecord, when: str) -> MemoryRecord:
    memory = record.memory.get(when) or record.memory.get("before")
    if memory is None:
        raise UnsupportedError("a graph could not be followed; see the log for the reason")
    return memory
