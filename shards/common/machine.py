"""This machine: its cores and who uses them, its free memory, and what the C library does with freed memory."""

import ctypes
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Parameters of mallopt(3)."""
_LARGEST_THRESHOLD = 32 << 20
"""Bytes: glibc takes no larger threshold for blocks that are mapped one by one."""
_KEPT = 512 << 20
"""Bytes: the most that is kept."""


def available_cores() -> int:
    """Cores that this process may use: those of its affinity, within the processor time of its control groups."""
    return min(len(os.sched_getaffinity(0)), _container_cores(_CGROUP)[0])


def _container_cores(cgroup: Path, of_process: Path = Path("/proc/self/cgroup")) -> tuple[int, Path]:
    """The least processor time of the process's control group and all above it, in whole cores, and the folder of it.

    cgroup: where they are mounted. of_process: lines `number:controllers:/path`; version 2 names no controllers.
    """
    lines = [line.split(":", 2) for line in of_process.read_text().splitlines()] if of_process.exists() else []
    groups = [(cgroup, "/")]
    groups += [(cgroup, path) for number, _, path in lines if number == "0"]
    groups += [(cgroup / "cpu", path) for _, controllers, path in lines if "cpu" in controllers.split(",")]
    least = sys.maxsize, cgroup
    for root, path in groups:
        below = root / path.lstrip("/")
        for folder in (below, *below.parents[: len(below.parts) - len(root.parts)]):
            with suppress(OSError, ValueError):  # no such file here, or `max` or -1: no limit
                least = min(least, (_quota(folder), folder))
    return least


def _quota(folder: Path) -> int:
    """The cores of one control group, of version 2 or 1, rounded up. Raises OSError or ValueError without a limit."""
    if (folder / "cpu.max").exists():
        quota, period = (folder / "cpu.max").read_text().split()
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    if int(quota) < 0:
        raise ValueError("no limit")
    return max(1, math.ceil(int(quota) / int(period)))


@dataclass(frozen=True)
class Load:
    """What happened on the cores of this process in some time.

    cores: how many it may use. others: those of them that other processes used, on average. interruptions: how often a
    second the system took a core from a thread of this process that still had work (involuntary context switches).
    """

    cores: int
    others: float
    interruptions: float


class LoadMeter:
    """Measures the load on the cores that this process may use, from one reading to the next.

    Where a control group limits the processor time, it is shared by the processes of the group, on whatever core.
    """

    def __init__(self) -> None:
        """Begin now."""
        self._cores = sorted(os.sched_getaffinity(0))
        cores, group = _container_cores(_CGROUP)
        self._group = group if cores < len(self._cores) else None
        self._last = self._now()

    def read(self) -> Load:
        """The load since the last reading."""
        last, self._last = self._last, self._now()
        passed, busy, own, switches = (new - old for new, old in zip(self._last, last, strict=True))
        return Load(available_cores(), max(0.0, (busy - own) / passed), switches / passed)

    def _now(self) -> tuple[float, float, float, int]:
        """The time, busy seconds of the cores, processor seconds of this process, and its involuntary switches."""
        if self._group is None:
            import psutil

            cores = psutil.cpu_times(percpu=True)
            busy = sum(one.user + one.nice + one.system for number, one in enumerate(cores) if number in self._cores)
        else:
            busy = _group_s(self._group)
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        return time.monotonic(), busy, time.process_time(), switches


def _group_s(folder: Path) -> float:
    """The processor seconds of a control group, of version 2 or 1."""
    if (folder / "cpu.stat").exists() and "usage_usec" in (text := (folder / "cpu.stat").read_text()):
        return int(dict(line.split() for line in text.splitlines())["usage_usec"]) / 1e6
    usage = folder / "cpuacct.usage"  # it is there if both controllers are mounted together, as they usually are
    return int(usage.read_text()) / 1e9 if usage.exists() else 0.0


@contextmanager
def single_threaded_opencv() -> Iterator[None]:
    """OpenCV without its own threads: they would compete with the caller's, each of which works on one image."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def free_bytes(device: str) -> int:
    """Bytes that can be allocated on `device`: `cpu`, `cuda` or `cuda:N`.

    On CUDA: what the driver has free plus what PyTorch's allocator holds unused, without fragments, and within this
    process's share of the memory (`torch.cuda.set_per_process_memory_fraction`). On the CPU: what Linux calls
    available, within the limit of the container.
    """
    if device == "cpu":
        import psutil

        return min(psutil.virtual_memory().available, _container_room(_CGROUP))
    import torch

    free, total = torch.cuda.mem_get_info(device)
    share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    fragments = torch.cuda.memory_stats(device).get("inactive_split_bytes.all.current", 0)
    return min(free + torch.cuda.memory_reserved(device), share) - torch.cuda.memory_allocated(device) - fragments


def _container_room(cgroup: Path) -> int:
    """Bytes up to the limit of the control group (version 2), file cache that can be dropped counted as free."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except FileNotFoundError:
        return 1 << 62
    if limit == "max":
        return 1 << 62
    return max(int(limit) - used + int(stat.get("inactive_file", 0)), 0)


def keep_freed_memory() -> None:
    """Let the C library keep freed blocks of up to 32 MiB, 512 MiB in all, for this whole process (mallopt of glibc;
    other C libraries are left alone).

    Otherwise the memory of each decoded image goes back to the system and is requested again: 450 page faults an
    image, which took 15 % of the processor time where this was measured.
    """
    _set({_MMAP_THRESHOLD: _LARGEST_THRESHOLD, _TRIM_THRESHOLD: _KEPT})


def keep_all_freed_memory() -> None:
    """Let the C library keep all freed memory until the process ends (mallopt of glibc; other C libraries are left
    alone).

    For a process that requests the same sizes again and again. Each training step frees its activations, a gigabyte,
    and the next step gets the memory back with hundreds of thousands of page faults. Without those ResNet-18 trained
    1.08 times as fast on two cores, with 3 % more memory at the peak. Changing sizes leave gaps that nothing fits
    into: call `give_back_freed_memory` from time to time.
    """
    _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1})


def give_back_freed_memory() -> None:
    """Give all free pages back to the system (malloc_trim of glibc; other C libraries are left alone)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _set(parameters: dict[int, int]) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, value in parameters.items():
            libc.mallopt(parameter, value)
