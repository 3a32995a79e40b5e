"""Copies a shard set from a folder to a store, and back. What has arrived before an interruption is not sent again."""

import hashlib
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from shards.common.errors import DataError
from shards.common.files import full_disk_names, write_durably
from shards.common.progress import Progress
from shards.common.readahead import read_ahead
from shards.format import AGAIN, CARDS, INDEX, MANIFEST, Manifest
from shards.place import beside, locked, real_place, refuse_occupied, replace
from shards.shardset import ShardSet, wrong_bytes
from shards.store import CachedSet, Upload, Wanted
from shards.tar import index_name, index_of

_AT_ONCE = 4
_ANY_SIZE_GB = 1e8


class _Shared:
    """A progress display that several threads advance."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._lock = bar, threading.Lock()

    def advance(self, amount: int) -> None:
        """Count `amount` more."""
        with self._lock:
            self._bar.advance(amount)

    def resize(self, total: int) -> None:
        """Keep the total, which is that of all files."""


def push(folder: Path, address: str, overwrite: bool = False) -> Manifest:
    """Copy the set in `folder` to a store, each file checked before and the manifest last.

    Raises DataError if a file is damaged, and as `Upload` does.
    """
    with ShardSet(folder) as data, ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="push") as pool:
        manifest = data.manifest
        text = (data.path / MANIFEST).read_bytes()
        upload = Upload(address, overwrite, text)
        total = sum(info.bytes for info in manifest.shards)

        def send(name: str) -> None:
            content = (data.path / name).read_bytes()
            sha256 = hashlib.sha256(content).hexdigest()
            if manifest.attached.get(name, sha256) != sha256:
                raise DataError(f"{data.path / name}: its SHA-256 is not the manifest's; {AGAIN}")
            upload.send(name, content, sha256)

        def send_shard(number: int) -> None:
            info = manifest.shards[number]
            if wrong := wrong_bytes(data.path / info.file, info.sha256):
                raise DataError(f"{data.path / info.file}: {wrong[0]}")
            upload.send(info.file, data.path / info.file, info.sha256)
            send(index_name(info.file))

        with (
            Progress("pushing", total, "bytes") as bar,
            closing(
                read_ahead(lambda n: [pool.submit(send_shard, n)], range(len(manifest.shards)), _AT_ONCE)
            ) as shards,
        ):
            for number, _ in shards:
                bar.advance(manifest.shards[number].bytes)
        for name in (*manifest.attached, *(name for name in CARDS if (data.path / name).exists()), INDEX):
            send(name)
        upload.finish(text)
    return manifest


def pull(address: str, out: Path, overwrite: bool = False) -> Manifest:
    """Copy the set at an address to the new folder `out`, which is there when all of it has arrived and was checked.

    Until then it lies in `.NAME.pull` beside it. Raises DataError as `CachedSet.opened`, `refuse_occupied` and `locked`
    do.
    """
    refuse_occupied(out, overwrite)
    place = real_place(out)
    partial = beside(place, "pull")
    with full_disk_names(out), locked(place, out):
        refuse_occupied(out, overwrite)  # a set that `locked` has put back counts too
        cached = CachedSet(address, partial / "files", _ANY_SIZE_GB)
        manifest = Manifest.from_bytes(cached.manifest, f"{address}/{MANIFEST}")
        total = sum(info.bytes for info in manifest.shards)
        wanted = [
            Wanted(INDEX, manifest.index_sha256),
            *(Wanted(info.file, info.sha256, info.bytes) for info in manifest.shards),
            *(Wanted(name, sha256) for name, sha256 in manifest.attached.items()),
        ]

        def fetch(one: Wanted) -> None:
            cached.opened(one, bar).close()
            if one.name.endswith(".tar"):
                write_durably(cached.folder / index_name(one.name), index_of(cached.folder / one.name))

        with (
            Progress("pulling", total, "bytes") as display,
            ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="pull") as pool,
        ):
            bar = _Shared(display)
            with closing(read_ahead(lambda one: [pool.submit(fetch, one)], wanted, _AT_ONCE)) as fetched:
                for _ in fetched:
                    pass
        for left in cached.folder.glob(".*.part"):  # of a file that was written to the store again since a killed pull
            left.unlink()
        names = set() if cached.store.reads_only else cached.store.names()
        for name in names & {*CARDS}:
            write_durably(cached.folder / name, cached.store.read(name, total))
        write_durably(cached.folder / MANIFEST, cached.manifest)
        ShardSet(cached.folder).close()  # whether index and manifest belong together
        refuse_occupied(out, overwrite)  # the folder may have been filled meanwhile
        replace(place, cached.folder)
        shutil.rmtree(partial)
    return manifest
