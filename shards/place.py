"""The folder that a shard set is written to: what may be there beforehand, and how a new set replaces an old one.

A new set is written next to its final folder, as `.NAME.partial`. Two renames put it into place: the old set becomes
`.NAME.old`, then the new one takes its name. A crash between the two leaves no set at the place, and the old one in
`.NAME.old`, whole. The next packing or pull puts it back (`locked`).
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.common.errors import DataError
from shards.common.files import lock, sync_folder
from shards.format import ATTACHED, CARDS, INDEX, MANIFEST

_FILES = re.compile(
    rf"shard-\d{{5,}}\.(tar|idx)|{'|'.join(map(re.escape, (*ATTACHED, INDEX, MANIFEST, *CARDS)))}|\.nfs[0-9a-f]+"
)
"""The file names of a shard set (FORMAT.md), and NFS's name for a removed file that another process has open.

A folder that holds any other name is never removed."""


def real_place(out: Path) -> Path:
    """`out` with links resolved: a link stays, and the set is written to the folder that it points to."""
    return Path(os.path.realpath(out))


def beside(place: Path, what: str) -> Path:
    """The hidden path `.NAME.what`, next to `place`."""
    return place.with_name(f".{place.name}.{what}")


def refuse_mount(out: Path) -> None:
    """Raise DataError if something is mounted at `out`, or `out` is `/`: such a folder cannot be renamed."""
    import psutil

    place = real_place(out)
    # `ismount` cannot see a folder that is mounted from its own file system, as containers do.
    mounted = {partition.mountpoint for partition in psutil.disk_partitions(all=True)}
    if os.path.ismount(place) or str(place) in mounted:
        raise DataError(
            f"{out}: is the top of a file system, so no new folder can replace it; choose a folder inside it"
        )


def refuse_inside_file(out: Path) -> None:
    """Raise DataError if one of the folders above `out` is a file."""
    above = next((parent for parent in real_place(out).parents if parent.exists()), Path("/"))
    if not above.is_dir():
        raise DataError(f"{out}: cannot be made, because {above} is a file; choose another folder")


def refuse_occupied(out: Path, overwrite: bool) -> None:
    """Raise DataError if `out` cannot become a shard set.

    That is: a file, a folder that cannot be renamed, a folder that holds anything but a shard set, and a shard set
    unless `overwrite` is True.
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
    if not has_manifest(place):
        raise DataError(
            f"{out}: holds other files and no shard set (no {MANIFEST} with a format_version); "
            "choose an empty or a new folder"
        )
    if name := foreign(path.name for path in place.iterdir()):
        raise DataError(
            f"{out}: holds '{name}', which is not part of a shard set and would be lost; "
            "move it away, or choose another folder"
        )
    if not overwrite:
        raise DataError(f"{out}: already holds a shard set; add --overwrite to replace it, or choose another folder")


def has_manifest(folder: Path) -> bool:
    """Whether `folder` holds a manifest of this format, of any version. Other programs use the same file name.

    No if it cannot be read, or is no folder.
    """
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and isinstance(raw.get("format_version"), int)


def foreign(names: Iterable[str]) -> str | None:
    """The first of some file names that does not belong to a shard set."""
    return next((name for name in sorted(names) if not _FILES.fullmatch(name)), None)


@contextmanager
def locked(place: Path, out: str | Path) -> Iterator[None]:
    """Let no other process write the set `place` meanwhile, and repair first what a killed one left next to it.

    out: what errors call it. Raises DataError if another process writes to it, and as `lock` and `recover` do.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    path = beside(place, "lock")
    busy = "another process is writing to this folder; wait for it or choose another"
    with path.open("wb") as file:
        lock(file, out, busy)
        ours = False
        with suppress(FileNotFoundError):  # the other process has removed this file since
            ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
        if not ours:
            raise DataError(f"{out}: {busy}")
        try:
            recover(place)
            yield
        finally:
            path.unlink(missing_ok=True)


def recover(place: Path) -> None:
    """Repair what a killed `replace` left next to `place`, which the caller has `locked`.

    Raises DataError if `.NAME.old` is not a shard set, or cannot be removed.
    """
    old = beside(place, "old")
    if not os.path.lexists(old):
        return
    if old.is_symlink() or not old.is_dir() or foreign(path.name for path in old.iterdir()):
        raise DataError(f"{old}: is in the way of {place.name} and not a shard set; move it away")
    if (old / MANIFEST).exists() and not (place.exists() and any(place.iterdir())):
        old.rename(place)
        sync_folder(place.parent)
        return
    try:
        shutil.rmtree(old)
    except OSError as error:
        raise DataError(
            f"{old}: is the rest of an old set and cannot be removed ({error.strerror}); end the process that reads it"
        ) from None


def replace(place: Path, new: Path) -> None:
    """Make `new` the folder `place`, and remove the set that was there. The module says what a crash leaves."""
    old = beside(place, "old")
    if place.exists():
        place.rename(old)
    try:
        new.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
    sync_folder(place.parent)
    if old.exists():
        (old / MANIFEST).unlink(missing_ok=True)  # first: the rest must not pass for a whole set after a crash
        shutil.rmtree(old, ignore_errors=True)  # NFS keeps a file that is being read; `recover` removes it
