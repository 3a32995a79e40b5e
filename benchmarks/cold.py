"""Files in the page cache, or out of it with the proof that they are: for measurements that begin warm or cold."""

import ctypes
import mmap
import os
import shutil
from pathlib import Path


class StillCachedError(Exception):
    """Files could not be dropped from the page cache, so nothing cold can be measured."""


def cached_share(path: Path) -> float:
    """Share of a file's pages that are in the page cache, 0 to 1 (`mincore`, which reads nothing)."""
    size = path.stat().st_size
    if not size:
        return 0.0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 1, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    pages = -(-size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        try:
            if libc.mincore(address, size, found):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        finally:
            libc.munmap(address, size)
    finally:
        os.close(descriptor)
    return sum(flag & 1 for flag in found) / pages


def drop_from_cache(folder: Path, most: float = 0.02) -> None:
    """Drop all files of a folder from the page cache (`posix_fadvise`, no privileges needed).

    Raises StillCachedError where more than the share `most` of a file of at least 1 MiB is still there, which happens
    while somebody has it mapped, and on file systems that live in memory.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only clean pages can be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        if path.stat().st_size >= 1 << 20 and (left := cached_share(path)) > most:
            raise StillCachedError(f"{path.name}: {100 * left:.0f} % of it stayed in the page cache")


def read_into_cache(folder: Path) -> None:
    """Read every file of a folder once, those that are linked too, so that the page cache holds them."""
    with Path(os.devnull).open("wb") as nowhere:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    shutil.copyfileobj(file, nowhere, 1 << 20)
