"""The inputs of the DALI graph: the bytes of a batch, read and checked on threads, and the plan's numbers as arrays."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from shards.common.errors import DataError
from shards.common.readahead import read_ahead
from shards.decode import raw_pixels
from shards.engines import Request
from shards.jpeg import RegionCutter
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


class Reader:
    """Reads batches on `READERS` threads, `ahead` batches in advance."""

    def __init__(self, data: ShardSet, contents: str, ahead: int, *, cutting: bool) -> None:
        """contents: a key of INPUTS. cutting: pass on only the part of a JPEG with the box, if it can be cut out."""
        self.data, self.contents, self.ahead, self.cutting = data, contents, ahead, cutting
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="shards-dali")

    def batches(self, requests: Iterable[Request], resolution: int) -> "Generator[InputBatch, None, None]":
        """The bytes of the requests, read and checked on other threads, a few batches ahead."""

        def submit(request: Request) -> list[Future[InputBatch]]:
            return [self._threads.submit(self._read, request, resolution)]

        with closing(read_ahead(submit, requests, self.ahead + 1)) as read:
            for _, (batch,) in read:
                yield batch

    def _read(self, request: Request, resolution: int) -> InputBatch:
        """Read and check a batch's bytes. Raises DataError naming a damaged sample."""
        data, boxes, symmetry = self.data, request.boxes, request.symmetry
        raw = (data.column("encoding")[request.samples] == "raw").astype(bool)
        start, shape = boxes[:, :2].copy(), np.ascontiguousarray(boxes[:, 2:])
        heights, widths = (data.column(name)[request.samples].tolist() for name in ("height", "width"))
        payloads, cut = [], RegionCutter()
        for place, (sample, (y, x, h, w)) in enumerate(zip(request.samples.tolist(), boxes.tolist(), strict=True)):
            payload, height, width = data.read(sample), heights[place], widths[place]
            if raw[place]:
                crop = raw_pixels(payload, height, width)[y : y + h, x : x + w]
                payloads.append(np.ascontiguousarray(crop).reshape(-1))
            elif self.cutting and (part := cut(payload, height, width, y, x, h, w)):
                encoded, top, left = part
                payloads.append(encoded.copy())  # the next cut overwrites it
                start[place] -= top, left
            else:
                payloads.append(np.frombuffer(payload, np.uint8))
        transposed = (symmetry & 4) != 0
        # A negative size mirrors. The graph mirrors before it transposes, the plan after: the axes change places.
        mirrors = np.stack([symmetry & 2, symmetry & 1], axis=1) != 0
        mirrors = np.where(transposed[:, None], mirrors[:, ::-1], mirrors)
        size = np.where(mirrors, -resolution, resolution).astype(np.float32)
        given = {
            "payload": payloads,
            "start": start,
            "shape": shape,
            "size": size,
            "transposed": transposed,
            "raw": raw,
        }
        return InputBatch(request.samples, [given[name] for name in INPUTS[self.contents]])

    def close(self) -> None:
        """Stop the threads."""
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
