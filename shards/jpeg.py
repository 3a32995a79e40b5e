"""JPEG with a restart table: encode it, and cut a region out of it without decoding the rest.

A restart marker ends a run of blocks whose bits depend on nothing before it. With a marker every few blocks and a table
of the runs' lengths, the bytes of a rectangle of blocks can be copied out of the scan and given their own header. The
result is a smaller JPEG that any decoder turns into exactly the pixels that the whole image has there. So a
random-resized crop decodes only what it shows. The table is an APP15 segment of the file, which other readers skip
(FORMAT.md, "Restart table").
"""

import struct
from functools import cache

import cv2
import numpy as np

from shards.kernels.load import compiled

TAG = b"DSRST1\0"
"""The first bytes of the APP15 segment that holds a restart table."""

_FIELDS = struct.Struct(">BBHHH")
"""After the tag: block height and width in pixels; blocks per run; offsets of the frame header (SOF0) and of the scan,
both counted from the end of this segment. Then the length of each run in bytes, with the marker behind it, as
little-endian uint16."""

_APP15, _SOF0, _SOS = 0xEF, 0xC0, 0xDA
_APP0_END = 20  # SOI and the 18 bytes of the JFIF segment: the restart table follows
_TABLE = _APP0_END + 4 + len(TAG)
_MOST_RUNS = (0xFFFF - 2 - len(TAG) - _FIELDS.size) // 2  # what fits a segment
_SAMPLING = {  # subsampling → OpenCV's factor, and the block (MCU) in pixels, height and width
    "444": (cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444, 8, 8),
    "422": (cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422, 8, 16),
    "420": (cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420, 16, 16),
}
_RUN_BLOCKS = 4  # target length of a run: shorter runs cost bytes, longer runs cut less closely
WHOLE_SHARE = 0.99  # a box that needs more of the image is decoded from the whole file
_MARKERS = (0xD0 + np.arange(1 << 16) % 8).astype(np.uint8)  # RST0 … RST7, over and over


