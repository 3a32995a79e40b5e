"""The Python side of `workers.c`: threads that load samples without Python."""

import os
import sys
import weakref
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from shards.common.errors import DataError, UsageError
from shards.decode import WRONG_SIZE
from shards.kernels.load import compiled, holding_the_lock
from shards.plan import Augment, numbers_of

if TYPE_CHECKING:
    from shards.shardset import ShardSet

LOADED, LEFT, OTHER_CHECKSUM, OTHER_SIZE, OUTSIDE, LOST = range(6)
"""Status of a sample. LEFT: the threads cannot decode it, so Python must. LOST: see LOST_BYTES."""
LOST_BYTES = "the file has become shorter since it was opened"

CROPS, IMAGES, PAYLOADS = range(3)
"""What is made of the samples: `enum result` of workers.c."""

ROW = np.dtype(
    [
        ("offset", np.uint64),
        ("xxh3", np.uint64),
        ("length", np.uint32),
        ("shard", np.uint32),
        ("height", np.uint16),
        ("width", np.uint16),
        ("raw", np.uint8),
        ("unused", np.uint8, 3),
    ]
)
"""`struct row` of workers.c."""


def check(payload: memoryview, xxh3: int) -> int:
    """LOADED if the XXH3 of a mapped payload is `xxh3`, LOST if its file has shrunk, else OTHER_CHECKSUM."""
    library = compiled()
    if library is not None:
        content = np.frombuffer(payload, np.uint8)
        status = library.dermscale_check(content.ctypes.data, len(content), xxh3)
        if status != LEFT:
            return status
    return LOADED if xxhash.xxh3_64_intdigest(payload) == xxh3 else OTHER_CHECKSUM


def rows_of(data: "ShardSet") -> np.ndarray:
    """The index as the threads read it, (samples,) of ROW."""
    rows = np.zeros(len(data), ROW)
    for name in ("offset", "xxh3", "length", "shard", "height", "width"):
        rows[name] = data.column(name)
    rows["raw"] = data.column("encoding") == "raw"
    return rows


def start_workers(data: "ShardSet", threads: int, interpolation: str = "bilinear") -> "Workers | None":
    """The threads; None if the library was not built, or has nothing for this processor.

    interpolation: of CROPS, one of `plan.INTERPOLATIONS`.
    """
    library = compiled()
    if library is None or not library.dermscale_resample_level():
        return None
    return Workers(data, threads, interpolation == "bicubic")


def left_over(data: "ShardSet", samples: np.ndarray, status: np.ndarray | None) -> np.ndarray:
    """The places of the samples that the threads leave to Python. Raises DataError for a bad sample.

    status: what `Loading.result` returned.
    """
    if status is None:
        return np.empty(0, np.int64)
    for place in np.flatnonzero(status > LEFT).tolist():
        why = {OTHER_SIZE: [WRONG_SIZE], LOST: [LOST_BYTES]}.get(int(status[place]), [])
        raise data.damaged(int(samples[place]), *why)
    return np.flatnonzero(status == LEFT)


