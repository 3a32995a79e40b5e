"""Writes a shard set: deterministic USTAR tars, their DALI index files, index.parquet, and the manifest last.

Everything is written into a folder beside the final one (`.NAME.partial`), flushed to the disk, and swapped into place
in one rename, so a crash at any moment leaves either the old set or the new one, whole.
"""

import ctypes
import errno
import fcntl
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from shards.durable import sync_folder, write_durably
from shards.errors import DataError, UsageError
from shards.format import (
    CLASSES,
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    EncodeSpec,
    Manifest,
    ShardInfo,
)
from shards.index_file import IndexFile
from shards.tar import BLOCK, Shard

_SUFFIX = {"jpg": "jpg", "raw": "npy"}


@dataclass(frozen=True, slots=True)
class PackedSample:
    """One encoded image with its metadata, ready to be written.

    payload: a JPEG file, or a `.npy` file of (height, width, 3) uint8 RGB. metadata: the index's columns from
    `image_id` to `dataset`, `label` left out (it follows from `dx`).
    """

    payload: bytes
    encoding: str
    height: int
    width: int
    split: str
    metadata: dict[str, Any]


def _swap_into_place(new: Path, final: Path) -> None:
    """Make `new` the folder `final`; an older `final` goes away only after that. Atomic where renameat2 is had."""
    if not final.exists():
        new.rename(final)
        sync_folder(final.parent)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    exchanged = False
    if hasattr(libc, "renameat2"):
        at_fdcwd, rename_exchange = -100, 2
        code = libc.renameat2(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(final), rename_exchange)
        exchanged = code == 0
        if not exchanged and ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(final))
    if exchanged:
        old = new
    else:  # a file system without the exchange: two renames; the old set stays whole beside it in between
        old = final.with_name(f".{final.name}.old")
        final.rename(old)
        new.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old)


