"""Writes a shard set: deterministic USTAR tars, their DALI index files, index.parquet, and the manifest last.

Everything is written to a folder next to the final one (`.NAME.partial`), flushed to the disk, and renamed into place.
A crash at any moment leaves the old set or the new one, whole, or an old set that the next packing puts back
(`place.py`). A set in a store is written to such a folder in the user's cache: a shard is sent when it is flushed, and
removed here.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import xxhash

from shards.common import kept
from shards.common.errors import DataError, UsageError
from shards.common.files import write_durably
from shards.format import (
    FORMAT_VERSION,
    HAM10000,
    INDEX,
    MANIFEST,
    Classes,
    EncodeSpec,
    Manifest,
    ShardInfo,
    index_schema,
)
from shards.place import beside, locked, real_place, refuse_occupied, replace
from shards.store import Upload, folder_of, is_address
from shards.tar import BLOCK, Shard, index_name

if TYPE_CHECKING:
    import pyarrow as pa

_GROUP_ROWS = 16_384
"""Rows per Parquet row group: all of HAM10000 is one."""
_SUFFIX = {"jpg": "jpg", "raw": "npy"}


@dataclass(frozen=True, slots=True)
class PackedSample:
    """One encoded image with its metadata, ready to be written.

    payload: a JPEG file, or a `.npy` file of (height, width, 3) uint8 RGB; or a Payload that the writer's `shard`
    takes. metadata: the index's columns from `image_id` to `dataset`, `label` left out (it follows from `dx`; None in
    a set without labels), and those of the source. `group` is `lesion_id` if it is left out.
    """

    payload: "bytes | Payload"
    encoding: str
    height: int
    width: int
    split: str
    metadata: dict[str, Any]


class Payload(Protocol):
    """A payload that is somewhere else: its length and its XXH3."""

    xxh3: int

    def __len__(self) -> int: ...


class OpenShard(Protocol):
    """A shard being written, as `tar.Shard` is one."""

    number: int
    split: str
    position: int

    def add(self, image_id: str, members: list[tuple[str, Any]]) -> int:
        """Append one sample; returns the offset of its first member's content in the tar."""
        ...

    def complete(self) -> ShardInfo:
        """Finish its files, in a thread of the writer's."""
        ...

    def close(self) -> None:
        """Close the files of a shard that stays incomplete."""
        ...


class IndexFile:
    """A new index.parquet; `add` each row, then `finish`. Rows go to the file in groups: memory holds one group."""

    def __init__(self, path: Path, classes: Classes, source: "pa.Schema | None" = None) -> None:
        import pyarrow.parquet as pq

        self.path, self._schema = path, index_schema(classes, source)
        self._file = path.open("wb")  # Python's own file: a full disk is then an OSError that commands explain
        self._writer: Any = pq.ParquetWriter(self._file, self._schema, compression="zstd", write_statistics=False)
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._waiting = 0

    def add(self, row: dict[str, Any]) -> None:
        """Append one row: a value for each column of the index."""
        for name, column in self._columns.items():
            column.append(row[name])
        self._waiting += 1
        if self._waiting == _GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.table(self._columns, schema=self._schema))
        self._columns = {name: [] for name in self._schema.names}
        self._waiting = 0

    def finish(self) -> str:
        """Write the remaining rows and the footer, flush to the disk; returns the file's SHA-256."""
        if self._waiting:
            self._write_group()
        self._writer.close()
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def close(self) -> None:
        """Close the file; without `finish` the index is incomplete."""
        try:
            self._writer.close()
        finally:
            self._file.close()


