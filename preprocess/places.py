"""Where the files of a source are: in a folder, or at an address in a store.

A source in a store is listed and its tables are fetched before packing. Each image is read when it is packed, by the
thread or the node that packs it.
"""

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from preprocess.tables import PICTURES
from shards.common.errors import DataError, DermscaleError
from shards.common.fetch import RemoteFile
from shards.common.files import full_disk_names
from shards.common.progress import Progress
from shards.store import Store, is_address, name_of

TARS, HDF5 = (".tar",), (".hdf5", ".h5")
_FETCHED = ("", ".csv", ".tab", ".tsv", ".txt", *TARS, *HDF5)
"""Endings of the files that are looked into before packing. In HAM10000 a table without ending is known."""


class Near(NamedTuple):
    """A file or folder as the readers of sources see it, and the address that it is a copy of, if it is one."""

    path: Path
    address: str = ""

    def named(self, text: str | Path) -> str:
        """A path or a text with paths, as the user knows them."""
        home = self.address.rstrip("/").rpartition("/")[0]
        return str(text).replace(str(self.path.parent), home) if self.address else str(text)


@contextmanager
def near(place: str | Path) -> Iterator[Near]:
    """A source to list, and its tables and archives to read. That of an address is a copy in the temporary folder.

    Images of the copy are no images: each holds what tells it from others, its size and its version in the store.
    Raises DataError if the address holds nothing or a web server would have to be listed. DermscaleErrors of the block
    name the address.
    """
    if not is_address(place):
        yield Near(Path(place))
        return
    with tempfile.TemporaryDirectory(prefix="dermscale-") as above, full_disk_names(Path(above)):
        copy = Near(Path(above) / name_of(place), place)
        _copy(Store(place), copy.path)
        try:
            yield copy
        except DermscaleError as error:
            raise type(error)(copy.named(str(error))) from None


def _copy(store: Store, out: Path) -> None:
    for name, version in store.files().items():
        parts = PurePosixPath(name).parts
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):  # `..` is one of these
            continue
        file = out.joinpath(*parts)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if name and not file.name.lower().endswith(PICTURES) and file.suffix.lower() in _FETCHED:
                _fetch(store, name, version.bytes, file)
            elif name:
                file.write_text(f"{version.bytes} {version.token}")
            else:
                _fetch(Store(store.address.rpartition("/")[0]), out.name, version.bytes, file)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise DataError(
                f"{store.address}/{name}: a folder has a file's name there, which no folder can show; rename one"
            ) from None


def _fetch(store: Store, name: str, size: int, file: Path) -> None:
    archive = name.lower().endswith(TARS + HDF5)
    with Progress(f"fetching {name}", size, "bytes", lines=archive, transient=True) as bar:
        store.fetch(RemoteFile(name, "", size, None), file, bar)
    if not size:
        file.touch()


def read_file(folder: str, name: str, start: int = 0, size: int | None = None) -> bytes:
    """The bytes of a file in a folder or at an address, or `size` of them from `start` on.

    Raises OSError, or DataError for one in a store.
    """
    if is_address(folder):
        return Store(folder).content(name, start, size)
    with io.FileIO(f"{folder}/{name}") as file:  # a Path takes ten times as long
        return file.readall() if size is None else os.pread(file.fileno(), size, start)
