"""The lock by which one process alone writes to a place. It goes with the process, however that ends."""

import fcntl
from pathlib import Path
from typing import IO

from shards.common.errors import DataError


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