class Loading:
    """A batch that the threads are loading. It has the methods of a future that `read_ahead` calls."""

    _at: int | None = None
    """The batch's handle until it is freed."""

    def __init__(
        self,
        workers: "Workers",
        samples: np.ndarray,
        out: np.ndarray,
        result: int,
        *,
        boxes: np.ndarray | None = None,
        symmetry: np.ndarray | None = None,
        worth: float = 0.0,
        places: np.ndarray | None = None,
        found: np.ndarray | None = None,
    ) -> None:
        """Start loading. Raises DataError if a shard cannot be mapped.

        samples: (n,) numbers of rows. result: CROPS into out (n, S, S, 3); IMAGES, or PAYLOADS, into out (bytes,) from
        `places` (n,) on. boxes: (n, 4) y, x, h, w; default, whole images. symmetry: (n,), for CROPS. worth, and found
        (n, 3) int64, which is filled: for PAYLOADS.
        """
        status = np.zeros(len(samples), np.int32)
        given = (
            np.ascontiguousarray(samples, np.int64),
            None if boxes is None else np.ascontiguousarray(boxes, np.int32),
            None if symmetry is None else np.ascontiguousarray(symmetry, np.uint8),
            out,
            None if places is None else np.ascontiguousarray(places, np.int64),
            found,
            status,
        )
        pointers = [None if array is None else array.ctypes.data for array in given]
        side = out.shape[1] if result == CROPS else 0
        arguments = (result, *pointers[:3], len(samples), side, worth, *pointers[3:])
        self._start(workers, "dermscale_batch_submit", arguments, samples, status, given)

    def _start(
        self,
        workers: "Workers",
        function: str,
        arguments: tuple[Any, ...],
        samples: np.ndarray,
        status: np.ndarray,
        held: tuple[Any, ...],
    ) -> None:
        """Start by this function of the library. held: what it and the threads read and write."""
        self._workers, self.status, self._incomplete = workers, status, 0
        self._at = workers.start(function, arguments, samples, status, held)

    def result(self) -> np.ndarray | None:
        """Wait for the batch; return the status of each sample, (n,) int32, or None if all are LOADED."""
        if self._at is not None:
            self._workers.wait(self._at)
            at, self._at = self._at, None  # before it is freed: Ctrl-C may come right after that
            self._incomplete = self._workers.free(at)
            del self._workers.held[id(self.status)]
        return self.status if self._incomplete else None

    def cancel(self) -> None:
        """Drop the samples that no thread has begun."""
        if self._at is not None:
            self._workers.cancel(self._at)

    def __del__(self) -> None:
        """End a batch that nobody has waited for, as after Ctrl-C."""
        if self._at is not None and self._workers.usable:
            self.cancel()
            self.result()

    def cancelled(self) -> bool:
        """False: some samples may be under way."""
        return False

    def exception(self) -> None:
        """Wait for the samples that are under way."""
        self.result()


class Source:
    """What a loader draws its batches from: `struct source` of workers.c, with the arrays it points to."""

    def __init__(self, samples: np.ndarray, labels: np.ndarray, augment: Augment, seed: int, train: bool) -> None:
        """samples: (N,) row numbers. labels: (N,). train: whether the plan is that of `training_plan`."""
        self._held = [np.ascontiguousarray(array, np.int64) for array in (samples, labels)]
        self._held.append(numbers_of(augment))
        samples_at, labels_at, augment_at = (array.ctypes.data for array in self._held)
        fields = [samples_at, labels_at, len(samples), augment_at, seed, int(train)]
        self._held.append(np.array(fields, np.int64))
        self.at: int = self._held[-1].ctypes.data


class Room:
    """Memory for one batch of n samples, which is used again and again: arrays, and `struct drawn` of workers.c."""

    def __init__(self, shape: tuple[int, ...], allocate: Callable[[tuple[int, ...]], np.ndarray]) -> None:
        """shape: of the images, (n, S, S, 3). allocate: makes a uint8 array of a given shape.

        The other arrays are samples and labels, (n,) int64; boxes (n, 4) int32, symmetry (n,) uint8 and colour
        (n, 3, 4) float32 of the plan; and status, (n,) int32.
        """
        n = shape[0]
        self.images = allocate(shape)
        self.turned = self.images.transpose(0, 3, 1, 2)
        self.samples, self.labels = np.empty(n, np.int64), np.empty(n, np.int64)
        self.boxes, self.symmetry = np.empty((n, 4), np.int32), np.empty(n, np.uint8)
        self.colour, self.status = np.empty((n, 3, 4), np.float32), np.empty(n, np.int32)
        written = "images", "samples", "labels", "boxes", "symmetry", "colour", "status"
        self._drawn = np.array([getattr(self, name).ctypes.data for name in written], np.uint64)
        self.at: int = self._drawn.ctypes.data
        self._given = self.images, self.turned, self.samples, self.labels, self.colour
        self._unused = self._references()

    def _references(self) -> tuple[int, ...]:
        return tuple(map(sys.getrefcount, self._given))

    @property
    def in_use(self) -> bool:
        """Whether anybody but the room refers to an array of it, as the tensors do that are made of it."""
        return self._references() != self._unused


class Drawing(Loading):
    """A batch that the threads plan and load into a room."""

    def __init__(self, workers: "Workers", source: Source, place: tuple[int, np.ndarray, int], room: Room, side: int):
        """Start. Raises DataError if a shard cannot be mapped.

        place: epoch; the positions of its samples in the source, int64; and the address of the batch's first. side: of
        the images, or 0 if the batch is only planned: all samples are LEFT then.
        """
        epoch, positions, at = place
        arguments = (source.at, epoch, at, len(room.samples), side, room.at)
        held = (room, source, positions)
        self._start(workers, "dermscale_batch_draw", arguments, room.samples, room.status, held)


