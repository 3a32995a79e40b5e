"""Files that are either whole on the disk or not there, and locks by which one process alone writes to a place."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from shards.common.errors import DataError


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write `path` with: it lies aside, and is flushed to the disk and renamed into place at the end.

    Where writing fails, `path` stays as it was, nothing is left aside, and an OSError names `path`.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):  # of a full disk it names no file, otherwise the one aside
            error.filename = str(path)
        with suppress(OSError):
            aside.unlink()
        raise
    sync_folder(path.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Write a whole file at once, as `whole_file` does."""
    with whole_file(path) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO[bytes] | int, place: Path, busy: str) -> None:
    """Lock an open file, or a folder's descriptor, until it is closed; the caller closes it where this raises.

    place: that the errors name. busy: what they say of it where another process holds the lock. Raises DataError for
    that, and where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{place}: {busy}") from None
    except OSError as error:
        raise DataError(
            f"{place}: its file system has no locks ({error.strerror}), which keep two processes from writing there "
            "at once; choose a folder on another file system"
        ) from None


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
