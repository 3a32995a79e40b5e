"""Bilinear or bicubic resize to a square with one of its eight symmetries: by a compiled kernel, or without one.

The kernel (`resample.c`, AVX2 or AVX-512, built at installation if there is a C compiler) does in one pass what OpenCV
does in three, and differs from its bilinear values by at most 1. Both use the same pixel centres and no antialias.

Bicubic is cubic convolution with a = -1/2 (Keys 1981, doi:10.1109/TASSP.1981.1163711): of all a, this one reproduces
quadratic functions. It is that of Pillow, with which timm's images were resized, and of DALI, which differs by at most
1. OpenCV has a = -3/4, so without the kernel NumPy resizes, more slowly and to the same bits.

Pillow reduces with antialias and engines do not. Mean difference from Pillow's bicubic on evaluation crops of 60 images
of HAM10000, of 255, bicubic and bilinear: 0.16 and 0.41 from 224 to 384 px, 0.30 and 0.35 from 262 to 224 px, 0.94 and
0.65 from 394 to 224 px. So bicubic is nearer, except where images shrink by much: those should be packed smaller.
"""

import cv2
import numpy as np

from shards.kernels.load import compiled


def apply_symmetry(image: np.ndarray, symmetry: int, out: np.ndarray) -> None:
    """Write one of the eight symmetries of a square (S, S, 3) uint8 image to `out` (`Plan.symmetry` says which)."""
    if symmetry & 4:
        if symmetry & 3 == 0:
            cv2.transpose(image, out)
        elif symmetry & 3 == 1:
            cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE, out)
        elif symmetry & 3 == 2:
            cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE, out)
        else:
            cv2.rotate(cv2.transpose(image), cv2.ROTATE_180, out)
    elif symmetry:
        cv2.flip(image, (1, 0, -1)[(symmetry & 3) - 1], out)
    else:
        np.copyto(out, image)


def _check(array: np.ndarray, fits: bool) -> None:
    """Refuse an array whose memory layout is not the one that the kernel expects."""
    if not fits or array.dtype != np.uint8:
        raise ValueError(
            f"{array.dtype} {array.shape} with strides {array.strides} is not an image that can be resized"
        )


class Resampler:
    """Resizes to (side, side, 3) in one thread, with its own scratch memory."""

    def __init__(self, side: int, level: int | None = None, interpolation: str = "bilinear") -> None:
        """side: px of the result. level: the highest of LEVELS to use; None is the best available.

        interpolation: one of `plan.INTERPOLATIONS`.
        """
        self.side, self.cubic = side, interpolation == "bicubic"
        library = compiled()
        self.level = min(library.dermscale_resample_level(), 2 if level is None else level) if library else 0
        self._kernel = library if self.level else None
        self._square = np.empty((side, side, 3), np.uint8)
        self._scratch, self._scratch_at, self._width = self._square, 0, 0

    def __call__(
        self, crop: np.ndarray, symmetry: int, out: np.ndarray, crop_at: int | None = None, out_at: int | None = None
    ) -> None:
        """Resize `crop`, (h, w, 3) uint8 RGB or (h, w, 4) whose last channel is dropped, and write a symmetry of it.

        A crop's rows may be apart, its pixels may not. out: (side, side, 3) uint8, contiguous. crop_at, out_at: their
        addresses, if known: asking NumPy takes 2 microseconds each. With an address the array is not checked. Raises
        ValueError for an empty crop, and for arrays of other types or layouts.
        """
        height, width, channels = crop.shape
        if not height or not width:
            raise ValueError(f"a crop of {width}x{height} px has nothing to resize")
        if crop_at is None:
            _check(crop, crop.strides[1:] == (channels, 1) and channels in (3, 4) and max(height, width) < 1 << 16)
        if out_at is None:
            _check(out, out.shape == (self.side, self.side, 3) and out.flags.c_contiguous and out.flags.writeable)
        if self._kernel is None and self.cubic:
            apply_symmetry(_bicubic(crop[..., :3], self.side), symmetry, out)
            return
        if self._kernel is None:
            square = cv2.resize(crop, (self.side, self.side), interpolation=cv2.INTER_LINEAR)
            if channels == 4:
                cv2.cvtColor(square, cv2.COLOR_RGBA2RGB, self._square)
                square = self._square
            apply_symmetry(square, symmetry, out)
            return
        self._reserve(width)
        self._kernel.dermscale_resample(
            crop.ctypes.data if crop_at is None else crop_at,
            crop.strides[0],
            height,
            width,
            channels,
            self.side,
            self.cubic,
            symmetry,
            out.ctypes.data if out_at is None else out_at,
            self._scratch_at,
            self.level,
        )

    def _reserve(self, width: int) -> None:
        """Make room in the scratch memory for crops of `width` px."""
        if self._kernel is not None and width > self._width:
            self._width = width
            self._scratch = np.empty(self._kernel.dermscale_scratch_bytes(width, self.side), np.uint8)
            self._scratch_at = self._scratch.ctypes.data


def _bicubic(crop: np.ndarray, side: int) -> np.ndarray:
    """(h, w, 3) uint8 to (side, side, 3), in NumPy: rows first, then columns, with the kernel's integers."""
    import torch

    from shards.engines.resident import COLUMN_BITS, FRACTION, LINES, ROW_BITS, neighbours

    mixed, line, start = crop.astype(np.int32), torch.arange(side, dtype=torch.int32)[None], torch.tensor([[0]])
    lines, row_bits = LINES["bicubic"], ROW_BITS["bicubic"]
    for axis, bits, shift in ((0, row_bits, row_bits - FRACTION), (1, COLUMN_BITS, COLUMN_BITS + FRACTION)):
        total = np.array(1 << shift - 1, np.int32)
        extent = torch.tensor([[mixed.shape[axis]]], dtype=torch.int32)
        for place, weight in neighbours(line, start, extent, side, lines, bits):
            shape = (side, 1, 1)[: 3 - axis]
            total = total + mixed.take(place[0].numpy(), axis) * weight.numpy().reshape(shape)
        mixed = total >> shift
    return mixed.clip(0, 255).astype(np.uint8)