class Workers:
    """`threads` threads that load the samples of one shard set."""

    def __init__(self, data: "ShardSet", threads: int, cubic: bool) -> None:
        """cubic: how CROPS are resized. Raises UsageError if the system cannot start the threads."""
        self._data, self._rows, self._pid = data, data.rows, os.getpid()
        count = len(data.manifest.shards)
        self._bytes: list[np.ndarray | None] = [None] * count  # held: the threads read them after the set is closed
        self._addresses, self._sizes = np.zeros(count, np.uint64), np.zeros(count, np.int64)
        self.held: dict[int, tuple[Any, ...]] = {}
        """The memory of the batches that are under way. The second of each are its samples."""
        self._starting = Lock()  # with dali, batches start on another thread than the one that releases shards
        data.hold(self)
        self._calls: Any = holding_the_lock()
        self._waiting: Any = compiled()
        addresses, sizes = self._addresses.ctypes.data, self._sizes.ctypes.data
        engine = self._calls.dermscale_engine_open(
            self._rows.ctypes.data, len(data), addresses, sizes, count, threads, cubic
        )
        if not engine:
            raise UsageError(f"threads {threads}: the system could not start so many; use fewer")
        self._engine: list[int] = [engine]  # empty once it is closed, also by the garbage collector
        held = (self._rows, self._addresses, self._sizes, self._bytes, self.held)
        self._close = weakref.finalize(self, _close, self._engine, self._pid, held)

    def start(
        self, function: str, arguments: tuple[Any, ...], samples: np.ndarray, status: np.ndarray, held: tuple[Any, ...]
    ) -> int:
        """Start loading a batch by a function of the library; return its handle.

        arguments: of the function, after the engine. samples: those of the batch, known after the call. held: what must
        stay until the batch is done. Raises DataError if a shard cannot be mapped, and RuntimeError if the threads were
        stopped.
        """
        if not self._engine:
            raise RuntimeError("this engine was closed, so it cannot load a batch")
        # Held until the batch is done: Ctrl-C may come right after it was submitted, before anything knows its handle.
        self.held[id(status)] = (status, samples, *held)
        try:
            while True:
                with self._starting:
                    at = getattr(self._calls, function)(self._engine[0], *arguments)
                if at:
                    return at
                if not self._map(samples):
                    raise MemoryError
        except (DataError, MemoryError):  # nothing was submitted
            del self.held[id(status)]
            raise

    def _map(self, samples: np.ndarray) -> bool:
        """Map the shards of these samples that are not mapped yet; return whether there were some."""
        shards = np.unique(self._rows["shard"][samples])
        missing = shards[self._addresses[shards] == 0].tolist()
        for shard in missing:
            content = self._bytes[shard] = np.frombuffer(self._data.shard(shard), np.uint8)
            self._sizes[shard], self._addresses[shard] = len(content), content.ctypes.data
        return bool(missing)

    def release(self, number: int) -> None:
        """Unmap a shard, unless a batch that is under way has samples of it: its threads read the bytes."""
        with self._starting:
            under_way = [samples for _, samples, *_ in list(self.held.values())]
            if not any((self._rows["shard"][samples] == number).any() for samples in under_way):
                self._addresses[number], self._bytes[number] = 0, None

    def wait(self, batch: int) -> None:
        """Wait for a batch. The GIL is released only if the batch is not done."""
        if self._engine and not self._calls.dermscale_batch_done(self._engine[0], batch):
            self._waiting.dermscale_batch_wait(self._engine[0], batch)

    def free(self, batch: int) -> int:
        """Free a batch that is done; return whether a sample of it is not LOADED."""
        return self._calls.dermscale_batch_free(batch)

    def cancel(self, batch: int) -> None:
        """Drop the samples of a batch that no thread has begun."""
        if self._engine:
            self._calls.dermscale_batch_cancel(self._engine[0], batch)

    @property
    def usable(self) -> bool:
        """Whether this process started the threads: a forked child has none."""
        return self._pid == os.getpid()

    def close(self) -> None:
        """Finish what is under way and stop the threads."""
        self._close()

    def __enter__(self) -> "Workers":
        """Enter the context."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop the threads."""
        self.close()


def _close(opened: list[int], pid: int, held: tuple[Any, ...]) -> None:
    """Stop an engine's threads. opened: its handle. held: memory that they read until then."""
    engine = opened.pop()
    if pid == os.getpid():  # a forked child has none of them
        compiled().dermscale_engine_close(engine)  # type: ignore[union-attr]
    del held
