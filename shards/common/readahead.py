"""Work on many files with threads: in order, and a bounded number ahead."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_WINDOW = 16
"""Items under way per worker: enough to keep every worker busy while a finished shard is flushed to the disk."""
_TOGETHER = 4
"""Items that a worker takes at once: handing over is paid once for them."""

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    work: Callable[[T], R], items: Iterable[T], files: Iterable[str], workers: int
) -> Generator[tuple[T, R], None, None]:
    """Each item with `work` of it, in order, done by `workers` threads, never more than a window ahead.

    files: the file that each item needs; the system is told of it early and reads it in while others are worked on.
    Close the generator (`contextlib.closing`) to drop what has not begun.
    """
    pending: deque[tuple[list[T], Future[list[R]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pack")
    pairs = zip(items, files, strict=True)
    try:
        while group := list(islice(pairs, _TOGETHER)):
            for _, file in group:
                _announce(file)
            some = [item for item, _ in group]
            pending.append((some, pool.submit(lambda some: [work(item) for item in some], some)))
            if len(pending) * _TOGETHER >= _WINDOW * workers:
                done, results = pending.popleft()
                yield from zip(done, results.result(), strict=True)
        while pending:
            done, results = pending.popleft()
            yield from zip(done, results.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _announce(file: str) -> None:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:  # whatever is wrong with the file, the worker that opens it says so
        return
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
