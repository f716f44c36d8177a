"""Reading memory: of this process on a CPU, of torch's allocator on CUDA.

On the CPU a peak is the high-water mark of resident memory, which the kernel resets on
request. It says what tensors take only if freed blocks leave the process at once: a process
that is measured must be *started* with FREE_AT_ONCE in its environment (glibc's). Asking for
it later is too late: blocks that the heap has got by then go back to the heap. It slows
allocation, so steps are timed in another process.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from memrewrite.projected import ProjectedGrad

BLOCK = 64 * 1024  # above it, a freed block goes back to the system
FREE_AT_ONCE = {
    "MALLOC_MMAP_THRESHOLD_": str(BLOCK),
    "MALLOC_TRIM_THRESHOLD_": str(BLOCK),
    "MALLOC_ARENA_MAX": "1",
}


class Meter(Protocol):
    """Bytes; `peak` is the most since the last `reset`."""

    def settle(self) -> int:
        """Let go of what is unused and forget the peak: the bytes that remain."""

    def reset(self) -> None:
        """Forget the peak."""

    def peak(self) -> int:
        """The most bytes held at once since `reset`."""

    def reserved(self) -> int:
        """The most bytes that an allocator of its own took since `reset`; 0 where there is none."""

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""


@dataclass(frozen=True)
class Resident:
    """Of this process; Linux with glibc."""

    def settle(self) -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        self.reset()
        return _status("VmRSS")

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return _status("VmHWM")

    def reserved(self) -> int:
        return 0

    def wait(self) -> None:
        pass


@dataclass(frozen=True)
class Cuda:
    """Of torch's caching allocator."""

    def settle(self) -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.reset()
        return torch.cuda.memory_allocated()

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def reserved(self) -> int:
        return torch.cuda.max_memory_reserved()

    def wait(self) -> None:
        torch.cuda.synchronize()


def meter(device: str) -> Meter:
    """Raises OSError where this platform does not tell."""
    if torch.device(device).type == "cuda":
        return Cuda()
    Resident().reset()
    return Resident()


def process_peak() -> int:
    """Resident memory at its highest, of the whole process; 0 where it is not told."""
    return _status("VmHWM") if Path("/proc/self/status").exists() else 0


def available() -> int | None:
    """Bytes that can still be taken on this machine; None where it is not told."""
    try:
        words = Path("/proc/meminfo").read_text().split()
    except OSError:
        return None
    return int(words[words.index("MemAvailable:") + 1]) * 1024


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Each memory once."""
    plain = [held for t in tensors for held in (t.held() if isinstance(t, ProjectedGrad) else (t,))]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain}
    return sum(storages.values())


class Stopwatch:
    """Seconds of the device's work between two reads; it runs from the start."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.begun = meter, 0.0
        self.read()

    def read(self) -> float:
        """Seconds since the last read."""
        self.meter.wait()
        begun, self.begun = self.begun, time.perf_counter()
        return self.begun - begun


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
