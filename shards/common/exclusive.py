"""Keeps two processes from writing to the same folder at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.common.locking import lock


@contextmanager
def exclusive(folder: Path, job: str) -> Iterator[None]:
    """Hold the only lock on `folder`, made where it is missing; the lock goes with the process, however it ends.

    `job` says in the error what another process is doing there. Raises DataError when another one holds it, and where
    the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, folder, f"another process is {job}; wait for it or choose another folder")
        yield
    finally:
        os.close(descriptor)
