"""Files that are either complete on the disk or absent, and locks that let only one process write to a place."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO

from shards.common.errors import DataError


def encoded(text: str) -> bytes:
    """UTF-8. In a path, bytes that are no UTF-8 become `\\udce9` and the like, which JSON reads back as that path."""
    return text.encode("utf-8", "backslashreplace")


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file next to `path`; at the end it is flushed to the disk and renamed to `path`.

    If writing fails, `path` stays as it was, the temporary file is removed, and an OSError names `path`.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):  # it names no file on a full disk, otherwise the temporary one
            error.filename = str(path)
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


@contextmanager
def full_disk_names(folder: Path) -> Iterator[None]:
    """Name `folder` in the error of a full disk that names no file, such as that of a file which is open for long."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:
            error.filename = str(folder)
        raise


@contextmanager
def growing_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file next to `path` for results that come one by one; at the end it is flushed and renamed to `path`.

    If the block fails or the process is killed, the file stays, unless it is empty. It is named `path`.part, or
    `path`.part2 and so on if there is one already: what another process left is not overwritten. An OSError names it.
    """
    names = (path.with_name(f"{path.name}.part{number if number > 1 else ''}") for number in count(1))
    part = next(name for name in names if not os.path.lexists(name))
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(part)
        with suppress(OSError):
            if not part.stat().st_size:
                part.unlink()
        raise
    sync_folder(path.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file through `whole_file`."""
    with whole_file(path) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO[bytes] | int, place: str | Path, busy: str) -> None:
    """Lock an open file, or a folder's descriptor, until it is closed. If this raises, the caller closes it.

    place: named in the errors. busy: the message if another process holds the lock. Raises DataError then, and if the
    file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{place}: {busy}") from None
    except OSError as error:
        raise DataError(
            f"{place}: its file system has no locks ({error.strerror}), so two processes could write there at once; "
            "choose a folder on another file system"
        ) from None


@contextmanager
def exclusive(folder: Path, job: str) -> Iterator[None]:
    """Hold the only lock on `folder`, which is created if missing. The lock ends with the process, however that ends.

    job: what the error says that another process is doing there. Raises DataError if another process holds the lock,
    and if the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, folder, f"another process is {job}; wait for it or choose another folder")
        yield
    finally:
        os.close(descriptor)