class ShardSetWriter:
    """Writes samples, in the order they come, to a new shard set. A context manager; without `finish` nothing stays.

    Samples of one split must come together: every shard holds one split only, so that a plain tar reader can train on
    the training shards alone.
    """

    def __init__(self, out: Path, encode: EncodeSpec, shard_bytes: int, overwrite: bool = False) -> None:
        """Open `out` for writing.

        Raises UsageError when `shard_bytes` is under 1 MiB, DataError when `out` already holds something and
        `overwrite` is False, or when `out` is a folder that is no shard set, or when another packing to it is running.
        """
        if shard_bytes < 1 << 20:
            raise UsageError(f"shard size {shard_bytes} bytes is under 1 MiB")
        self.out, self.encode, self.shard_bytes = out, encode, shard_bytes
        self._partial = out.with_name(f".{out.name}.partial")
        self._shard: Shard | None = None
        self._infos: list[ShardInfo] = []
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flush: Future[None] | None = None
        self._seen: set[str] = set()
        self._counts: dict[str, dict[str, int]] = {}
        refuse_occupied(out, overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        self._lock = out.with_name(f".{out.name}.lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._lock.fileno()).st_ino != Path(self._lock.name).stat().st_ino:
                raise BlockingIOError  # the other process removed this file after it was opened here
        except (BlockingIOError, FileNotFoundError):
            self._lock.close()
            raise DataError(
                f"{out}: another process is packing to this folder; wait for it or choose another"
            ) from None
        if self._partial.exists():  # left by a packing that was killed
            shutil.rmtree(self._partial)
        self._partial.mkdir()
        self._index = IndexFile(self._partial / INDEX)

    def __enter__(self) -> "ShardSetWriter":
        """Enter the context."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Remove whatever was not finished."""
        for close in (self._index.close, *([self._shard.close] if self._shard else [])):
            with suppress(OSError):  # unfinished files are unwanted, and on a full disk closing one fails again
                close()
        self._flusher.shutdown()
        if self._partial.exists():
            shutil.rmtree(self._partial)
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()

    def attach(self, name: str, content: bytes) -> None:
        """Put one more file into the folder, beside the shards; it is no part of the format."""
        write_durably(self._partial / name, content)

    def add(self, sample: PackedSample) -> None:
        """Append one sample. Raises DataError for an image_id that is unusable or already there."""
        image_id = sample.metadata["image_id"]
        check_image_id(image_id)
        if image_id in self._seen:
            raise DataError(f"{image_id}: stands twice in the source; every image_id must be unique")
        self._seen.add(image_id)
        label = CLASSES.index(sample.metadata["dx"])
        record = {**sample.metadata, "label": label, "split": sample.split}
        members = [
            (_SUFFIX[sample.encoding], sample.payload),
            ("cls", str(label).encode()),
            ("json", json.dumps(record, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()),
        ]
        shard = self._shard_for(sample.split, sum(len(content) + 2 * BLOCK for _, content in members))
        offset = shard.add(image_id, members)
        record |= {
            "shard": shard.number,
            "offset": offset,
            "length": len(sample.payload),
            "encoding": sample.encoding,
            "height": sample.height,
            "width": sample.width,
            "xxh3": xxhash.xxh3_64_intdigest(sample.payload),
        }
        self._index.add(record)
        self._counts[sample.split][sample.metadata["dx"]] += 1

    def _shard_for(self, split: str, size: int) -> Shard:
        """The shard that the next sample of `split` goes to: the open one, unless it is full or of another split."""
        shard = self._shard
        if shard is not None and shard.split == split and shard.position + size + 2 * BLOCK <= self.shard_bytes:
            return shard
        if shard is None or shard.split != split:
            if split in self._counts:
                raise ValueError(f"samples of split '{split}' must come together")
            self._counts[split] = dict.fromkeys(CLASSES, 0)
        if shard is not None:
            self._end(shard)
        self._shard = Shard(self._partial, len(self._infos), split)
        return self._shard

    def _end(self, shard: Shard) -> None:
        """End a shard and let a thread flush it, so that packing goes on meanwhile; one at a time."""
        if self._flush is not None:
            self._flush.result()
        self._infos.append(shard.end())
        self._shard = None
        self._flush = self._flusher.submit(shard.flush)

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
    ) -> Manifest:
        """Close the last shard, write the index and the manifest, and swap the folder into place."""
        if self._shard is None:
            raise DataError("no image was packed: the source is empty, or every image was left out")
        self._end(self._shard)
        index_sha256 = self._index.finish()
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            classes=CLASSES,
            encode=self.encode,
            split=split,
            mean=mean,
            std=std,
            counts=self._counts,
            source=source,
            citation=citation,
            licence=licence,
            versions=versions,
            shards=tuple(self._infos),
            index_sha256=index_sha256,
        )
        if self._flush is not None:
            self._flush.result()
        write_durably(self._partial / MANIFEST, manifest.to_json().encode())
        _swap_into_place(self._partial, self.out)
        return manifest


def refuse_inside_file(out: Path) -> None:
    """Raise DataError where one of the folders that `out` shall lie in is a file."""
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir():
        raise DataError(f"{out}: cannot be made, because {above} is a file; choose another folder")


def refuse_occupied(out: Path, overwrite: bool) -> None:
    """Raise DataError where `out` cannot become a shard set: a file, a foreign folder, or a set and no `overwrite`."""
    refuse_inside_file(out)
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: is a file; choose a folder")
    if not any(out.iterdir()):
        return
    if not (out / MANIFEST).exists():
        raise DataError(f"{out}: holds other files and no shard set; choose an empty or a new folder")
    if not overwrite:
        raise DataError(f"{out}: already holds a shard set; add --overwrite to replace it, or choose another folder")


def check_image_id(image_id: str) -> None:
    """Raise DataError for an image_id that a tar member or a webdataset key cannot be."""
    if not image_id or not image_id.isascii() or not image_id.isprintable() or set(image_id) & set("./\\ "):
        raise DataError(
            f"image_id '{image_id}': must be printable ASCII without '.', '/', '\\' or spaces "
            "(webdataset cuts keys at the first dot, tar at the slash)"
        )
    if len(image_id) > 90:
        raise DataError(f"image_id '{image_id[:20]}…': {len(image_id)} characters, and a tar member's name holds 90")
