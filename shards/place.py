"""The place of a shard set: what may stand there beforehand, and how a whole new set comes to stand there.

The new set is written beside the place, as `.NAME.partial`, and swapped in. Where the file system has no exchange of
two names (NFS), the swap is two renames: a crash between them leaves no set at the place and the old one, whole, beside
it as `.NAME.old`, until the next packing calls `recover`.
"""

import ctypes
import errno
import json
import os
import re
import shutil
from pathlib import Path

from shards.common.errors import DataError
from shards.common.files import sync_folder
from shards.format import INDEX, MANIFEST

_FILES = re.compile(
    rf"shard-\d{{5,}}\.(tar|idx)|quarantine\.csv|{re.escape(INDEX)}|{re.escape(MANIFEST)}|\.nfs[0-9a-f]+"
)
"""The names in a shard set (FORMAT.md), and NFS's for a file that was removed while another process had it open.

A folder with any other is never removed."""
_MOUNTS = Path("/proc/self/mountinfo")


def real_place(out: Path) -> Path:
    """`out` without links: a link is left as it is, and the set goes, and is put together, where the link leads."""
    return Path(os.path.realpath(out))


def beside(place: Path, what: str) -> Path:
    """The hidden path `.NAME.what` in the folder that `place` is in."""
    return place.with_name(f".{place.name}.{what}")


def refuse_mount(out: Path) -> None:
    """Raise DataError where `out` is `/` or another place that a folder is mounted at: it cannot be renamed."""
    place = real_place(out)
    if os.path.ismount(place) or os.fsencode(place) in _mounted():
        raise DataError(
            f"{out}: is the top of a file system, which no new folder can take the place of; choose a folder inside it"
        )


def _mounted() -> set[bytes]:
    """The places that the system says something is mounted at; `ismount` cannot see those within one file system."""
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return set()
    return {re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), line.split()[4]) for line in lines}


def refuse_inside_file(out: Path) -> None:
    """Raise DataError where one of the folders that `out` shall lie in is a file."""
    above = next((parent for parent in real_place(out).parents if parent.exists()), Path("/"))
    if not above.is_dir():
        raise DataError(f"{out}: cannot be made, because {above} is a file; choose another folder")


def refuse_occupied(out: Path, overwrite: bool) -> None:
    """Raise DataError where `out` cannot become a shard set.

    That is a file, a place that cannot be renamed, a folder that holds anything but a shard set, or a set where
    `overwrite` is False.
    """
    refuse_mount(out)
    refuse_inside_file(out)
    place = real_place(out)
    if not place.exists():
        return
    if not place.is_dir():
        raise DataError(f"{out}: is a file; choose a folder")
    if not any(place.iterdir()):
        return
    if not _has_manifest(place):
        raise DataError(
            f"{out}: holds other files and no shard set (no {MANIFEST} with a format_version); "
            "choose an empty or a new folder"
        )
    if strange := _strange(place):
        raise DataError(
            f"{out}: holds '{strange}', which is no part of a shard set and would be lost with it; "
            "move it away, or choose another folder"
        )
    if not overwrite:
        raise DataError(f"{out}: already holds a shard set; add --overwrite to replace it, or choose another folder")


def _has_manifest(folder: Path) -> bool:
    """Whether `folder` holds a manifest of this format, of whatever version; others use the same file name."""
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return False
    return isinstance(raw, dict) and isinstance(raw.get("format_version"), int)


def _strange(folder: Path) -> str | None:
    """The first name in `folder` that is none of a shard set."""
    return next((name for name in sorted(path.name for path in folder.iterdir()) if not _FILES.fullmatch(name)), None)


def recover(place: Path) -> None:
    """Put right what a swap of two renames left beside `place` when it was killed; call it under the packer's lock.

    Raises DataError where what lies there is not of a shard set, or cannot be removed.
    """
    old = beside(place, "old")
    if not os.path.lexists(old):
        return
    if old.is_symlink() or not old.is_dir() or _strange(old):
        raise DataError(f"{old}: is in the way of packing to {place.name} and no shard set; move it away")
    if (old / MANIFEST).exists() and not (place.exists() and any(place.iterdir())):
        old.rename(place)
        sync_folder(place.parent)
        return
    try:
        shutil.rmtree(old)
    except OSError as error:
        raise DataError(
            f"{old}: is left of an older set and cannot be removed ({error.strerror}); end what still reads it"
        ) from None


def swap_into_place(new: Path, place: Path) -> None:
    """Make `new` the folder `place`; an older one goes away only after that. Atomic where renameat2 can exchange."""
    if not place.exists():
        new.rename(place)
        sync_folder(place.parent)
        return
    old = new
    if not _exchange(new, place):
        old = beside(place, "old")
        place.rename(old)
        new.rename(place)
    sync_folder(place.parent)
    (old / MANIFEST).unlink(missing_ok=True)  # first: what a kill leaves of `old` must not be taken for a whole set
    shutil.rmtree(old, ignore_errors=True)  # NFS keeps a file that is still read; the next packing clears what is left


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change names at once; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    at_fdcwd, rename_exchange = -100, 2
    if libc.renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
        return True
    if ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    return False
