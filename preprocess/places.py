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

from shards.common.errors import DataError, DermscaleError, UsageError
from shards.common.fetch import RemoteFile
from shards.common.files import full_disk_names
from shards.common.progress import Progress
from shards.store import Store, is_address, name_of

TARS, HDF5 = (".tar",), (".hdf5", ".h5")
_FETCHED = (".csv", ".tab", ".tsv", ".txt", *TARS, *HDF5)
"""Endings of the files that are looked into before packing."""
_WITHOUT_ENDING = "HAM10000_metadata"
"""The one table that may have none."""


class Near(NamedTuple):
    """A local file or folder to read, and the address that it was copied from, if it is a copy."""

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
    Raises DataError if the address holds nothing or what no folder can hold, UsageError for one with a query.
    DermscaleErrors of the block name the address.
    """
    if not is_address(place):
        yield Near(Path(place))
        return
    if "?" in place:
        raise UsageError(f"{place}: an address with ? cannot be a source; fetch the file, and name it here")
    with tempfile.TemporaryDirectory(prefix="dermscale-") as above, full_disk_names(Path(above)):
        copy = Near(Path(above) / name_of(place), place)
        _copy(Store(place), copy.path)
        try:
            yield copy
        except DermscaleError as error:
            raise type(error)(copy.named(str(error))) from None


def _copy(store: Store, out: Path) -> None:
    files = store.files()
    folders = {str(above) for name in files for above in PurePosixPath(name).parents}
    for name, version in files.items():
        parts = name.split("/") if name else []
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):  # `..` is one of these
            continue
        if "" in parts or name in folders:
            fault = "has a folder without a name" if "" in parts else "is a file and a folder at once"
            raise DataError(f"{store.address}/{name}: {fault}; rename it")
        file = out.joinpath(*parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not name:
            _fetch(Store(store.address.rpartition("/")[0]), out.name, version.bytes, file)
        elif file.name.lower().endswith(_FETCHED) or file.name == _WITHOUT_ENDING:
            _fetch(store, name, version.bytes, file)
        else:
            file.write_text(f"{version.bytes} {version.token}")


def _fetch(store: Store, name: str, size: int, file: Path) -> None:
    archive = name.lower().endswith(TARS + HDF5)
    file.touch()
    with Progress(f"fetching {name}", size, "bytes", lines=archive, transient=True) as bar:
        store.fetch(RemoteFile(name, "", size, None), file, bar)


def read_file(folder: str, name: str, start: int = 0, size: int | None = None) -> bytes:
    """The bytes of a file in a folder or at an address, or `size` of them from `start` on.

    Raises OSError, or DataError for one in a store.
    """
    if is_address(folder):
        return Store(folder).content(name, start, size)
    with io.FileIO(f"{folder}/{name}") as file:  # a Path takes ten times as long
        return file.readall() if size is None else os.pread(file.fileno(), size, start)
