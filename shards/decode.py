"""A packed payload → the pixels of its image."""

import cv2
import numpy as np

from shards.common.errors import DataError

WRONG_SIZE = "it does not decode to the size that the index says"
_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


def decode_whole(payload: memoryview, encoding: str, height: int, width: int) -> np.ndarray:
    """A payload as (height, width, 3) uint8 RGB; a raw one as a view. Raises DataError if it is neither."""
    if encoding == "raw":
        return raw_pixels(payload, height, width)
    image = cv2.imdecode(np.frombuffer(payload, np.uint8), _FLAGS)
    if image is None or image.shape != (height, width, 3):
        raise DataError(f"a payload does not decode to {width}x{height} px")
    return image


def raw_pixels(payload: memoryview, height: int, width: int) -> np.ndarray:
    """The rows of a `.npy` payload as (height, width, 3) uint8: the end of the file, behind a header of any length.

    Raises DataError if the payload is too short.
    """
    size = height * width * 3
    if size > len(payload):
        raise DataError(f"a payload of {len(payload)} bytes does not hold {width}x{height} px")
    return np.frombuffer(payload, np.uint8, size, len(payload) - size).reshape(height, width, 3)


def cached_pixels(size: int) -> np.ndarray:
    """Memory, (size,) uint8, for decoded pixels that are read right after.

    libjpeg-turbo (simd/x86_64/jdcolext-avx2.asm) bypasses the caches for a row that starts at a multiple of 32 bytes.
    Resizing then waits for memory, and an image took 1.13 times as long (Zen 5, one thread). JPEG's blocks make most
    rows a multiple of 8 bytes long, so with an offset of 4 bytes no such row starts at a multiple of 32.
    """
    whole = np.empty(size + 32, np.uint8)
    start = (4 - whole.ctypes.data) % 32
    return whole[start : start + size]
