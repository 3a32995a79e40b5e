"""The CPU engine: threads that cut, decode, resize and flip images directly into a batch's buffer.

The threads are those of the compiled library (`shards/kernels/workers.c`). Between the submission of a batch and its
end nothing of it needs the GIL. Files that the library cannot decode, and machines without it, use threads of Python
with simplejpeg and OpenCV. Those scale until their Python code fills one core, and wait for the GIL before that. A
buffer is reused when no batch refers to it any more.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from threading import local
from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg

from shards.common.errors import DataError
from shards.common.machine import available_cores
from shards.common.readahead import read_ahead
from shards.decode import WRONG_SIZE, cached_pixels, raw_pixels
from shards.engines import Draw, Request
from shards.engines.resample import Resampler
from shards.jpeg import RegionCutter
from shards.kernels.workers import (
    CROPS,
    LOADED,
    LOST,
    LOST_BYTES,
    Drawing,
    Loading,
    Room,
    Source,
    check,
    left_over,
    start_workers,
)
from shards.shardset import ShardSet

if TYPE_CHECKING:
    import torch

_CHUNK = 8
"""Minimum images per task: handing over a task costs time. Larger batches get larger tasks, two per thread."""


def _request(room: Room) -> Request:
    """What was drawn."""
    return Request(room.samples, room.boxes, room.symmetry)


class Rooms:
    """Memory for batches (n, S, S, 3), used again when only this pool refers to it."""

    def __init__(self, allocate: Callable[[tuple[int, ...]], np.ndarray]) -> None:
        """allocate: makes a uint8 array of a given shape, in normal or in page-locked memory."""
        self._allocate = allocate
        self._held = deque([Room((0, 1, 1, 3), allocate)])
        room = self._held[0]
        self._unused = sys.getrefcount(room)  # the count if nothing else refers to it

    def take(self, shape: tuple[int, int, int, int]) -> Room:
        """A free room for images of this shape. Rooms for other shapes are dropped."""
        if self._held and self._held[0].images.shape != shape:
            self._held.clear()
        for _ in range(len(self._held)):
            room = self._held[0]  # the one that was taken longest ago
            self._held.rotate(-1)
            if sys.getrefcount(room) == self._unused and not room.in_use:
                return room
        self._held.append(Room(shape, self._allocate))
        return self._held[-1]

    def clear(self) -> None:
        """Drop all memory. What is in use lives until its last reference ends."""
        self._held.clear()


class _Scratch:
    """One thread's memory between decoding and the batch, small enough for its core's cache."""

    def __init__(self, side: int, interpolation: str) -> None:
        self.resample = Resampler(side, interpolation=interpolation)
        self.cut = RegionCutter()
        self.pixels = np.empty(0, np.uint8)
        self.pixels_at = 0

    def reserve(self, size: int) -> None:
        """Make room for at least `size` bytes of pixels."""
        if len(self.pixels) < size:
            self.pixels = cached_pixels(size)
            self.pixels_at = self.pixels.ctypes.data


class _MappedShards(dict[int, tuple[memoryview, int]]):
    """Shard → its bytes and their address. The reference keeps the address valid after the set is closed."""

    def __init__(self, data: ShardSet) -> None:
        self._data = data
        data.hold(self)

    def release(self, number: int) -> None:
        """Forget a shard. Who reads of it has its own reference."""
        self.pop(number, None)

    def __missing__(self, shard: int) -> tuple[memoryview, int]:
        view = self._data.shard(shard)
        mapped = self[shard] = view, np.frombuffer(view, np.uint8).ctypes.data
        return mapped


class NativeEngine:
    """Loads batches on `threads` threads, `prefetch` batches ahead."""

    def __init__(
        self,
        data: ShardSet,
        device: str = "cpu",
        threads: int | None = None,
        prefetch: int = 2,
        interpolation: str = "bilinear",
    ) -> None:
        """threads: at most the cores this process may use, which is the default. interpolation: one of
        `plan.INTERPOLATIONS`. Turns OpenCV's own threads off in the whole process."""
        cv2.setNumThreads(0)
        self.data, self.device, self.prefetch, self.interpolation = data, device, prefetch, interpolation
        self.threads = min(threads or available_cores(), available_cores())
        self._foreign = False  # the files are of another packer
        self._start()
        if device == "cpu":
            self._rooms = Rooms(lambda shape: np.empty(shape, np.uint8))
        else:
            from shards.engines.transfer import pinned_buffer

            self._rooms = Rooms(pinned_buffer)
        self._local = local()
        self._mapped = _MappedShards(data)

    def _start(self) -> None:
        """Start the threads. A forked child has none and starts its own."""
        self._pid = os.getpid()
        self._workers = start_workers(self.data, self.threads, self.interpolation)
        # Its threads start when they are first used.
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="shards-native")

    def run(self, requests: Iterable[Request], resolution: int) -> "Iterator[torch.Tensor]":
        """See `Engine.run`. On a CUDA device a batch is transferred as one asynchronous copy from pinned memory."""
        import torch

        if self.device == "cpu":
            for room in self._filled(requests, resolution):
                # NumPy's transpose, because PyTorch's releases the GIL and may wait 5 ms to get it back.
                yield torch.from_numpy(room.turned)
                del room  # so that the pool sees when the caller drops the tensor
        else:
            from shards.engines.transfer import to_device

            yield from to_device((room.images for room in self._filled(requests, resolution)), self.device)

    def _filled(self, requests: Iterable[Request], resolution: int) -> Iterator[Room]:
        """Rooms with the images of the requests, in their order."""
        places = (
            (request, self._rooms.take((len(request.samples), resolution, resolution, 3))) for request in requests
        )
        with closing(read_ahead(self._submit, places, self.prefetch + 1)) as filled:
            for (request, room), results in filled:
                for status in results:
                    if status is not None:
                        self._finish(request, room.images, status)
                yield room
                del room  # so that the pool sees when the caller drops it

    def _submit(self, place: tuple[Request, Room]) -> "list[Loading] | list[Future[None]]":
        """Start loading a batch, on the library's threads if possible."""
        request, images = place[0], place[1].images
        if self._pid != os.getpid():
            self._start()
        if self._workers is None or self._foreign:
            return self._submit_to_python(request, images)
        return [Loading(self._workers, request.samples, images, CROPS, boxes=request.boxes, symmetry=request.symmetry)]

    @property
    def draws(self) -> bool:
        """Whether `draw` works: on a CPU, with the compiled library."""
        return self._workers is not None and self.device == "cpu"

    def draw(
        self, source: Source, draws: Iterable[Draw], count: int, resolution: int
    ) -> "Iterator[tuple[torch.Tensor, ...]]":
        """Batches of `count` samples of a source, whose plan the threads make too: tensors of the images, labels,
        samples, colour and mask of each. Raises DataError naming a damaged sample."""
        from torch import from_numpy

        def submit(place: tuple[Draw, Room]) -> "list[Loading] | list[Future[None]]":
            if self._pid != os.getpid():
                self._start()
            assert self._workers is not None, "`draws` was false"
            (number, positions, at, _), room = place
            side = 0 if self._foreign else resolution
            drawing = Drawing(self._workers, source, (number, positions, at), room, side)
            if not self._foreign:
                return [drawing]
            drawing.result()  # plans it
            return self._submit_to_python(_request(room), room.images)

        places = ((draw, self._rooms.take((count, resolution, resolution, 3))) for draw in draws)
        with closing(read_ahead(submit, places, self.prefetch + 1)) as drawn:
            for (draw, room), results in drawn:
                for status in results:
                    if status is not None:
                        self._finish(_request(room), room.images, status)
                arrays = room.turned, room.labels, room.samples, room.colour, draw.mask
                del room
                yield tuple(map(from_numpy, arrays))
                del arrays

    def _finish(self, request: Request, buffer: np.ndarray, status: np.ndarray) -> None:
        """Raise DataError for a bad sample. Load the samples that the library cannot decode."""
        left = left_over(self.data, request.samples, status)
        # The files are of another packer, so the library would try them in vain in every batch.
        self._foreign = 2 * len(left) > len(status)
        for future in self._submit_to_python(request, buffer, left):
            future.result()

    def _submit_to_python(
        self, request: Request, buffer: np.ndarray, places: np.ndarray | None = None
    ) -> "list[Future[None]]":
        """Load a batch, or the samples at some places of it, on threads of Python that decode with simplejpeg."""
        data, places = self.data, np.arange(len(request.samples)) if places is None else places
        rows = request.samples[places]
        fields = [data.column(name)[rows].tolist() for name in ("shard", "offset", "length", "height", "width", "xxh3")]
        raw = (data.column("encoding")[rows] == "raw").tolist()
        boxes, symmetry = request.boxes[places].tolist(), request.symmetry[places].tolist()
        columns = [places.tolist(), rows.tolist(), *fields, raw, boxes, symmetry]
        samples = list(zip(*columns, strict=True))
        chunk = max(_CHUNK, len(samples) // (2 * self.threads))
        return [
            self._pool.submit(self._fill, samples[start : start + chunk], buffer)
            for start in range(0, len(samples), chunk)
        ]

    def _fill(self, samples: list[tuple], out: np.ndarray) -> None:
        """Load some samples into their places in `out` (n, S, S, 3)."""
        data, side = self.data, out.shape[1]
        scratch = self._scratch_of(side)
        out_at, out_bytes = out.ctypes.data, out.strides[0]
        for place, sample, shard, offset, length, height, width, xxh3, raw, (y, x, h, w), symmetry in samples:
            view, start = self._mapped[shard]
            payload, at = view[offset : offset + length], start + offset
            self._check(payload, xxh3, sample)
            top = left = 0
            try:
                if raw:
                    image, at = raw_pixels(payload, height, width), at + len(payload) - height * width * 3
                else:
                    encoded, top, left = scratch.cut(payload, height, width, y, x, h, w, at) or (payload, 0, 0)
                    scratch.reserve(height * width * 3)
                    image, at = simplejpeg.decode_jpeg(encoded, buffer=scratch.pixels), scratch.pixels_at
            except (DataError, ValueError):
                raise data.damaged(sample, WRONG_SIZE) from None
            top, left = y - top, x - left
            crop = image[top : top + h, left : left + w]
            if crop.shape[:2] != (h, w) or not crop.size:  # the kernel would read beyond the image
                raise data.damaged(sample, WRONG_SIZE)
            at += top * image.strides[0] + left * 3
            scratch.resample(crop, symmetry, out[place], at, out_at + place * out_bytes)

    def _check(self, payload: memoryview, xxh3: int, sample: int) -> None:
        """Raise DataError if a payload is not what was packed."""
        status = check(payload, xxh3)
        if status != LOADED:
            raise self.data.damaged(sample, *([LOST_BYTES] if status == LOST else []))

    def _scratch_of(self, side: int) -> "_Scratch":
        """This thread's scratch memory for images of `side` px."""
        scratch = getattr(self._local, "scratch", None)
        if scratch is None or scratch.resample.side != side:
            scratch = self._local.scratch = _Scratch(side, self.interpolation)
        return scratch

    def close(self) -> None:
        """Stop the threads and release the buffers. Yielded batches stay valid."""
        if self._pid == os.getpid():
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._workers is not None:
            self._workers.close()
        self._rooms.clear()
        self._mapped.clear()
