"""This machine: its cores, its free memory, and what the C library does with freed memory."""

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Parameters of mallopt(3)."""
_LARGEST_THRESHOLD = 32 << 20
"""Bytes: glibc takes no larger threshold for blocks that are mapped one by one."""
_KEPT = 512 << 20
"""Bytes: the most that is kept."""


def available_cores() -> int:
    """Cores that this process may use, within the limit of the container."""
    return min(len(os.sched_getaffinity(0)), _container_cores(_CGROUP))


def _container_cores(cgroup: Path) -> int:
    """The processor time of the control group (version 2), in whole cores and rounded up."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except FileNotFoundError:
        return sys.maxsize
    return sys.maxsize if quota == "max" else max(1, math.ceil(int(quota) / int(period)))


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

    On CUDA: what the driver has free plus what PyTorch's allocator holds unused, without fragments. On the CPU: what
    Linux calls available, within the limit of the container.
    """
    if device == "cpu":
        import psutil

        return min(psutil.virtual_memory().available, _container_room(_CGROUP))
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    fragments = torch.cuda.memory_stats(device).get("inactive_split_bytes.all.current", 0)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - fragments


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
