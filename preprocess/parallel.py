"""Work on many files with threads: in order, a bounded number ahead, and without giving memory back all the time."""

import ctypes
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

_WINDOW = 16
"""Items under way per worker: enough to keep every worker busy while a finished shard is flushed to the disk."""

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    work: Callable[[T], R], items: Iterable[T], files: Iterable[Path], workers: int
) -> Generator[tuple[T, R], None, None]:
    """Each item with `work` of it, in order, done by `workers` threads, never more than a window ahead.

    files: the file that each item needs; the system is told of it early and reads it in while others are worked on.
    Close the generator (`contextlib.closing`) to drop what has not begun.
    """
    pending: deque[tuple[T, Future[R]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pack")
    try:
        for item, file in zip(items, files, strict=True):
            _announce(file)
            pending.append((item, pool.submit(work, item)))
            if len(pending) >= _WINDOW * workers:
                first, result = pending.popleft()
                yield first, result.result()
        while pending:
            first, result = pending.popleft()
            yield first, result.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _announce(file: Path) -> None:
    with suppress(OSError):  # whatever is wrong with the file, the worker that opens it says so
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def keep_freed_memory() -> None:
    """Let the C library keep what it frees (glibc's mallopt; nothing happens elsewhere).

    Otherwise each decoded image is given back to the system and asked for again: 450 page faults an image, which took
    15 % of the processor time where this was measured.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 512 << 20)
