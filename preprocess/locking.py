"""Keeps two processes from writing to the same folder at once."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import DataError


@contextmanager
def exclusive(folder: Path, job: str) -> Iterator[None]:
    """Hold the only lock on `folder`, made where it is missing; the lock goes with the process, however it ends.

    `job` says in the error what another process is doing there. Raises DataError when another one holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another process is {job}; wait for it or choose another folder") from None
        yield
    finally:
        os.close(descriptor)
