"""A packed payload → the pixels of its image."""

import cv2
import numpy as np

from shards.common.errors import DataError

NOT_ITS_SIZE = "it does not decode to the size that the index says"
_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


def decode_whole(payload: memoryview, encoding: str, height: int, width: int) -> np.ndarray:
    """A payload as (height, width, 3) uint8 RGB; a raw one as a view. Raises DataError where it is neither."""
    if encoding == "raw":
        return raw_pixels(payload, height, width)
    image = cv2.imdecode(np.frombuffer(payload, np.uint8), _FLAGS)
    if image is None or image.shape != (height, width, 3):
        raise DataError(f"a payload does not decode to {width}x{height} px")
    return image


def raw_pixels(payload: memoryview, height: int, width: int) -> np.ndarray:
    """The rows of a `.npy` payload as (height, width, 3) uint8: they end the file, whatever its header's length.

    Raises DataError where the payload is shorter.
    """
    size = height * width * 3
    if size > len(payload):
        raise DataError(f"a payload of {len(payload)} bytes does not hold {width}x{height} px")
    return np.frombuffer(payload, np.uint8, size, len(payload) - size).reshape(height, width, 3)


def cached_pixels(size: int) -> np.ndarray:
    """Memory, (size,) uint8, for decoded pixels that are read at once.

    libjpeg-turbo (simd/x86_64/jdcolext-avx2.asm) writes a row past the caches where it starts at a multiple of 32
    bytes: where images came to lie so, resizing waited for memory, and an image took 1.13 times as long (Zen 5, one
    thread). JPEG's blocks make most rows multiples of 8 bytes long: from 4 bytes off none of them starts there.
    """
    whole = np.empty(size + 32, np.uint8)
    start = (4 - whole.ctypes.data) % 32
    return whole[start : start + size]
