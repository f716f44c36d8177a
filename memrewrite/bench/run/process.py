"""The parent's side of a worker: start it, send requests, detect its death."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from memrewrite.bench.configurations import Configuration
from memrewrite.bench.run.subject import Request


class Failed(Exception):
    """A worker failed; `facts` has the stage and the error."""

    def __init__(self, facts: dict[str, Any]) -> None:
        super().__init__(f"{facts['stage']}: {facts['message']}")
        self.facts = facts


class Child:
    """A worker process, which is killed when the `with` block ends."""

    def __init__(
        self,
        configuration: Configuration,
        asked: Request,
        log: Path,
        environment: Mapping[str, str],
        timeout: float,
    ) -> None:
        self.configuration, self.timeout, self.log = configuration, timeout, log
        self._stderr = log.open("a")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "memrewrite.bench.run.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, **environment},
            text=True,
            start_new_session=True,  # only the parent handles Ctrl-C
        )
        self._send([configuration.name, dict(vars(asked))])

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill it and its child processes; caches stay."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass

    def ask(self, do: str, **facts: Any) -> dict[str, Any]:
        """Send a request; returns the answer. Raises Failed for an error, a death or a timeout."""
        self._send({"do": do, **facts})
        line = self._line(do)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead, which reading its answer reports

    def _line(self, do: str) -> str:
        assert self._process.stdout is not None
        deadline = time.monotonic() + self.timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not selector.select(timeout=1.0):
                if time.monotonic() > deadline:
                    self.close()
                    raise Failed(_facts(do, "TimeoutError", f"no answer in {self.timeout:.0f} s"))
        line = self._process.stdout.readline()
        if not line:
            raise Failed(self._death(do))
        return line

    def _death(self, do: str) -> dict[str, Any]:
        status = self._process.wait()
        tail = " ".join(self.log.read_text().splitlines()[-3:])
        if status == -signal.SIGKILL:
            facts = _facts(do, "Killed", "killed by the system, as it does when memory runs out")
            return {**facts, "out_of_memory": True}
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return _facts(do, "Died", f"{how}; {tail}; see {self.log}")


def _facts(stage: str, kind: str, message: str) -> dict[str, Any]:
    return {"stage": stage, "type": kind, "message": message, "out_of_memory": False}