class ShardSetWriter:
    """Writes samples, in the given order, to a new shard set. A context manager; without `finish` nothing is left.

    Samples of one split must come together: every shard holds only one split, so that any tar reader can train on the
    training shards alone.
    """

    def __init__(
        self,
        out: str | Path,
        encode: EncodeSpec,
        shard_bytes: int,
        overwrite: bool = False,
        classes: Classes = HAM10000,
        columns: "pa.Schema | None" = None,
        shard: Callable[[Path, int, str], OpenShard] = Shard,
        at_once: int = 1,
        unique: bool = False,
    ) -> None:
        """Open `out` for writing, a folder or an address in a store. classes: every sample's `dx` is one of them.

        columns: further columns of the index, which every sample's metadata has. shard: opens a shard in a folder, with
        its number and its split. at_once: shards that may be completed at the same time. unique: the caller has seen
        that no image_id comes twice; it is not looked at here again.

        Raises UsageError if `shard_bytes` is under 1 MiB. Raises DataError if `out` holds a shard set and `overwrite`
        is False, if it holds anything else or cannot be renamed, and if another process is writing to it.
        """
        if shard_bytes < 1 << 20:
            raise UsageError(f"shard size {shard_bytes} bytes is under 1 MiB")
        self.out, self.encode, self.shard_bytes, self.classes = out, encode, shard_bytes, classes
        self._label = {name: label for label, name in enumerate(classes.names)}
        self._overwrite = overwrite
        self._open, self._at_once = shard, at_once
        self._shard: OpenShard | None = None
        self._flusher = ThreadPoolExecutor(at_once, thread_name_prefix="flush")
        self._complete: list[Future[ShardInfo]] = []
        self._seen: set[str] | None = None if unique else set()
        self._counts: dict[str, dict[str, int]] = {}
        self._attached: dict[str, str] = {}
        self._upload = Upload(out, overwrite) if is_address(out) else None
        if self._upload is None:
            refuse_occupied(folder_of(out), overwrite)
            self._final = real_place(folder_of(out))
        else:
            self._final = kept.home() / "packing" / xxhash.xxh3_64_hexdigest(self._upload.store.address.encode())
        self._partial = beside(self._final, "partial")
        self._lock = ExitStack()
        self._lock.enter_context(locked(self._final, out))
        try:
            refuse_occupied(self._final, overwrite)  # a recovered set counts too
            if self._partial.exists():  # left by a killed packing
                shutil.rmtree(self._partial)
            self._partial.mkdir()
            self._index = IndexFile(self._partial / INDEX, classes, columns)
        except BaseException:
            self._lock.close()
            raise

    @property
    def folder(self) -> Path:
        """Where the set is written until it is whole."""
        return self._partial

    def __enter__(self) -> "ShardSetWriter":
        """Enter the context."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove everything unfinished."""
        for close in (self._index.close, *([self._shard.close] if self._shard else [])):
            with suppress(OSError):  # unfinished files are unwanted, and on a full disk closing one fails again
                close()
        self._flusher.shutdown(cancel_futures=True)
        shutil.rmtree(self._partial, ignore_errors=True)  # the next packing clears what cannot be removed now
        self._lock.close()

    def attach(self, name: str, content: bytes) -> None:
        """Add a file to the folder. Its name must be in FORMAT.md: `--overwrite` refuses a set with another file."""
        write_durably(self._partial / name, content)
        self._attached[name] = hashlib.sha256(content).hexdigest()

    def add(self, sample: PackedSample) -> None:
        """Append one sample. Raises DataError for an image_id that is invalid or already in the set."""
        image_id, payload = sample.metadata["image_id"], sample.payload
        check_image_id(image_id)
        if self._seen is not None:
            if image_id in self._seen:
                raise twice(image_id)
            self._seen.add(image_id)
        dx = sample.metadata["dx"]
        label = self._label[dx] if self.classes else 0
        record = {"group": sample.metadata["lesion_id"], **sample.metadata, "label": label, "split": sample.split}
        unsaid = {"label"} if not self.classes else set()
        unsaid |= {"group"} if record["group"] == record["lesion_id"] else set()
        said = {name: value for name, value in record.items() if name not in unsaid}
        members = [
            (_SUFFIX[sample.encoding], payload),
            *([("cls", str(label).encode())] if self.classes else []),
            ("json", json.dumps(said, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()),
        ]
        shard = self._shard_for(sample.split, sum(len(content) + 2 * BLOCK for _, content in members))
        offset = shard.add(image_id, members)
        record |= {
            "shard": shard.number,
            "offset": offset,
            "length": len(payload),
            "encoding": sample.encoding,
            "height": sample.height,
            "width": sample.width,
            "xxh3": xxhash.xxh3_64_intdigest(payload) if isinstance(payload, bytes) else payload.xxh3,
        }
        self._index.add(record)
        if self.classes:
            self._counts[sample.split][dx] += 1

    def _shard_for(self, split: str, size: int) -> OpenShard:
        """The shard for the next sample of `split`: the open one, unless it is full or of another split."""
        shard = self._shard
        if shard is not None and shard.split == split and shard.position + size + 2 * BLOCK <= self.shard_bytes:
            return shard
        if shard is None or shard.split != split:
            if split in self._counts:
                raise ValueError(f"samples of split '{split}' must come together")
            self._counts[split] = dict.fromkeys(self.classes.names, 0)
        if shard is not None:
            self._end(shard)
        self._shard = self._open(self._partial, len(self._complete), split)
        return self._shard

    def _end(self, shard: OpenShard) -> None:
        """Complete a shard in a thread, so that packing continues meanwhile; wait if there are `at_once` others."""
        if len(self._complete) >= self._at_once:
            self._complete[-self._at_once].result()
        self._shard = None
        self._complete.append(self._flusher.submit(self._completed, shard))

    def _completed(self, shard: OpenShard) -> ShardInfo:
        """Complete a shard; send it to the store, if the set is written there."""
        info = shard.complete()
        if self._upload is not None:
            path = self._partial / info.file
            self._upload.send(info.file, path, info.sha256)
            self._send(index_name(info.file))
            path.unlink()
        return info

    def _send(self, name: str) -> None:
        """Send a small file to the store."""
        assert self._upload is not None
        content = (self._partial / name).read_bytes()
        self._upload.send(name, content, hashlib.sha256(content).hexdigest())

    def finish(
        self,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        split: dict[str, Any],
        source: dict[str, Any],
        citation: str,
        licence: str,
        versions: dict[str, str],
        group: tuple[str, ...] = ("lesion_id",),
    ) -> Manifest:
        """Close the last shard, write the index and the manifest, and move the folder into place.

        group: the columns of the source that `group` was made from; none if each image is a group of its own.
        Raises DataError if nothing was packed, if a value cannot be read back, and if something else was put into the
        final folder meanwhile.
        """
        if self._shard is None:
            raise DataError("no image was packed: the source is empty, or every image was left out")
        self._end(self._shard)
        infos = tuple(future.result() for future in self._complete)
        index_sha256 = self._index.finish()
        text = Manifest(
            format_version=FORMAT_VERSION,
            classes=self.classes,
            encode=self.encode,
            split=split,
            mean=mean,
            std=std,
            counts=self._counts,
            source=source,
            citation=citation,
            licence=licence,
            versions=versions,
            shards=infos,
            index_sha256=index_sha256,
            group=group,
            attached=self._attached,
        ).to_json()
        try:
            manifest = Manifest.from_json(text)
        except ValueError as error:
            raise DataError(f"{self.out}: cannot be packed ({error})") from None
        if self._upload is not None:
            for name in (*self._attached, INDEX):
                self._send(name)
            self._upload.finish(text.encode())
            return manifest
        for left in [path for path in self._partial.iterdir() if path.is_dir()]:  # of a task that was killed
            shutil.rmtree(left)
        write_durably(self._partial / MANIFEST, text.encode())
        refuse_occupied(self._final, self._overwrite)  # the folder may have been filled meanwhile
        replace(self._final, self._partial)
        return manifest


def twice(image_id: str) -> DataError:
    """The error for an image_id that comes a second time."""
    return DataError(f"{image_id}: is twice in the source; every image_id must be unique")


def check_image_id(image_id: str) -> None:
    """Raise DataError for an image_id that is not a valid name of a tar member or webdataset key."""
    if not image_id or not image_id.isascii() or not image_id.isprintable() or set(image_id) & set("./\\ "):
        raise DataError(
            f"image_id '{image_id}': must be printable ASCII without '.', '/', '\\' or spaces "
            "(webdataset cuts keys at the first dot, tar at the slash)"
        )
    if len(image_id) > 90:
        raise DataError(f"image_id '{image_id[:20]}…': {len(image_id)} characters, and a tar member's name holds 90")
