"""The resident engine: images stay decoded in the device's memory, and a batch is one gather from it.

Everything is integers, so every device computes the same bits. The position of an output pixel in the box is a fraction
with a known denominator, its weights have 14 or 15 bits, and products fit 32 bits. Weights and rounding are as in the
native engine's kernel (`resample.c`), so the pixels are the same. Without the kernel, the native engine uses OpenCV if
it is bilinear, which differs by 1 in about one value of eight. On a GPU the gather is one Triton kernel
(`shards/kernels/gather.py`). `resident` is for a GPU: on a CPU the native engine is faster.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np

from shards.common.errors import DataError, UsageError, one_line
from shards.common.machine import available_cores, free_bytes
from shards.decode import WRONG_SIZE, decode_whole
from shards.engines import Request
from shards.kernels.workers import IMAGES, Loading, left_over, start_workers

if TYPE_CHECKING:
    import torch

    from shards.shardset import Selection

_log = logging.getLogger(__name__)

LINES = {"bilinear": 2, "bicubic": 4}  # that are mixed
# Bits of the weights, and of the fraction in a mixed row, as in resample.c.
ROW_BITS = {"bilinear": 15, "bicubic": 14}
COLUMN_BITS, FRACTION = 14, 6
_SPARE = 0.1  # share of the free memory that is left for the model and its activations
_CHUNK_BYTES = 64 << 20  # decoded before each copy to a GPU
_EAGER_PIXELS = 1 << 20  # output pixels at a time without fusion, to stay near the caches


def needed_bytes(selection: "Selection") -> int:
    """Bytes of the decoded pixels of a selection."""
    heights, widths = _sides(selection)
    return int((heights * widths).sum()) * 3


def _sides(selection: "Selection") -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths of a selection's images, (N,) int64 each, px."""
    height, width = (selection.data.column(name)[selection.samples].astype(np.int64) for name in ("height", "width"))
    return height, width


def check_memory(selection: "Selection", device: str) -> None:
    """Raise UsageError, with the bytes needed, if `device` has no memory for these images."""
    needed, free, count = needed_bytes(selection), free_bytes(device), len(selection)
    if needed > free * (1 - _SPARE):
        raise UsageError(
            f"engine 'resident' needs {needed / 1e9:.3g} GB on {device} for {count:,} images of "
            f"{needed / 3 / count:,.0f} px on average; {free / 1e9:.3g} GB are free, and a tenth of that is left for "
            "the model: use another engine, or pack with a smaller --max-resolution"
        )


