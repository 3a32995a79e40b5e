"""Packing on a Ray cluster: images are encoded, and shards are written, by tasks on its nodes.

The process that packs keeps what it does on one machine: the order, the checks, the index, the manifest. Payloads never
come to it: they stay in the memory of the nodes, from which the task of a shard takes them. Ray runs the tasks of a
lost node again, and encodes again what was in its memory.
"""

import shutil
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from preprocess.packing import Crew, Job, encode, library_versions, read_ahead_of_use
from preprocess.records import Rejected
from shards.common.cluster import RETRIES, nodes, result
from shards.common.errors import DataError
from shards.common.files import sync_folder
from shards.common.machine import keep_freed_memory, single_threaded_opencv
from shards.encode import TOGETHER, Encoded
from shards.format import EncodeSpec, ShardInfo
from shards.store import is_address
from shards.tar import BLOCK, Shard, member_bytes

_TOGETHER = 16 * TOGETHER
"""Images of one task: enough that handing it over takes little of its time."""


class Stored:
    """A payload in the memory of the cluster: `length` bytes of the object `part`, from `start` on."""

    __slots__ = ("length", "part", "start", "xxh3")

    def __init__(self, part: Any, start: int, length: int, xxh3: int) -> None:
        self.part, self.start, self.length, self.xxh3 = part, start, length, xxh3

    def __len__(self) -> int:
        return self.length


def cores() -> int:
    """The cores of the cluster."""
    return max(1, sum(int(node.get("CPU", 0)) for node in nodes()))


def crew() -> Crew:
    """Tasks of the cluster that this process is connected to, as many as it has cores."""
    tasks = Tasks()
    return Crew(tasks.encode, _TOGETHER, partial(RemoteShard, tasks), max(2, cores() // 4), tasks.cancel)


# ------------------------------------------------------------------ in the process that packs


class Tasks:
    """The tasks of one packing, each waited for by a thread."""

    def __init__(self) -> None:
        import ray

        options: dict[str, Any] = {"num_cpus": 1, "max_retries": RETRIES, "scheduling_strategy": "SPREAD"}
        self._encode: Any = ray.remote(**options, num_returns=2)(_encode_there)
        self._write: Any = ray.remote(**options)(_write_there)
        self._waiting: set[Any] = set()
        self._cancelled = False

    def encode(self, jobs: list[Job], spec: EncodeSpec) -> Sequence[Encoded | Rejected]:
        """`packing.encode` by a task. The payloads of the results are Stored."""
        found, part = self._encode.remote(jobs, spec, library_versions())
        return [
            one if isinstance(one, Rejected) else replace(one, payload=Stored(part, *one.payload))
            for one in self._result(found)
        ]

    def write(self, *arguments: Any) -> ShardInfo:
        """`_write_there` by a task."""
        return self._result(self._write.remote(*arguments))

    def _result(self, task: Any) -> Any:
        self._waiting.add(task)
        if self._cancelled:
            self.cancel()
        try:
            return result(task)
        finally:
            self._waiting.discard(task)

    def cancel(self) -> None:
        """End all tasks, and those that are still started: `result` raises for each."""
        import ray

        self._cancelled = True
        for task in list(self._waiting):
            ray.cancel(task, force=True)


class RemoteShard:
    """A shard whose bytes a task writes when it is complete; until then, a list of its samples."""

    def __init__(self, tasks: Tasks, folder: Path, number: int, split: str) -> None:
        self._tasks, self._folder, self.number, self.split, self.position = tasks, folder, number, split, 0
        self._parts: dict[Any, int] = {}
        self._samples: list[tuple[str, list[tuple[str, Any]]]] = []

    def add(self, image_id: str, members: list[tuple[str, Any]]) -> int:
        """Append one sample; returns the offset of its first member's content in the tar."""
        offset = self.position + BLOCK
        self.position += sum(member_bytes(len(content)) for _, content in members)
        known = [
            (suffix, (self._parts.setdefault(one.part, len(self._parts)), one.start, one.length))
            if isinstance(one, Stored)
            else (suffix, one)
            for suffix, one in members
        ]
        self._samples.append((image_id, known))
        return offset

    def complete(self) -> ShardInfo:
        """Let a task write it, and wait."""
        info = self._tasks.write(self._folder.absolute(), self.number, self.split, self._samples, *self._parts)
        self._samples, self._parts = [], {}  # so the cluster may forget the payloads
        if info.bytes != (planned := self.position + 2 * BLOCK):
            raise DataError(f"{self._folder / info.file}: has {info.bytes} bytes where {planned} were planned")
        return info

    def close(self) -> None:
        """Nothing is open here."""


# ------------------------------------------------------------------ in the tasks


def _encode_there(jobs: list[Job], spec: EncodeSpec, versions: dict[str, str]) -> tuple[list[Any], np.ndarray]:
    """Encode images: the results, with (start, length, XXH3) as payloads; and all payloads, one after the other."""
    _check_node(versions, tuple({job.folder for job in jobs}))
    keep_freed_memory()
    for job in jobs:
        read_ahead_of_use(job.path)
    found, payloads, start = [], [], 0
    with single_threaded_opencv():
        for first in range(0, len(jobs), TOGETHER):
            for one in encode(jobs[first : first + TOGETHER], spec):
                if isinstance(one, Encoded):
                    payloads.append(one.payload)
                    place: Any = (start, len(one.payload), xxhash.xxh3_64_intdigest(one.payload))
                    start, one = start + len(one.payload), replace(one, payload=place)
                found.append(one)
    return found, np.frombuffer(b"".join(payloads), np.uint8)


def _check_node(versions: dict[str, str], folders: tuple[str, ...]) -> None:
    """Raise DataError if this node would make other bytes, or does not see the source."""
    host, own = socket.gethostname(), library_versions()
    for name, wanted in versions.items():
        if own.get(name) != wanted:
            raise DataError(
                f"node {host} has {name} {own.get(name)}, and {wanted} is where the packing was started: bytes could "
                "differ; install the same versions"
            )
    for folder in folders:
        if not is_address(folder) and not Path(folder).is_dir():
            raise DataError(
                f"{folder}: is not there on node {host}; with --runner ray, --source is an address or a full path that "
                "all nodes see"
            )


def _write_there(
    folder: Path, number: int, split: str, samples: list[tuple[str, list[tuple[str, Any]]]], *parts: np.ndarray
) -> ShardInfo:
    """Write one shard beside its place and rename it: a task that runs twice leaves the same file once."""
    try:
        own = Path(tempfile.mkdtemp(prefix=".attempt-", dir=folder))
    except FileNotFoundError:
        raise DataError(
            f"{folder.parent}: node {socket.gethostname()} does not see the folder that is packed to; with --runner "
            "ray, --out is on a path that all nodes share; if it is an address, the user's cache is"
        ) from None
    try:
        shard = Shard(own, number, split)
        try:
            for image_id, members in samples:
                shard.add(image_id, [(suffix, _content(one, parts)) for suffix, one in members])
            info = shard.complete()
        finally:
            shard.close()
        for file in own.iterdir():
            file.replace(folder / file.name)
        sync_folder(folder)
        return info
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _content(one: Any, parts: Sequence[np.ndarray]) -> bytes:
    if isinstance(one, bytes):
        return one
    part, start, length = one
    return parts[part][start : start + length].tobytes()
