"""Measure memory: of this process on a CPU, of torch's allocator on CUDA.

On the CPU a peak is the high-water mark of resident memory, which the kernel resets on
request. It measures tensors only if freed blocks are returned to the system at once: a measured
process must be *started* with FREE_AT_ONCE in its environment (for glibc), because blocks that
are on the heap already return to the heap. This slows allocation, so steps are timed in another
process.
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

from memrewrite.gradients.gradient import ProjectedGrad

BLOCK = 64 * 1024  # bytes: larger blocks are returned to the system when freed
FREE_AT_ONCE = {
    "MALLOC_MMAP_THRESHOLD_": str(BLOCK),
    "MALLOC_TRIM_THRESHOLD_": str(BLOCK),
    "MALLOC_ARENA_MAX": "1",
}


class Meter(Protocol):
    """Memory in bytes."""

    def settle(self) -> int:
        """Free what is unused and reset the peak; returns the bytes that remain."""

    def reset(self) -> None:
        """Reset the peak."""

    def peak(self) -> int:
        """The most bytes in use since `reset`."""

    def reserved(self) -> int:
        """The most bytes that a caching allocator reserved since `reset`; 0 without one."""

    def taken(self) -> int:
        """The most bytes that this process has taken."""

    def available(self) -> int:
        """The bytes that are still available to any process."""

    def wait(self) -> None:
        """Wait until the device has completed its work."""


@dataclass(frozen=True)
class Resident:
    """Resident memory of this process; Linux with glibc."""

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

    def taken(self) -> int:
        return _status("VmHWM")

    def available(self) -> int:
        words = Path("/proc/meminfo").read_text().split()
        return int(words[words.index("MemAvailable:") + 1]) * 1024

    def wait(self) -> None:
        pass


@dataclass(frozen=True)
class Cuda:
    """torch's caching allocator on a device, which need not be the current one."""

    device: torch.device

    def settle(self) -> int:
        gc.collect()
        self.wait()
        torch.cuda.empty_cache()
        self.reset()
        return torch.cuda.memory_allocated(self.device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        self.wait()
        return torch.cuda.max_memory_allocated(self.device)

    def reserved(self) -> int:
        return torch.cuda.max_memory_reserved(self.device)

    def taken(self) -> int:
        return self.reserved()

    def available(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return free

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


def meter(device: str) -> Meter:
    """The meter of a device. Raises OSError where the platform has none."""
    if torch.device(device).type == "cuda":
        return Cuda(torch.device(device))
    Resident().reset()
    return Resident()


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    plain = [held for t in tensors for held in (t.held() if isinstance(t, ProjectedGrad) else (t,))]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain}
    return sum(storages.values())


class Stopwatch:
    """Seconds of the device's work between two reads; starts when it is created."""

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