class ResidentEngine:
    """Holds a selection's pixels on the device: (pixels, 3) uint8, image after image, of any sizes."""

    def __init__(
        self,
        selection: "Selection",
        device: str = "cpu",
        threads: int | None = None,
        interpolation: str = "bilinear",
    ) -> None:
        """threads: for decoding, once. interpolation: one of `plan.INTERPOLATIONS`.

        Nothing is decoded before the first batch. Raises UsageError, with the bytes needed and free, if the memory
        does not suffice.
        """
        self.selection, self.device, self.interpolation = selection, device, interpolation
        self.threads = min(threads or available_cores(), available_cores())
        heights, self._widths = _sides(selection)
        self._starts = np.concatenate([[0], np.cumsum(heights * self._widths)])  # in pixels
        self._pixels: list[torch.Tensor] = []  # none or one
        self._gather = _gather_in_parts if device == "cpu" else _triton_gather()
        check_memory(selection, device)

    def run(self, requests: Iterable[Request], resolution: int) -> "Iterator[torch.Tensor]":
        """See `Engine.run`. The first run decodes the selection."""
        import torch

        self.load()
        for request in requests:
            table = torch.from_numpy(self.table(request))
            if self.device != "cpu":
                table = table.pin_memory().to(self.device, non_blocking=True)
            yield self.gather(table, resolution)

    def load(self) -> None:
        """Decode the selection, unless it was. Raises UsageError and DataError as above and `run`."""
        if not self._pixels:
            check_memory(self.selection, self.device)  # again: something may have filled it since
            self._pixels.append(self._load())

    def resizing(self, interpolation: str) -> "ResidentEngine":
        """An engine that holds the same memory and resizes by `interpolation`. Closing one closes the other."""
        other = copy.copy(self)
        other.interpolation = interpolation
        return other

    def gather(self, table: "torch.Tensor", resolution: int) -> "torch.Tensor":
        """Images as `run` yields them. table: (n, 7) int64 on the device, as `table` gives it. Comes after `load`."""
        assert self._pixels, "`load` comes first"
        return self._gather(self._pixels[0], table, resolution, self.interpolation).permute(0, 3, 1, 2)

    def table(self, request: Request) -> np.ndarray:
        """(n, 7) int64: first pixel of the image, its width, box y, x, h, w, and symmetry."""
        positions = np.searchsorted(self.selection.samples, request.samples)
        known = self.selection.samples[np.minimum(positions, len(self.selection) - 1)] == request.samples
        if not known.all():
            raise ValueError(f"sample {request.samples[~known][0]} is not in the selection that the engine holds")
        return np.column_stack([self._starts[positions], self._widths[positions], request.boxes, request.symmetry])

    def _load(self) -> "torch.Tensor":
        """Decode the selection: (pixels, 3) uint8 on the device. Raises DataError naming a damaged sample."""
        import torch

        began = time.monotonic()
        size = f"{len(self.selection):,} images, {self._starts[-1] * 3 / 1e9:.3g} GB"
        _log.info("resident: decoding %s onto %s", size, self.device)
        pixels = torch.empty((int(self._starts[-1]), 3), dtype=torch.uint8, device=self.device)
        data, samples = self.selection.data, self.selection.samples
        with (
            start_workers(data, self.threads) or nullcontext() as workers,
            ThreadPoolExecutor(self.threads, thread_name_prefix="shards-resident") as pool,
        ):
            for first, last in self._chunks():
                start, end = int(self._starts[first]), int(self._starts[last])
                part = pixels[start:end]
                host = part if self.device == "cpu" else _pinned(end - start)
                rows, left = host.numpy(), np.arange(last - first)
                if workers is not None:
                    places = (self._starts[first:last] - start) * 3
                    loading = Loading(workers, samples[first:last], rows, IMAGES, places=places)
                    left = left_over(data, samples[first:last], loading.result())
                for done in [pool.submit(self._decode, first + place, rows, start) for place in left.tolist()]:
                    done.result()
                if host is not part:
                    part.copy_(host)
        _log.info("resident: decoded %s in %.1f s", size, time.monotonic() - began)
        return pixels

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of positions in the selection, each about `_CHUNK_BYTES` decoded."""
        first = 0
        while first < len(self.selection):
            limit = self._starts[first] + _CHUNK_BYTES // 3
            last = max(int(np.searchsorted(self._starts, limit, "right")) - 1, first + 1)
            yield first, last
            first = last

    def _decode(self, position: int, out: np.ndarray, origin: int) -> None:
        """Decode one image into `out` (pixels, 3). `out` begins at pixel `origin` of all pixels."""
        data, sample = self.selection.data, int(self.selection.samples[position])
        height, width = int(data.column("height")[sample]), int(data.column("width")[sample])
        payload = data.read(sample)
        try:
            image = decode_whole(payload, str(data.column("encoding")[sample]), height, width)
        except DataError:
            raise data.damaged(sample, WRONG_SIZE) from None
        start = int(self._starts[position]) - origin
        out[start : start + height * width] = image.reshape(-1, 3)

    def close(self) -> None:
        """Release the device's memory. Yielded batches stay valid."""
        self._pixels.clear()


def _pinned(pixels: int) -> "torch.Tensor":
    """Page-locked host memory for this many pixels."""
    import torch

    return torch.empty((pixels, 3), dtype=torch.uint8, pin_memory=True)


