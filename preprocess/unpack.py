"""Unpacks images and tables from zip archives that are not trusted: nothing is written outside one new folder.

Only the last part of a member's name is used, so the worst archive could do no more than choose file names; archives
that try more (absolute paths, `..`, links, encryption, bombs) are refused whole before anything is written.
"""

import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from shards.common.errors import DataError
from shards.common.progress import Progress

_MOST_BYTES = 4 << 30
"""Unpacked size above which an archive is refused: the largest official one has 1.4 GB."""
_MOST_TIMES = 200
"""Members that unpack to more than this many times their packed size are refused; real ones stay below 20."""
_SMALL_BYTES = 1 << 20  # below this, no ratio is suspicious
_LONGEST_NAME = 200
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError)
"""What zipfile and zlib raise for damaged archives; UnicodeDecodeError: for a name flagged as UTF-8 that is none."""


def members(archive: zipfile.ZipFile, name: str, suffix: str) -> dict[str, zipfile.ZipInfo]:
    """The members to unpack, file name → member: those with `suffix`, but no hidden ones (`__MACOSX`, `._…`).

    name: of the archive, for the errors. Raises DataError for an archive that holds anything hostile, wherever it is.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    total = 0
    for info in archive.infolist():
        raw = info.orig_filename  # before zipfile cuts it at a null byte
        path = PurePosixPath(raw)
        kind = stat.S_IFMT(info.external_attr >> 16)
        reason = None
        if path.is_absolute() or ".." in path.parts or "\\" in raw or ":" in raw or not raw.isprintable():
            reason = "its path leaves the folder or is no plain path"
        elif kind and not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            reason = "it is a link or another special file"
        elif len(path.name) > _LONGEST_NAME:
            reason = f"its name is longer than {_LONGEST_NAME} characters"
        elif info.flag_bits & 1:
            reason = "it is encrypted"
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            reason = "it is neither stored nor deflated"
        elif not 0 <= info.header_offset < archive.start_dir:  # zipfile would seek there all the same
            reason = "it begins outside the archive"
        elif info.file_size > max(_SMALL_BYTES, _MOST_TIMES * info.compress_size):
            reason = f"it would unpack to {info.file_size:,} bytes from {info.compress_size:,}"
        if reason:
            raise DataError(f"{name}: holds '{ascii(raw)[1:-1][:80]}', and {reason}")
        total += info.file_size
        if total > _MOST_BYTES:
            raise DataError(f"{name}: would unpack to more than {_MOST_BYTES:,} bytes")
        hidden = path.name.startswith(".") or "__MACOSX" in path.parts
        if info.is_dir() or hidden or path.suffix.lower() != suffix:
            continue
        if path.name in found:
            raise DataError(f"{name}: holds two members named '{path.name}'")
        found[path.name] = info
    return found


@contextmanager
def _opened(archive_path: Path) -> Iterator[zipfile.ZipFile]:
    """An archive that is read within; what zipfile and its decoders raise for a damaged one becomes a DataError."""
    try:
        with zipfile.ZipFile(archive_path) as archive:
            yield archive
    except _DAMAGED as error:
        reason = "it ends too early" if isinstance(error, EOFError) else error  # which has no text
        raise DataError(f"{archive_path.name}: is damaged or no zip archive ({reason})") from None


def unpack_images(archive_path: Path, target: Path, images: int) -> None:
    """Unpack the `.jpg` members of an archive into the new folder `target`, aside first and renamed when whole.

    Raises DataError for a file that is no zip, is damaged or hostile, or does not hold `images` images.
    """
    aside = target.with_name(f".{target.name}.partial")
    if aside.exists():  # left by a run that was killed
        shutil.rmtree(aside)
    try:
        with _opened(archive_path) as archive:
            found = members(archive, archive_path.name, ".jpg")
            if len(found) != images:
                raise DataError(f"{archive_path.name}: holds {len(found):,} images, and the official one {images:,}")
            aside.mkdir()
            with Progress(f"unpacking {archive_path.name}", images, "images") as bar:
                for name, info in found.items():
                    with archive.open(info) as source, (aside / name).open("wb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
                    bar.advance(1)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    os.sync()  # one flush for thousands of files
    aside.rename(target)


def read_only_member(archive_path: Path, suffix: str) -> bytes:
    """The content of an archive's one member with `suffix`. Raises DataError as `unpack_images` does."""
    with _opened(archive_path) as archive:
        found = members(archive, archive_path.name, suffix)
        if len(found) != 1:
            raise DataError(f"{archive_path.name}: holds {len(found)} {suffix} files, and one is expected")
        return archive.read(next(iter(found.values())))
