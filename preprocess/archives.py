"""Images inside tars (webdataset's and Hugging Face's form) and HDF5 files (ISIC 2024's), listed and read by name."""

import functools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from preprocess.places import TARS, read_file
from preprocess.tables import PICTURES, SPLIT_NAMES
from shards.common.errors import DataError, UsageError
from shards.store import is_address

KEY = "__key__"
"""The column that names the image: webdataset's word."""
_FIELDS = ("cls", "txt", "json")
"""Endings of the members of a tar that describe an image: the label, a text, and an object of fields."""


class Member(NamedTuple):
    """Where an image is: its archive, and the offset and size of its bytes; without size where only HDF5 finds them."""

    archive: str
    offset: int = 0
    size: int = 0


class Archives:
    """The images of some archives, each named `<archive>/<member>`. It can be pickled; reading opens the file.

    members: the place of each image.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        """names: of the archives, relative to the folder. Raises DataError for one that cannot be read.

        Raises UsageError if h5py is missing and needed.
        """
        self.folder, self.columns = folder, [KEY]
        self.members: dict[str, Member] = {}
        self._fields: dict[str, dict[str, str]] = {}
        for name in names:
            (self._list_tar if name.lower().endswith(TARS) else self._list_hdf5)(name)
        self.path, self.files = folder, list(self.members)
        splits = set(map(self._split_of, self._fields))
        if "split" not in self.columns and "" not in splits and len(splits) > 1:
            self.columns.append("split")
        self.split = "split" if "split" in self.columns else None

    def _list_tar(self, name: str) -> None:
        described: dict[str, dict[str, str]] = {}
        images: dict[str, str] = {}
        try:
            with tarfile.open(self.folder / name, "r:") as tar:
                for member in tar:
                    place, _, base = member.name.rpartition("/")
                    key, _, ending = base.partition(".")
                    if not member.isfile() or base.startswith("."):
                        continue
                    key = f"{place}/{key}"
                    if base.lower().endswith(PICTURES):
                        file = f"{name}/{member.name}"
                        images[key] = images.get(key, file)
                        self.members[file] = Member(name, member.offset_data, member.size)
                    elif ending.lower() in _FIELDS and (content := tar.extractfile(member)):
                        described.setdefault(key, {}).update(_described(ending.lower(), content.read()))
        except (OSError, tarfile.TarError, ValueError) as error:
            raise DataError(f"{self.folder / name}: is no tar of images and labels ({error}); get it again") from None
        for key, file in images.items():
            self._fields[file] = described.get(key, {})
            self.columns += [column for column in self._fields[file] if column not in self.columns]

    def _list_hdf5(self, name: str) -> None:
        for key, images in _hdf5(f"{self.folder}/{name}").items():
            # bytes in one piece are read as a tar's, from a store too; text and other types have a form of their own
            plain = images.dtype.kind == "V" and images.shape == () and images.id.get_offset() is not None
            place = (images.id.get_offset(), images.id.get_storage_size()) if plain else ()
            self.members[f"{name}/{key}.jpg"] = Member(name, *place)

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        """What the tars say of each image, as the rows of a table: its name as KEY, and its fields."""
        for number, (file, fields) in enumerate(self._fields.items(), 1):
            yield number, {"split": self._split_of(file), **fields, KEY: file}

    def read(self, file: str) -> bytes:
        """The bytes of an image. Raises OSError."""
        return read_member(str(self.folder), file, self.members[file])

    def _split_of(self, file: str) -> str:
        """The split that the name of an image's tar, or of its folder, says."""
        words = re.split("[^a-z]+", self.members[file].archive.lower())
        return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "")


def read_member(folder: str, file: str, member: Member) -> bytes:
    """The bytes of the image `file` in an archive of a folder or of an address. Raises as `read_file` does."""
    if member.size or member.archive.lower().endswith(TARS):
        return read_file(folder, member.archive, member.offset, member.size)
    path = f"{folder}/{member.archive}"
    if is_address(folder):
        raise DataError(f"{path}: its images are no plain bytes; copy the file to a folder, and name that instead")
    return bytes(_hdf5(path)[file.removeprefix(f"{member.archive}/").removesuffix(".jpg")][()])


def _described(ending: str, content: bytes) -> dict[str, str]:
    """The fields of one member, as text. Raises ValueError."""
    text = content.decode()
    if ending != "json":
        return {ending: text.strip()}
    raw = json.loads(text)
    if not isinstance(raw, dict):
        raise ValueError("a .json member is no object")
    cells = {name: _cell(value) for name, value in raw.items()}
    "".join(chain(*cells.items())).encode()  # JSON can hold half a character, which is no text
    return cells


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


@functools.lru_cache(maxsize=4)  # opening takes longer than reading an image
def _hdf5(path: str) -> Any:
    """An HDF5 file, opened."""
    try:
        import h5py
    except ImportError:
        raise UsageError(f"{path}: reading HDF5 needs h5py; install it with: pip install 'dermscale[hdf5]'") from None
    try:
        return h5py.File(path)
    except OSError as error:
        raise DataError(f"{path}: is no HDF5 file ({error}); get it again") from None