def gather(
    pixels: "torch.Tensor", table: "torch.Tensor", resolution: int, interpolation: str = "bilinear"
) -> "torch.Tensor":
    """Crop, resize and turn a batch: (n, S, S, 3) uint8. Half-pixel centres, edges clamped to the box.

    pixels: (pixels, 3) uint8. table: (n, 7) int64, as `ResidentEngine.table`. interpolation: one of
    `plan.INTERPOLATIONS`. The Triton kernel computes the same.
    """
    import torch

    start, (width, y, x, h, w, symmetry) = table[:, :1, None], table[:, 1:].int()[..., None].unbind(1)
    transposed = (symmetry & 4) != 0
    line = torch.arange(resolution, dtype=torch.int32, device=pixels.device)
    down = torch.where(symmetry & 2 != 0, resolution - 1 - line, line)  # (n, S): positions in the resized crop
    along = torch.where(symmetry & 1 != 0, resolution - 1 - line, line)
    lines, row_bits = LINES[interpolation], ROW_BITS[interpolation]
    rows = neighbours(torch.where(transposed, along, down), y, h, resolution, lines, row_bits)
    columns = neighbours(torch.where(transposed, down, along), x, w, resolution, lines, COLUMN_BITS)
    turned = transposed[..., None]

    def of_rows(values: torch.Tensor) -> torch.Tensor:
        """(n, S) of the image's y as (n, S, S): constant along the output's rows, or its columns if transposed."""
        return torch.where(turned, values[:, None, :], values[:, :, None])

    def of_columns(values: torch.Tensor) -> torch.Tensor:
        """(n, S) of the image's x as (n, S, S)."""
        return torch.where(turned, values[:, :, None], values[:, None, :])

    above = [(start + of_rows(line * width), of_rows(weight)[..., None]) for line, weight in rows]
    mixed = torch.full((), 1 << FRACTION + COLUMN_BITS - 1, dtype=torch.int32, device=pixels.device)
    for place, share in columns:
        column, shift = of_columns(place), row_bits - FRACTION
        total = torch.full((), 1 << shift - 1, dtype=torch.int32, device=pixels.device)
        for line, weight in above:
            total = pixels[line + column].int().mul_(weight).add_(total)  # (n, S, S, 3)
        mixed = (total >> shift).mul_(of_columns(share)[..., None]).add_(mixed)
    return (mixed >> FRACTION + COLUMN_BITS).clamp_(0, 255).to(torch.uint8)


def neighbours(
    place: "torch.Tensor", start: "torch.Tensor", extent: "torch.Tensor", resolution: int, lines: int, bits: int
) -> "list[tuple[torch.Tensor, torch.Tensor]]":
    """The image's lines that a position in the resized crop is mixed of, and their weights: (n, S) int32 each.

    The weights are in 1 / 2 ** bits; resample.c explains those of four lines. place: (n, S). start, extent: (n, 1),
    where the box begins and how long it is.
    """
    import torch

    double = 2 * resolution
    numerator = (2 * place + 1) * extent - resolution  # of the place in the box, in 1 / double
    low = torch.div(numerator, double, rounding_mode="floor")
    after = torch.div(((numerator - low * double) << bits) + resolution, double, rounding_mode="floor")
    weights = [before := (1 << bits) - after, after]
    if lines == 4:
        product = (before * after + (1 << bits - 1)) >> bits
        first, last = ((product * weight + (1 << bits)) >> bits + 1 for weight in weights)
        weights = [-first, before + 2 * first - last, after + 2 * last - first, -last]
    zero = torch.zeros_like(extent)
    return [
        (start + torch.clamp(low + number, zero, extent - 1), weight)
        for number, weight in enumerate(weights, 1 - lines // 2)
    ]


def _gather_in_parts(
    pixels: "torch.Tensor", table: "torch.Tensor", resolution: int, interpolation: str
) -> "torch.Tensor":
    """`gather` a few images at a time: without fusion, each step would write and read the whole batch."""
    import torch

    part = max(1, _EAGER_PIXELS // resolution**2)
    return torch.cat([gather(pixels, rows, resolution, interpolation) for rows in table.split(part)])


def _triton_gather() -> "Callable[[torch.Tensor, torch.Tensor, int, str], torch.Tensor]":
    """The Triton kernel, or with a warning `_gather_in_parts` if Triton is not installed."""
    try:
        from shards.kernels.gather import gather as kernel
    except ImportError as error:
        _log.warning("resident: no Triton here, so the gather is slower: %s", one_line(error))
        return _gather_in_parts
    return lambda pixels, table, side, by: kernel(pixels, table, side, LINES[by], ROW_BITS[by], COLUMN_BITS, FRACTION)
