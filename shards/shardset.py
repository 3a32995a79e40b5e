"""Open a shard set, select samples from it, and read a sample's bytes by its number."""

import errno
import hashlib
import mmap
import tarfile
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np

from shards.common.cli import typed
from shards.common.errors import DataError, DermscaleError, UsageError, one_line
from shards.format import (
    AGAIN,
    CARDS,
    ENCODINGS,
    INDEX,
    MANIFEST,
    MOST_PIXELS,
    QUARANTINE,
    SPLITS,
    Manifest,
    ShardInfo,
    index_schema,
)
from shards.kernels.workers import LOADED, LOST, LOST_BYTES, check, rows_of
from shards.store import CachedSet, Silent, Wanted, complete, folder_of, is_address
from shards.subsets import nested_subset
from shards.tar import index_name, index_of
from shards.where import mask

if TYPE_CHECKING:
    import pyarrow as pa

_FETCHES = 4
"""Shards that are fetched from a store at the same time."""
_MOST_ATTACHED_BYTES = 1 << 30


@dataclass(frozen=True)
class Selection:
    """Some samples of a shard set: `samples` are row numbers of the index, (N,) int64, ascending.

    `split`, `fraction`, `subset_seed` and `where` say how they were selected; run records keep them.
    """

    data: "ShardSet"
    samples: np.ndarray
    split: str
    fraction: float = 1.0
    subset_seed: int = 0
    where: str | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64 classes."""
        return self.data.column("label")[self.samples].astype(np.int64)

    def weights(self, column: str) -> np.ndarray:
        """(N,) float64: how often each sample is to come, from a column of numbers. Raises UsageError for any other."""
        import pyarrow as pa

        table, where = self.data.table, f"sampler weighted:{column}"
        numbers = [one.name for one in table.schema if pa.types.is_integer(one.type) or pa.types.is_floating(one.type)]
        if column not in numbers:
            raise UsageError(f"{where}: the set has no such column of numbers (it has {', '.join(numbers)})")
        found = table[column].cast(pa.float64()).take(pa.array(self.samples)).to_numpy()
        if not (np.isfinite(found) & (found >= 0)).all() or not found.any():
            raise UsageError(f"{where}: each image needs a weight of 0 or more, and one of them more than 0")
        return found

    @cached_property
    def image_ids(self) -> np.ndarray:
        """(N,) names, as objects."""
        return self.data.column("image_id")[self.samples]

    @cached_property
    def lesion_ids(self) -> np.ndarray:
        """(N,) groups, as objects: what no split divides; an image without one gets its own, named after the image."""
        return self.data.lesion_names[self.samples]


class Holder(Protocol):
    """Who keeps shards of a set mapped."""

    def release(self, number: int) -> None:
        """Unmap a shard, unless it is in use."""
        ...


class ShardSet:
    """A packed data set, opened for reading. Safe to share between threads; a context manager.

    The tars are mapped into memory. Opening reads only the index, and a sample is a view of the page cache. Of a set in
    a store, a tar is fetched into a cache when it is first needed (`shards/store.py`).

    address: where the set is, as others can open it. path: the folder of its files; of a set in a store, that in the
    cache.
    """

    def __init__(self, path: str | Path, *, cache: str | Path | None = None, cache_gb: float | None = None) -> None:
        """Open the set in a folder or at an address such as `s3://bucket/set`, and check its index.

        cache, cache_gb: of a set in a store, the folder that keeps its files, and the most that it holds; default, the
        environment variables DERMSCALE_CACHE and DERMSCALE_CACHE_GB, or else 100 GB in the user's cache folder. Raises
        DataError if there is no set, or if it is damaged, of another version, or lacks a file.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._cached = CachedSet(path, cache, cache_gb) if is_address(path) else None
        self._opened_with = {"cache": cache and str(cache), "cache_gb": cache_gb}
        if self._cached is not None:
            self.address, self.path = self._cached.store.address, self._cached.folder
            self.manifest = Manifest.from_bytes(self._cached.manifest, f"{self.address}/{MANIFEST}")
            with self._cached.opened(Wanted(INDEX, self.manifest.index_sha256)) as file:
                content = file.read()
        else:
            self.path = folder_of(path).absolute()
            self.address = str(self.path)
            if not self.path.is_dir():
                raise DataError(
                    f"{self.path}: no such folder; pack a shard set with `{typed('preprocess.shard')} "
                    f"--out {self.path}`"
                )
            self.manifest = Manifest.from_file(self.path / MANIFEST)
            content = _content_of(self.path / INDEX)
        index = self.path / INDEX
        if hashlib.sha256(content).hexdigest() != self.manifest.index_sha256:
            raise DataError(f"{index}: is not the index that the manifest names; {AGAIN}")
        try:
            # Arrow takes no path that is not UTF-8. Its threads must end before the process: it would abort.
            self.table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
            self.table.validate(full=True)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{index}: damaged ({one_line(error, 160)}); {AGAIN}") from None
        if "group" not in self.table.column_names and "lesion_id" in self.table.column_names:  # version 1
            self.table = self.table.append_column("group", self.table["lesion_id"])
        self._columns: dict[str, np.ndarray] = {}
        self._maps: dict[int, memoryview] = {}
        self._wanted: set[int] = set()
        self._kept: set[int] = set()
        self._passing = 0
        self._holders: list[weakref.ref[Holder]] = []
        self._coming: deque[int] = deque()
        self._fetchers: list[threading.Thread] = []
        if self._cached is None:
            self._check_files()
        self._check_rows(index)

    def _check_files(self) -> None:
        """Check that every shard exists and has its size."""
        for info in self.manifest.shards:
            file = self.path / info.file
            if not file.is_file():
                raise DataError(f"{file}: {'is not a file' if file.exists() else 'missing'}; {AGAIN}")
            _check_size(file, file.stat().st_size, info.bytes, AGAIN)

    def _check_rows(self, index: Path) -> None:
        """Check every row of the index, because engines read addresses that follow from it."""
        import pyarrow as pa
        import pyarrow.compute

        pc: Any = pyarrow.compute  # it makes its functions at run time

        def damaged(what: str) -> DataError:
            return DataError(f"{index}: {what}; {AGAIN}")

        names = self.manifest.classes.names
        for field in index_schema(self.manifest.classes):
            if (times := self.table.column_names.count(field.name)) != 1:
                raise damaged(f"has {times or 'no'} column{'s' * (times > 1)} '{field.name}'")
            column = self.table[field.name]
            if column.type != field.type:
                raise damaged(f"its column '{field.name}' is {column.type}, and not {field.type}")
            if not field.nullable and column.null_count:
                raise damaged(f"its column '{field.name}' has {column.null_count} empty cells")
        twice = [name for name in self.table.column_names if self.table.column_names.count(name) > 1]
        if twice:
            raise damaged(f"has {len(twice)} columns '{twice[0]}'")
        for name, known in (("encoding", ENCODINGS), ("split", SPLITS), ("dx", names)):
            found = pc.unique(self.table[name].drop_null()).to_pylist()
            if unknown := sorted(set(found) - set(known)):
                raise damaged(
                    f"its column '{name}' says '{unknown[0]}', which is none of {one_line(', '.join(known), 160)}"
                )
        shard, offset, length, height, width, label = (
            self.column(name).astype(np.int64 if name != "offset" else np.uint64)
            for name in ("shard", "offset", "length", "height", "width", "label")
        )
        raw = pc.equal(self.table["encoding"], "raw").to_numpy()
        sizes = np.array([info.bytes for info in self.manifest.shards], np.uint64)
        classes = pc.index_in(self.table["dx"], pa.array(names or (None,), pa.string())).to_numpy()
        known_shard = shard < len(sizes)
        known_rows = np.where(known_shard, shard, 0)
        room = sizes[known_rows]
        split = pc.index_in(self.table["split"], pa.array(SPLITS)).to_numpy()
        splits = np.array([SPLITS.index(info.split) for info in self.manifest.shards])
        pixels = height * width
        for wrong, what in (
            (~known_shard, f"its shard is none of the {len(sizes)} in the manifest"),
            ((offset > room) | (length > room - np.minimum(offset, room)), "its payload ends behind its shard"),
            (length == 0, "its payload is empty"),
            (pixels == 0, "its height or width is 0"),
            (pixels > MOST_PIXELS, f"its image has more than {MOST_PIXELS // 1_000_000} megapixels"),
            (raw & (3 * pixels > length), "its payload is shorter than its image"),
            (label != classes, "its label is not the place of its dx in the classes"),
            (split != splits[known_rows], "its split is not that of its shard"),
        ):
            if wrong.any():
                raise damaged(f"sample {self.column('image_id')[int(np.argmax(wrong))]}: {what}")
        for info, rows in zip(self.manifest.shards, np.bincount(shard, minlength=len(sizes)), strict=True):
            if rows != info.samples:
                raise damaged(f"has {rows} samples of {info.file}, and the manifest says {info.samples}")
        if not names:
            return
        found = np.bincount(split * len(names) + label, minlength=len(SPLITS) * len(names))
        for (name, dx), rows in zip(product(SPLITS, names), found.tolist(), strict=True):
            if rows != (said := self.manifest.counts.get(name, {}).get(dx, 0)):
                raise damaged(f"has {rows} samples of {dx} in {name}, and the manifest says {said}")

    def __len__(self) -> int:
        """Number of samples in all splits."""
        return self.table.num_rows

    def __enter__(self) -> "ShardSet":
        """Enter the context."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the set."""
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle names the folder and the set. Loading it opens the set again (`_reopened`)."""
        return _reopened, (self.opened_with, self.manifest.identity)

    @property
    def opened_with(self) -> dict[str, Any]:
        """The arguments that open this set again, as JSON can hold them."""
        return {"path": self.address, **self._opened_with}

    def close(self) -> None:
        """Drop the mapped files, and fetch no more of them. Views that were returned before stay valid."""
        self._coming.clear()
        self._maps.clear()

    def column(self, name: str) -> np.ndarray:
        """One column of the index, (samples,): its own numeric type, or objects for text. Read-only.

        Null is None in text and bool, and NaN in numbers, which are float64 then. Raises KeyError for an unknown name.
        """
        if name not in self._columns:
            text = str(self.table.schema.field(name).type) == "string"
            self._columns[name] = _objects(self.table, name) if text else self.table[name].to_numpy()
            self._columns[name].setflags(write=False)
        return self._columns[name]

    @cached_property
    def rows(self) -> np.ndarray:
        """What engines read of the index, (samples,) of `shards.kernels.workers.ROW`."""
        return rows_of(self)

    @cached_property
    def lesion_names(self) -> np.ndarray:
        """(samples,) group of each image, as objects: what no split divides; `image:<image_id>` if it has none."""
        lesions, images = self.column("group"), self.column("image_id")
        return np.array([f"image:{i}" if le is None else le for le, i in zip(lesions, images, strict=True)], object)

    def select(
        self, split: str = "train", fraction: float = 1.0, subset_seed: int = 0, where: str | None = None
    ) -> Selection:
        """The samples of a split, or a nested, lesion-whole fraction of the training split (`shards/subsets.py`).

        where: takes only images that meet a condition on the columns of the index, such as `sex == 'female' and
        age >= 60` (`shards/where.py`). A fraction is one of the images that meet it. Raises UsageError for an unknown
        or empty split, a fraction outside (0, 1], a fraction of val or test, or a condition that is wrong or that no
        image meets.
        """
        if split not in SPLITS:
            raise UsageError(f"split '{split}' is unknown: use one of {', '.join(SPLITS)}")
        if not 0.0 < fraction <= 1.0:
            raise UsageError(f"fraction {fraction} is outside (0, 1]")
        if fraction < 1.0 and split != "train":
            raise UsageError(f"fraction {fraction} of split '{split}': only the training split has fractions")
        samples = np.flatnonzero(self.column("split") == split)
        if not len(samples):
            raise UsageError(f"{self.address}: split '{split}' is empty; pack with another --split")
        if where is not None:
            samples = samples[mask(where, self.table)[samples]]
            if not len(samples):
                raise UsageError(
                    f"{self.address}: no image of split '{split}' meets the condition {one_line(where, 160)}"
                )
        if fraction < 1.0:
            labels, lesions = self.column("label")[samples], self.lesion_names[samples]
            samples = samples[nested_subset(labels, lesions.tolist(), fraction, subset_seed)]
        return Selection(self, samples.astype(np.int64), split, fraction, subset_seed, where)

    def require_labels(self) -> None:
        """Raise UsageError if the set has no labels."""
        if not self.manifest.classes:
            raise UsageError(f"{self.address}: has no labels to train or test on; name another --data")

    def shard(self, number: int) -> memoryview:
        """The bytes of one tar, mapped and not read. Raises DataError if the file cannot be mapped."""
        view = self._maps.get(number)
        if view is None:
            info = self.manifest.shards[number]
            file = self.path / info.file
            try:
                with self._opened(info) as handle:
                    view = _mapped(handle)
            except FileNotFoundError:
                raise DataError(f"{file}: is gone since the set was opened; open the set where it is now") from None
            except OSError as error:
                raise DataError(f"{file}: cannot be read ({error.strerror}); {_hint(error)}") from None
            _check_size(file, len(view), info.bytes, self._again)
            view = self._maps.setdefault(number, view)  # if two threads map it at once, both use the first mapping
        return view

    def _opened(self, info: ShardInfo) -> IO[bytes]:
        """The file of a tar. From a store, its lock in the cache lasts as long as its mapping, which has the file too.

        Raises DataError if it cannot be fetched, and OSError if it cannot be opened.
        """
        if self._cached is None:
            return (self.path / info.file).open("rb")
        return self._cached.opened(Wanted(info.file, info.sha256, info.bytes))

    # ------------------------------------------------------------------ a set in a store

    @property
    def _again(self) -> str:
        """What to do about a damaged file of the set."""
        return AGAIN if self._cached is None else f"remove {self.path} and start again: it is fetched again then"

    @property
    def stored(self) -> bool:
        """Whether the set is in a store, so that its shards are fetched when they are needed."""
        return self._cached is not None

    def refuse_larger(self, samples: np.ndarray, at_once: int | None = None) -> None:
        """Raise UsageError if the cache cannot hold the shards of these samples and of those of earlier calls.

        at_once: so many of the shards are needed at the same time; None: all, because an order that draws from all of
        them would fetch them again and again.
        """
        if self._cached is None:
            return
        numbers = np.unique(self.column("shard")[samples]).tolist()
        sizes = sorted((self.manifest.shards[number].bytes for number in numbers), reverse=True)
        kept = self._kept if at_once is not None else self._kept | {*numbers}
        passing = self._passing if at_once is None else max(self._passing, sum(sizes[:at_once]))
        self._cached.refuse_larger(sum(self.manifest.shards[number].bytes for number in kept) + passing)
        self._wanted, self._kept, self._passing = self._wanted | {*numbers}, kept, passing

    def to_fetch(self) -> int:
        """Bytes of the shards that loaders need, and that are in a store and not yet in the cache."""
        wanted = (self.manifest.shards[number] for number in self._wanted)
        return sum(info.bytes for info in wanted if not (self.path / info.file).exists())

    def fetch_ahead(self, samples: np.ndarray) -> None:
        """Fetch the shards of these samples on threads, in the order in which they come, if they are in a store."""
        if self._cached is None:
            return
        shards, first = np.unique(self.column("shard")[samples], return_index=True)
        coming = [number for number in shards[np.argsort(first)].tolist() if number not in self._maps]
        coming += [number for number in list(self._coming) if number not in coming]  # of a pass beside this one
        self._coming.clear()
        self._coming.extend(coming)
        self._fetchers = [thread for thread in self._fetchers if thread.is_alive()]
        for _ in range(min(len(coming), _FETCHES - len(self._fetchers))):
            # A process does not wait for these threads: what has arrived is kept, and the next one goes on with it.
            thread = threading.Thread(target=self._fetch_coming, name="shards-fetch", daemon=True)
            self._fetchers.append(thread)
            thread.start()

    def _fetch_coming(self) -> None:
        """Map one shard after the other. An error ends that: who needs the shard meets it too."""
        while True:
            try:
                self.shard(self._coming.popleft())
            except IndexError:
                return
            except DermscaleError:
                self._coming.clear()
                return

    def hold(self, holder: "Holder") -> None:
        """Tell `holder`, which keeps shards mapped, of those that are released."""
        self._holders = [*(known for known in self._holders if known() is not None), weakref.ref(holder)]

    def release(self, numbers: list[int]) -> None:
        """Unmap shards that are not needed for now, so that they may leave the cache."""
        for number in numbers:
            self._maps.pop(number, None)
            for known in self._holders:
                if (holder := known()) is not None:
                    holder.release(number)

    def read(self, sample: int) -> memoryview:
        """The payload of a sample, checked against its XXH3 and not copied. Raises DataError naming the sample."""
        offset, length = int(self.column("offset")[sample]), int(self.column("length")[sample])
        payload = self.shard(int(self.column("shard")[sample]))[offset : offset + length]
        status = check(payload, int(self.column("xxh3")[sample]))
        if status != LOADED:
            raise self.damaged(sample, *([LOST_BYTES] if status == LOST else []))
        return payload

    def damaged(self, sample: int, why: str = "its checksum differs") -> DataError:
        """The error that names a sample whose bytes are not the packed ones, or do not match the index."""
        file = self.path / self.manifest.shards[int(self.column("shard")[sample])].file
        return DataError(
            f"{self.column('image_id')[sample]}: damaged in {file} at byte {self.column('offset')[sample]} "
            f"({why}); {self._again}"
        )

    def pixels(self, sample: int) -> np.ndarray:
        """The whole packed image, (H, W, 3) uint8 RGB: decoded, or a read-only view of a raw one."""
        from shards.decode import decode_whole

        height, width = int(self.column("height")[sample]), int(self.column("width")[sample])
        return decode_whole(self.read(sample), str(self.column("encoding")[sample]), height, width)

    def verify(self) -> Iterator[tuple[str, list[str]]]:
        """Read every byte, shard by shard: yields (file name, what is wrong with it or with its samples).

        The index was checked against the manifest when the set was opened; that of a store is read again. If a tar is
        whole, its .idx is compared with the index of its members. The other files of the folder come last, each that is
        wrong.
        """
        expected = {MANIFEST, INDEX, *CARDS}
        for number, info in enumerate(self.manifest.shards):
            expected |= {info.file, index_name(info.file)}
            if self._cached is None:
                yield info.file, self._wrong(number, self.path)
                continue
            kept = self._maps.pop(number, None)
            with TemporaryDirectory(prefix="dermscale-") as folder:  # what is in the cache says nothing of the store
                try:
                    self._bring(number, Path(folder))
                    wrong = self._wrong(number, Path(folder))
                except DataError as error:
                    wrong = [str(error)]
            self._maps.pop(number, None)
            if kept is not None:
                self._maps[number] = kept
            yield info.file, wrong
        yield from self._verify_others(expected)

    def _bring(self, number: int, folder: Path) -> None:
        """Fetch a tar and its .idx from the store into a folder, and map the tar. Raises DataError."""
        assert self._cached is not None
        info = self.manifest.shards[number]
        store, tar = self._cached.store, folder / info.file
        complete(store, Wanted(info.file, info.sha256), info.bytes, tar, Silent())
        with tar.open("rb") as file:
            self._maps[number] = _mapped(file)
        idx = index_name(info.file)
        (folder / idx).write_bytes(store.read(idx, info.bytes))

    def _wrong(self, number: int, folder: Path) -> list[str]:
        """What is wrong with a shard in a folder and with its samples."""
        info = self.manifest.shards[number]
        try:
            wrong = wrong_bytes(folder / info.file, info.sha256)
        except OSError as error:
            wrong = [f"cannot be read ({error.strerror}); {_hint(error)}"]
        for sample in np.flatnonzero(self.column("shard") == number).tolist():
            try:
                self.read(sample)
            except DataError as error:
                wrong.append(str(error))
        return wrong

    def _verify_others(self, expected: set[str]) -> Iterator[tuple[str, list[str]]]:
        """Yields as `verify` does. expected: the names of the files that are verified already."""
        hashed, store = self.manifest.attached, self._cached and self._cached.store
        if store is None:
            names = {file.name for file in self.path.iterdir()}
        else:
            hashed = hashed | {INDEX: self.manifest.index_sha256}  # that of the cache was looked at
            names = {*hashed} if store.reads_only else store.names()  # a web server has no list
        for name, sha256 in hashed.items():
            if name not in names:
                yield name, [f"missing; {AGAIN}"]
                continue
            try:
                content = store.read(name, _MOST_ATTACHED_BYTES) if store else (self.path / name).read_bytes()
            except DataError as error:
                yield name, [str(error)]
                continue
            if hashlib.sha256(content).hexdigest() != sha256:
                yield name, [f"its SHA-256 is not the manifest's; {AGAIN}"]
        unhashed = {QUARANTINE} if self.manifest.manifest_sha256 is None else set()
        for name in sorted(names - expected - {*hashed} - unhashed):
            if not name.startswith(".nfs"):  # a removed file that another process has open
                yield name, ["is not part of this set; move it away"]


def _check_size(file: Path, found: int, expected: int, again: str) -> None:
    """Raise DataError if a shard has not the size that the manifest says. again: what to do then."""
    if found != expected:
        raise DataError(f"{file}: {found} bytes, and the manifest says {expected}; {again}")


def wrong_bytes(tar: Path, sha256: str) -> list[str]:
    """What is wrong with a tar and its .idx, which is compared with the members of a whole tar."""
    wrong = []
    with tar.open("rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    if not whole:
        wrong.append(f"its SHA-256 is not the manifest's; {AGAIN}")
    idx = tar.with_suffix(".idx")
    if not idx.is_file():
        wrong.append(f"{idx.name} is missing; {AGAIN}")
    elif whole:
        try:
            if idx.read_bytes() != index_of(tar):
                wrong.append(f"{idx.name} is damaged: it is not the index of this tar; {AGAIN}")
        except (tarfile.TarError, ValueError) as error:
            wrong.append(f"is not a tar ({one_line(error, 160)}); {AGAIN}")
    return wrong


def _hint(error: OSError) -> str:
    """What to do about a file that the system cannot read: packing again helps in no case."""
    return {
        errno.EACCES: "check its permissions",
        errno.EPERM: "check its permissions",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
        errno.ENOMEM: "free some memory",
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space",
    }.get(error.errno or 0, "check its disk or file system")


def _mapped(file: IO[bytes]) -> memoryview:
    """The bytes of a file: mapped, or read if it is empty or its file system cannot map files."""
    try:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError:
        return memoryview(b"")
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.EINVAL):
            raise
        return memoryview(file.read())


def _content_of(index: Path) -> bytes:
    """The bytes of a file of the set. Raises DataError if it is missing."""
    try:
        return index.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{index}: missing; {AGAIN}") from None


def _reopened(opened_with: dict[str, Any], identity: dict[str, str]) -> ShardSet:
    """A set that was pickled, opened again. Raises DataError if the folder holds another set now."""
    data = ShardSet(**opened_with)
    if data.manifest.identity != identity:
        raise DataError(
            f"{data.address}: holds another shard set than it did when this one was sent to another process"
        )
    return data


def _objects(table: "pa.Table", name: str) -> np.ndarray:
    """A text column as an object array, None where null."""
    return np.array(table[name].to_pylist(), dtype=object)
