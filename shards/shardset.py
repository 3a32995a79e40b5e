"""Open a shard set, select samples from it, and read a sample's bytes by its number."""

import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from shards.common.errors import DataError, UsageError
from shards.format import INDEX, INDEX_TYPES, MANIFEST, SPLITS, Manifest
from shards.subsets import nested_subset
from shards.tar import index_of

if TYPE_CHECKING:
    import pyarrow as pa

_NUMERIC = tuple(name for name, kind in INDEX_TYPES.items() if kind != "string")


@dataclass(frozen=True)
class Selection:
    """Some samples of a shard set: `samples` are row numbers of the index, (N,) int64, ascending.

    `split`, `fraction` and `subset_seed` say how they were selected; run records keep them.
    """

    data: "ShardSet"
    samples: np.ndarray
    split: str
    fraction: float = 1.0
    subset_seed: int = 0

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64 classes."""
        return self.data.column("label")[self.samples].astype(np.int64)

    @cached_property
    def image_ids(self) -> np.ndarray:
        """(N,) names, as objects."""
        return self.data.column("image_id")[self.samples]

    @cached_property
    def lesion_ids(self) -> np.ndarray:
        """(N,) lesion names, as objects; an image without a lesion gets its own, named after the image."""
        return self.data.lesion_names[self.samples]


class ShardSet:
    """A packed data set, opened for reading. Safe to share between threads; a context manager.

    The tars are mapped into memory. Opening reads only the index, and a sample is a view of the page cache.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the set in folder `path` and check its index against the manifest.

        Raises DataError if there is no set, or if it is damaged, of another version, or lacks a file.
        """
        import pyarrow.parquet as pq

        self.path = Path(path)
        if not self.path.is_dir():
            raise DataError(
                f"{self.path}: no such folder; pack a shard set with `python -m preprocess.shard --out {self.path}`"
            )
        self.manifest = Manifest.from_file(self.path / MANIFEST)
        index = self.path / INDEX
        if not index.is_file():
            raise DataError(f"{index}: missing; the shard set is damaged, pack it again")
        if hashlib.sha256(index.read_bytes()).hexdigest() != self.manifest.index_sha256:
            raise DataError(
                f"{index}: is not the index that the manifest names; the shard set is damaged, pack it again"
            )
        self.table: pa.Table = pq.read_table(index)
        self._columns: dict[str, np.ndarray] = {}
        self._maps: dict[int, memoryview] = {}
        self._check_files()

    def _check_files(self) -> None:
        """Check that every shard exists and has its size."""
        for info in self.manifest.shards:
            file = self.path / info.file
            if not file.is_file():
                raise DataError(f"{file}: missing; the shard set is damaged, pack it again")
            if file.stat().st_size != info.bytes:
                raise DataError(
                    f"{file}: {file.stat().st_size} bytes, and the manifest says {info.bytes}; "
                    "the shard set is damaged, pack it again"
                )

    def __len__(self) -> int:
        """Number of samples in all splits."""
        return self.table.num_rows

    def __enter__(self) -> "ShardSet":
        """Enter the context."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the set."""
        self.close()

    def close(self) -> None:
        """Drop the mapped files. Views that were returned before stay valid."""
        self._maps.clear()

    def column(self, name: str) -> np.ndarray:
        """One column of the index, (samples,): its own numeric type, or objects for text. Read-only."""
        if name not in self._columns:
            self._columns[name] = self.table[name].to_numpy() if name in _NUMERIC else _objects(self.table, name)
            self._columns[name].setflags(write=False)
        return self._columns[name]

    @cached_property
    def lesion_names(self) -> np.ndarray:
        """(samples,) lesion of each image, as objects; `image:<image_id>` if the source names none."""
        lesions, images = self.column("lesion_id"), self.column("image_id")
        return np.array([f"image:{i}" if le is None else le for le, i in zip(lesions, images, strict=True)], object)

    def select(self, split: str = "train", fraction: float = 1.0, subset_seed: int = 0) -> Selection:
        """The samples of a split, or a nested, lesion-whole fraction of the training split (`shards/subsets.py`).

        Raises UsageError for an unknown or empty split, a fraction outside (0, 1], or a fraction of val or test.
        """
        if split not in SPLITS:
            raise UsageError(f"split '{split}' is unknown: use one of {', '.join(SPLITS)}")
        if not 0.0 < fraction <= 1.0:
            raise UsageError(f"fraction {fraction} is outside (0, 1]")
        if fraction < 1.0 and split != "train":
            raise UsageError(f"fraction {fraction} of split '{split}': only the training split has fractions")
        samples = np.flatnonzero(self.column("split") == split)
        if not len(samples):
            raise UsageError(f"{self.path}: split '{split}' is empty; pack with another --split")
        if fraction < 1.0:
            labels, lesions = self.column("label")[samples], self.lesion_names[samples]
            samples = samples[nested_subset(labels, lesions.tolist(), fraction, subset_seed)]
        return Selection(self, samples.astype(np.int64), split, fraction, subset_seed)

    def shard(self, number: int) -> memoryview:
        """The bytes of one tar, mapped and not read. Raises DataError if the file cannot be mapped."""
        view = self._maps.get(number)
        if view is None:
            file = self.path / self.manifest.shards[number].file
            try:
                with file.open("rb") as handle:
                    view = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
            except (OSError, ValueError) as error:
                raise DataError(f"{file}: cannot be read ({error}); pack the set again") from None
            view = self._maps.setdefault(number, view)  # if two threads map it at once, both use the first mapping
        return view

    def read(self, sample: int) -> memoryview:
        """The payload of a sample, checked against its XXH3 and not copied. Raises DataError naming the sample."""
        offset, length = int(self.column("offset")[sample]), int(self.column("length")[sample])
        payload = self.shard(int(self.column("shard")[sample]))[offset : offset + length]
        if xxhash.xxh3_64_intdigest(payload) != int(self.column("xxh3")[sample]):
            raise self.damaged(sample)
        return payload

    def damaged(self, sample: int, why: str = "its checksum differs") -> DataError:
        """The error that names a sample whose bytes are not the packed ones, or do not match the index."""
        file = self.path / self.manifest.shards[int(self.column("shard")[sample])].file
        return DataError(
            f"{self.column('image_id')[sample]}: damaged in {file} at byte {self.column('offset')[sample]} "
            f"({why}); pack the set again"
        )

    def pixels(self, sample: int) -> np.ndarray:
        """The whole packed image, (H, W, 3) uint8 RGB: decoded, or a read-only view of a raw one."""
        from shards.decode import decode_whole

        height, width = int(self.column("height")[sample]), int(self.column("width")[sample])
        return decode_whole(self.read(sample), str(self.column("encoding")[sample]), height, width)

    def verify(self) -> Iterator[tuple[str, list[str]]]:
        """Read every byte, shard by shard: yields (file name, what is wrong with it or with its samples).

        The index was checked against the manifest when the set was opened. If a tar is whole, its .idx is compared
        with the index of its members.
        """
        shards = self.column("shard")
        for number, info in enumerate(self.manifest.shards):
            wrong = []
            tar = self.path / info.file
            with tar.open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == info.sha256
            if not whole:
                wrong.append("its SHA-256 is not the manifest's")
            for sample in np.flatnonzero(shards == number).tolist():
                try:
                    self.read(sample)
                except DataError as error:
                    wrong.append(str(error))
            idx = tar.with_suffix(".idx")
            if not idx.is_file():
                wrong.append(f"{idx.name} is missing")
            elif whole and idx.read_bytes() != index_of(tar):
                wrong.append(f"{idx.name} is damaged: it is not the index of this tar")
            yield info.file, wrong


def _objects(table: "pa.Table", name: str) -> np.ndarray:
    """A text column as an object array, None where null."""
    return np.array(table[name].to_pylist(), dtype=object)
