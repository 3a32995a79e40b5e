"""The inputs of the DALI graph: the bytes of a batch, read and checked on threads, and the plan's numbers as arrays."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from shards.common.errors import DataError
from shards.common.readahead import Pending, read_ahead
from shards.decode import raw_pixels
from shards.engines import Request
from shards.jpeg import WHOLE_SHARE, RegionCutter
from shards.kernels.workers import PAYLOADS, Loading, left_over, start_workers
from shards.shardset import ShardSet

INPUTS = {
    "jpg": ("payload", "start", "shape", "size", "transposed"),
    "raw": ("payload", "shape", "size", "transposed"),
    "mixed": ("payload", "start", "shape", "size", "transposed", "raw"),
}
"""The inputs of a graph, by the kind of samples. For a batch of n: payload, n arrays (bytes,) uint8; start and shape,
(n, 2) int32 y, x of the box in the given JPEG, and its h, w; size, (n, 2) float32 height and width of the output,
negative to mirror; transposed and raw, (n,) bool."""

READERS = 2  # threads that read, check and cut, one batch each; DALI does the rest


@dataclass(frozen=True)
class InputBatch:
    """A batch as the graph's INPUTS, in order; and its samples, (n,) int64, to name one that DALI cannot decode."""

    samples: np.ndarray
    arrays: list


class _Room:
    """Where the bytes of a batch go. payloads: the graph's input. start: (n, 2) int32 y, x of the box in each."""

    def __init__(self, data: ShardSet, request: Request) -> None:
        self.request = request
        self.payloads: list = [None] * len(request.samples)
        self.start = request.boxes[:, :2].copy()
        lengths = data.rows["length"][request.samples].astype(np.int64)
        ends = np.cumsum(lengths)
        self.places, self.found = ends - lengths, np.zeros((len(lengths), 3), np.int64)
        self.bytes = np.empty(ends[-1], np.uint8)  # memory that is not written to takes none

    def take(self) -> None:
        """Take over what the library's threads have found."""
        ends = (self.places + self.found[:, 0]).tolist()
        self.payloads = [self.bytes[a:b] for a, b in zip(self.places.tolist(), ends, strict=True)]
        self.start -= self.found[:, 1:].astype(np.int32)


class Reader:
    """Reads batches on `READERS` threads, `ahead` batches in advance."""

    def __init__(self, data: ShardSet, contents: str, ahead: int, *, cutting: bool) -> None:
        """contents: a key of INPUTS. cutting: pass on only the part of a JPEG with the box, if it can be cut out."""
        self.data, self.contents, self.ahead, self.cutting = data, contents, ahead, cutting
        self._workers = start_workers(data, READERS)
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="shards-dali")

    def batches(self, requests: Iterable[Request], resolution: int) -> "Generator[InputBatch, None, None]":
        """The bytes of the requests, read and checked on other threads, a few batches ahead."""
        rooms = (_Room(self.data, request) for request in requests)
        with closing(read_ahead(self._submit, rooms, self.ahead + 1)) as read:
            for room, (status,) in read:
                if self._workers is not None:
                    room.take()
                    self._read(room, left_over(self.data, room.request.samples, status))
                yield self._batch(room, resolution)

    def _submit(self, room: _Room) -> "Sequence[Pending[np.ndarray | None]]":
        """Start reading a batch, on the library's threads if there are some, else on one of Python."""
        request = room.request
        if self._workers is None:
            return [self._threads.submit(self._read, room, np.arange(len(request.samples)))]
        worth = WHOLE_SHARE if self.cutting else 0.0
        arrays = {"boxes": request.boxes, "places": room.places, "found": room.found}
        return [Loading(self._workers, request.samples, room.bytes, PAYLOADS, worth=worth, **arrays)]

    def _read(self, room: _Room, places: np.ndarray) -> None:
        """Read and check the bytes of some samples. Raises DataError naming a damaged one."""
        data, request, cut = self.data, room.request, RegionCutter()
        for place in places.tolist():
            sample, (y, x, h, w) = int(request.samples[place]), request.boxes[place].tolist()
            payload, height, width = data.read(sample), *(int(data.rows[side][sample]) for side in ("height", "width"))
            if data.rows["raw"][sample]:
                crop = raw_pixels(payload, height, width)[y : y + h, x : x + w]
                room.payloads[place] = np.ascontiguousarray(crop).reshape(-1)
            elif self.cutting and (part := cut(payload, height, width, y, x, h, w)):
                encoded, top, left = part
                room.payloads[place] = encoded.copy()  # the next cut overwrites it
                room.start[place] = y - top, x - left
            else:
                room.payloads[place] = np.frombuffer(payload, np.uint8)

    def _batch(self, room: _Room, resolution: int) -> InputBatch:
        """The inputs of a batch whose bytes are there."""
        samples, boxes, symmetry = room.request.samples, room.request.boxes, room.request.symmetry
        raw = self.data.rows["raw"][samples].astype(bool)
        transposed = (symmetry & 4) != 0
        # A negative size mirrors. The graph mirrors before it transposes, the plan after: the axes change places.
        mirrors = np.stack([symmetry & 2, symmetry & 1], axis=1) != 0
        mirrors = np.where(transposed[:, None], mirrors[:, ::-1], mirrors)
        size = np.where(mirrors, -resolution, resolution).astype(np.float32)
        given = {
            "payload": room.payloads,
            "start": room.start,
            "shape": np.ascontiguousarray(boxes[:, 2:]),
            "size": size,
            "transposed": transposed,
            "raw": raw,
        }
        return InputBatch(samples, [given[name] for name in INPUTS[self.contents]])

    def close(self) -> None:
        """Stop the threads."""
        if self._workers is not None:
            self._workers.close()
        self._threads.shutdown(wait=True, cancel_futures=True)


class Source:
    """The input of a pipeline: a new iterator in each run."""

    def __init__(self, max_batch: int) -> None:
        self.max_batch = max_batch
        self.open(iter(()))

    def open(self, batches: Iterator[InputBatch]) -> None:
        """Read from `batches` from now on."""
        self._batches = batches
        self.error: DataError | None = None
        self.too_large: InputBatch | None = None
        self.in_progress: deque[np.ndarray] = deque()

    def take(self) -> list:
        """The next batch. A damaged sample ends the input instead of failing: the batches before it are still good."""
        try:
            batch = next(self._batches)
        except DataError as error:
            self.error = error
            raise StopIteration from None
        if len(batch.samples) > self.max_batch:
            self.too_large = batch
            raise StopIteration
        self.in_progress.append(batch.samples)
        return batch.arrays