@cache
def restart_interval(width: int, block_width: int) -> int:
    """Blocks per run for an image `width` px wide: the divisor of the blocks in a row that is nearest to the target."""
    row = -(-width // block_width)
    divisors = [d for d in range(1, row + 1) if row % d == 0]
    return min(divisors, key=lambda d: (max(d, _RUN_BLOCKS) / min(d, _RUN_BLOCKS), d))


def encode_jpeg(rgb: np.ndarray, quality: int = 90, subsampling: str = "420", restart: bool = True) -> bytes:
    """Encode (H, W, 3) uint8 RGB as a baseline JPEG without EXIF; with `restart`, with a restart table."""
    factor, block_height, block_width = _SAMPLING[subsampling]
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor]
    interval = restart_interval(rgb.shape[1], block_width)
    if restart:
        options += [cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise ValueError(f"OpenCV could not encode an image of shape {rgb.shape}")
    return _with_table(data, block_height, block_width, interval) if restart else data.tobytes()


def _with_table(data: np.ndarray, block_height: int, block_width: int, interval: int) -> bytes:
    """Insert the restart table behind the JFIF segment."""
    raw = data.tobytes()
    segments = _segments(raw)
    scan = segments[_SOS] + 2 + int.from_bytes(raw[segments[_SOS] + 2 : segments[_SOS] + 4], "big")
    lengths = _lengths(data[scan:])
    if not len(lengths):
        return raw
    size = 2 + len(TAG) + _FIELDS.size + 2 * len(lengths)
    fields = _FIELDS.pack(block_height, block_width, interval, segments[_SOF0] - _APP0_END, scan - _APP0_END)
    segment = struct.pack(">BBH", 0xFF, _APP15, size) + TAG + fields + lengths.tobytes()
    return raw[:_APP0_END] + segment + raw[_APP0_END:]


def _lengths(scan: np.ndarray) -> np.ndarray:
    """The bytes of each run of a scan, with the marker behind it, as <u2.

    Empty if the table does not fit a segment: the image is then decoded whole.
    """
    library = compiled()
    if library is not None:
        found = np.empty(_MOST_RUNS, "<u2")
        return found[: library.dermscale_run_lengths(scan.ctypes.data, scan.size, found.ctypes.data, found.size)]
    marks = np.flatnonzero(scan[:-1] == 0xFF)
    follows = scan[1:][marks]
    ends = marks[(follows >= 0xD0) & (follows <= 0xD7)]  # where each RSTn stands
    lengths = np.diff(np.concatenate([[-2], ends, [scan.size - 2]]))
    fits = lengths.max() <= 0xFFFF and lengths.size <= _MOST_RUNS
    return lengths.astype("<u2") if fits else np.empty(0, "<u2")


def _segments(raw: bytes) -> dict[int, int]:
    """Marker code → offset, of the segments up to the scan."""
    found, position = {}, 2
    while True:
        found[raw[position + 1]] = position
        if raw[position + 1] == _SOS:
            return found
        position += 2 + int.from_bytes(raw[position + 2 : position + 4], "big")


def has_restart_table(raw: bytes | memoryview) -> bool:
    """Whether a JPEG file has a restart table, as `encode_jpeg` writes it."""
    return raw[_APP0_END + 4 : _TABLE] == TAG


class RegionCutter:
    """Cuts regions out of JPEG files, one at a time. The next cut overwrites the result of the last one."""

    def __init__(self) -> None:
        self._library = compiled()
        self._corner = np.empty(2, np.int32)
        self._corner_at = self._corner.ctypes.data
        self._out, self._out_at = np.empty(0, np.uint8), 0

    def __call__(
        self, raw: memoryview, height: int, width: int, y: int, x: int, h: int, w: int, at: int | None = None
    ) -> tuple[np.ndarray, int, int] | None:
        """The part of a JPEG that holds the box (y, x, h, w), as a JPEG of its own.

        raw: the whole file, an image of (height, width) px. at: its address, if known. Returns (JPEG bytes as (n,)
        uint8, top, left). In the decoded JPEG, the box is at [y - top : y - top + h, x - left : x - left + w], with
        the pixels of the whole image. None if the file has no restart table or a wrong one, the box needs all of it, or
        the box is not inside the image.
        """
        if not has_restart_table(raw):
            return None
        if self._library is None:
            return _cut(raw, height, width, y, x, h, w)
        length = len(raw)
        if len(self._out) < length:
            self._out = np.empty(length, np.uint8)
            self._out_at = self._out.ctypes.data
        if at is None:
            at = np.frombuffer(raw, np.uint8).ctypes.data
        size = self._library.dermscale_cut(
            at, length, height, width, y, x, h, w, WHOLE_SHARE, self._out_at, self._corner_at
        )
        top, left = self._corner.tolist()
        return (self._out[:size], top, left) if size else None


def _cut(
    raw: memoryview, height: int, width: int, y: int, x: int, h: int, w: int
) -> tuple[np.ndarray, int, int] | None:
    """Cut a file that has a restart table, in NumPy."""
    inside = 0 <= y <= height - h and 0 <= x <= width - w and h > 0 and w > 0
    if len(raw) < _TABLE + _FIELDS.size or not inside:
        return None
    block_height, block_width, interval, sof, scan = _FIELDS.unpack_from(raw, _TABLE)
    run_width = block_width * interval
    if not block_height or not run_width or scan < sof + 9:
        return None
    rows, columns = -(-height // block_height), -(-width // run_width)
    # One pixel more on each side: libjpeg's triangle filter mixes the nearest chroma sample beyond a pixel into it.
    row0, row1 = max(y - 1, 0) // block_height, min(y + h, height - 1) // block_height + 1
    column0, column1 = max(x - 1, 0) // run_width, min(x + w, width - 1) // run_width + 1
    table = _TABLE + _FIELDS.size
    end = table + 2 * rows * columns
    if (row1 - row0) * (column1 - column0) > WHOLE_SHARE * rows * columns or end + scan > len(raw):
        return None
    lengths = np.frombuffer(raw, "<u2", rows * columns, table)
    starts = np.empty(rows * columns + 1, np.int64)
    starts[0] = end + scan
    np.cumsum(lengths, out=starts[1:])
    starts[1:] += starts[0]
    kept = lengths.reshape(rows, columns)[row0:row1, column0:column1]
    if starts[row1 * columns] > len(raw) or not kept.any(axis=1).all():
        return None
    top, left = row0 * block_height, column0 * run_width
    size = struct.pack(">HH", min(row1 * block_height, height) - top, min(column1 * run_width, width) - left)
    head = [raw[:_APP0_END], raw[end : end + sof + 5], size, raw[end + sof + 9 : end + scan]]
    if column1 - column0 == columns:
        runs = [raw[starts[row0 * columns] : starts[row1 * columns]]]
    else:
        first = starts[row0 * columns + column0 : row1 * columns : columns].tolist()
        last = starts[row0 * columns + column1 : row1 * columns + 1 : columns].tolist()
        runs = [raw[a:b] for a, b in zip(first, last, strict=True)]
    out = np.frombuffer(bytearray().join(head + runs), np.uint8)
    marks = np.cumsum(kept)
    out[marks + (_APP0_END + scan - 1)] = _MARKERS[: len(marks)]
    out[-1] = 0xD9  # the last run ends the image (EOI)
    return out, top, left
