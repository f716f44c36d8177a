"""Calls that Dynamo runs eagerly: the reasons, and how to make it try again.

With `compiler.backend`, the only file that uses private torch APIs. A frame that raises, or
that Dynamo first sees under a dispatch mode or a transform of torch.func, is skipped from then
on, though the next call could be compiled. Resetting this per code object keeps what is
compiled; `torch._dynamo.reset()` would discard it for the whole process.

The private torch APIs here were run on torch 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import CodeType, TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch._dynamo import config
from torch._dynamo.convert_frame import input_codes

Kind = Literal["off", "mode", "limit", "failure", "foreign", "recurrent", "break"]
_actions: Any = eval_frame._FrameAction
AGAIN: Any = eval_frame._FrameExecStrategy(_actions.DEFAULT, _actions.DEFAULT)


class Cause(NamedTuple):
    """Why a call ran no rewritten graph, and what the user can do."""

    kind: Kind
    reason: str
    remedy: str

    @property
    def passing(self) -> bool:
        """Whether the next call may be compiled, if Dynamo tries again."""
        return self.kind in ("off", "mode", "break")


def exempt(function: Callable[..., Any]) -> None:
    """Never compile the frames of a function as such; outer frames still inline it."""
    torch._dynamo.eval_frame.skip_code(function.__code__)


def look_again(codes: Iterable[CodeType]) -> None:
    """Make Dynamo try again code that it skips."""
    for code in codes:
        if code in input_codes:
            eval_frame.set_code_exec_strategy(code, AGAIN)


def traced_by_jit() -> bool:
    """Whether torch.jit.trace is recording."""
    return bool(torch._C._get_tracing_state())


def is_tracing() -> bool:
    """Whether Dynamo is tracing, so that a call now runs once for all later steps."""
    return torch._guards.TracingContext.try_get() is not None


def ran_as_they_are(traceback: TracebackType | None) -> Iterator[CodeType]:
    """The code of an exception's eager frames: a compiled frame has other code, by Dynamo."""
    while traceback is not None:
        yield traceback.tb_frame.f_code
        traceback = traceback.tb_next


def forwards(model: nn.Module) -> Iterator[CodeType]:
    """The code of all modules' forwards, which become frames of their own at a graph break."""
    for kind in {type(module) for module in model.modules()}:
        code = getattr(kind.forward, "__code__", None)
        if code is not None and not kind.__module__.startswith("torch.nn."):
            yield code


def why(model: nn.Module, code: CodeType, failure: str, foreign: bool, raised: int = 0) -> Cause:
    """The cause of a call that has just run eagerly.

    code: of the compiled call. failure: of our backend, "" for none. foreign: whether the
    call's parameters were plain tensors. raised: the number of exceptions if too many, else 0.
    """
    found = _switched_off() or _under_a_mode() or _at_the_limit([code, *forwards(model)])
    if found is not None:
        return found
    if failure:
        remedy = "unset torch._dynamo.config.suppress_errors to see the traceback, and report it"
        return Cause(
            "failure", f"compiling it failed and the error was suppressed: {failure}", remedy
        )
    if foreign:
        reason = "it was called with plain tensors in place of its parameters (functional_call)"
        return Cause("foreign", reason, "call the model itself, or pass nn.Parameters")
    return _recurrent(model) or _broken(raised)


def _switched_off() -> Cause | None:
    stance = torch._dynamo.eval_frame._stance.stance
    if config.disable:
        remedy = "unset TORCH_COMPILE_DISABLE (torch._dynamo.config.disable)"
        return Cause("off", "compilation is disabled", remedy)
    if stance != "default":
        reason = f"torch.compiler.set_stance({stance!r}) is in force"
        return Cause("off", reason, "set the stance back to 'default' to train compressed")
    return None


def _under_a_mode() -> Cause | None:
    mode: Any = torch.utils._python_dispatch._get_current_dispatch_mode()
    if mode is not None:
        reason = f"Dynamo compiles nothing under a {type(mode).__name__}"
        return Cause("mode", reason, "leave that mode to train compressed")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        reason = "it was called under a transform of torch.func (grad, vmap, jvp ...)"
        return Cause("mode", reason, "call the model itself, and backward()")
    return None


def _at_the_limit(codes: list[CodeType]) -> Cause | None:
    entries = max(len(eval_frame._debug_get_cache_entry_list(code)) for code in codes)
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        limit = getattr(config, name)
        if entries >= limit:
            reason = (
                f"Dynamo's limit is reached (torch._dynamo.config.{name} = {limit}): the model has "
                f"been compiled for {entries} kinds of input, and others run eagerly"
            )
            remedy = (
                "pass dynamic=None (or True) where the inputs differ in size, pad them to fewer "
                "sizes, or raise the limit"
            )
            return Cause("limit", reason, remedy)
    return None


def _recurrent(model: nn.Module) -> Cause | None:
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase) and not config.allow_rnn:
            kind = type(module).__name__
            reason = f"Dynamo skips what calls nn.{kind} ({name or kind} here)"
            remedy = "compile the parts around it one by one, memrewrite.compile(model.part, ...)"
            return Cause("recurrent", reason, remedy)
    return None


def _broken(raised: int) -> Cause:
    if raised:
        reason = f"after {raised} exceptions in its forward, Dynamo is left to skip it"
        return Cause("break", reason, "call torch._dynamo.reset() to have it compiled again")
    reason = "Dynamo found nothing that it could compile"
    breaks = torch._dynamo.utils.counters["graph_break"]
    if breaks:
        reason += f" (its last graph break: {next(reversed(breaks)).splitlines()[0]})"
    return Cause("break", reason, 'run with TORCH_LOGS="graph_breaks" to see where and why')
