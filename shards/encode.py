"""The bytes of one raw image → the payload that is packed: decode strictly, turn upright, shrink, encode.

Packing writes these payloads. Prediction sends other images through the same steps, so that a model sees them as it saw
its training images. Both may import `shards`, so this is here.

Each step was chosen by measurement on HAM10000's own files (600×450, 4:4:4, quality 100, about 260 KB). libjpeg-turbo
takes 2.4 ms to decode one. The compiled library decodes four at the same time (jpeg_whole.c) and takes 1.0 ms for each,
with the reduction. The encoder takes 0.3 ms. See `area_shrink` for the rest.
"""

import ctypes
import io
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg
import xxhash

from shards.duplicates import image_hash
from shards.format import MOST_PIXELS, EncodeSpec
from shards.jpeg import encode_jpeg
from shards.kernels.load import compiled

if TYPE_CHECKING:
    from PIL.Image import Image

JPEG = b"\xff\xd8"
"""What a JPEG file begins with."""
TOGETHER = 4
"""Files that the compiled library decodes at the same time."""
_ROW_SLACK = 192
"""Bytes that it may write behind an image."""
_AT_ONCE = 1 << 20
"""Pixels that Pillow converts together."""
_FEW_PHASES = 8
_INTEGERS = {3: "H", 4: "L", 8: "h", 9: "l"}
"""TIFF's integer types, as `struct` names them. An orientation should have the first; Pillow accepts all."""


class BadImageError(Exception):
    """An image that cannot be used; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One payload. encoding: `jpg` or `raw`. height, width: of the packed image, px.

    sums: of the pixels that went into the encoder: the sum of each channel (RGB), then the sum of its squares, exact.
    hash: the perceptual hash of these pixels.
    """

    payload: bytes
    encoding: str
    height: int
    width: int
    sums: tuple[int, int, int, int, int, int]
    hash: int


def encode_image(data: bytes, image_id: str, spec: EncodeSpec) -> Encoded:
    """Turn a raw JPEG file into a payload; a pure function of its arguments. Raises BadImageError."""
    return encode_pixels(decode_upright(data), image_id, spec)


def encode_images(files: Sequence[bytes], image_ids: Sequence[str], spec: EncodeSpec) -> list[Encoded | BadImageError]:
    """The results of `encode_image` for several files, or its errors; TOGETHER files at a time are fastest."""
    results: list[Encoded | BadImageError] = []
    decoded = _decode_together(files, spec.max_resolution)
    for data, image_id, rgb in zip(files, image_ids, decoded, strict=True):
        try:
            results.append(encode_image(data, image_id, spec) if rgb is None else encode_pixels(rgb, image_id, spec))
        except BadImageError as error:
            results.append(error)
    return results


def encode_pixels(rgb: np.ndarray, image_id: str, spec: EncodeSpec) -> Encoded:
    """Turn an upright image, (H, W, 3) uint8 RGB, into a payload; a pure function of its arguments."""
    rgb = shrink(rgb, spec.max_resolution)
    encoding = choose_encoding(spec, image_id, rgb.nbytes)
    if encoding == "jpg":
        payload = encode_jpeg(rgb, spec.jpeg_quality, spec.subsampling, spec.restart)
    else:
        payload = _npy_header(rgb.shape) + rgb.tobytes()
    return Encoded(payload, encoding, rgb.shape[0], rgb.shape[1], channel_sums(rgb), image_hash(rgb))


def decode_upright(data: bytes) -> np.ndarray:
    """Decode a JPEG file to (H, W, 3) uint8 RGB, turned as its EXIF data say. Raises BadImageError."""
    rgb = decode_strictly(data)
    orientation = exif_orientation(data)
    return rgb if orientation == 1 else turn_upright(rgb, orientation)


def decode_strictly(data: bytes) -> np.ndarray:
    """Decode a JPEG file to (H, W, 3) uint8 RGB, without turning it.

    Raises BadImageError for everything that libjpeg-turbo warns about: truncated data, a missing end, codes that do not
    exist, surplus bytes in the scan. No decoder can see damage that leaves a valid stream: in 180 tries each on real
    files, libjpeg-turbo saw 88 % of the cases with 512 zeroed bytes, and 29 % of those with one changed byte.
    Greyscale becomes three equal channels, CMYK is converted (`cmyk_to_rgb`), and bytes behind the end of the image are
    ignored.
    """
    if data[:2] != JPEG:
        raise BadImageError("is empty" if not data else "is not a JPEG file, whatever its name says")
    try:
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(data)
        height, width = int(height), int(width)
        if height * width > MOST_PIXELS:
            raise BadImageError(
                f"claims {width} × {height} px, above the limit of {MOST_PIXELS // 1_000_000} megapixels"
            )
        if colourspace not in ("CMYK", "YCCK"):
            return simplejpeg.decode_jpeg(data, "RGB", strict=True)
        ink = simplejpeg.decode_jpeg(data, "CMYK", strict=True)
    except ValueError as error:
        raise BadImageError(f"is damaged ({error})") from None
    from PIL import Image as Pillow

    with Pillow.open(io.BytesIO(data), formats=["JPEG"]) as image:
        profile = image.info.get("icc_profile")

    def rgb(top: int, bottom: int) -> np.ndarray:
        return cmyk_to_rgb(Pillow.fromarray(255 - ink[top:bottom], "CMYK"), profile)  # 255 is no ink, as in Adobe's

    return by_rows(height, width, rgb)


def by_rows(height: int, width: int, rgb: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """(H, W, 3) uint8 of what `rgb` gives for the rows from `top` to `bottom`: few at a time, as Pillow needs 4 bytes a
    pixel and each of its conversions is a copy."""
    pixels, rows = np.empty((height, width, 3), np.uint8), max(1, _AT_ONCE // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = rgb(top, bottom)
    return pixels


def cmyk_to_rgb(image: "Image", profile: bytes | None) -> np.ndarray:
    """(H, W, 3) uint8 sRGB of a picture in CMYK: by its ICC profile, or as (1 - ink)(1 - black) without one.

    Raises BadImageError for a profile that is damaged or not one of CMYK.
    """
    if profile is None:
        return np.array(image.convert("RGB"))
    from PIL import ImageCms

    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        return np.array(ImageCms.profileToProfile(image, source, target, outputMode="RGB"))
    except (ImageCms.PyCMSError, OSError) as error:
        raise BadImageError(f"has a colour profile that cannot be used ({error}); convert it to RGB") from None


def _decode_together(files: Sequence[bytes], max_resolution: int) -> list[np.ndarray | None]:
    """The upright pixels of those files that the compiled library decodes, to the bit those of `decode_upright`.

    Images that are to have two thirds of their size, for `max_resolution`, have it already. None: the library declines
    the file, because it is damaged or not of the usual kind, or there is no second one of its size and sampling.
    """
    images: list[np.ndarray | None] = [None] * len(files)
    library = _vectorised()
    if library is None:
        return images
    alike: dict[bytes, list[int]] = {}
    for number, data in enumerate(files):
        frame = _plain_frame(data)
        if frame is not None:
            alike.setdefault(frame, []).append(number)
    for frame, numbers in alike.items():
        height, width = struct.unpack_from(">HH", frame, 1)
        if len(numbers) < 2 or TOGETHER * height * width > MOST_PIXELS:
            continue
        for start in range(0, len(numbers), TOGETHER):
            some = numbers[start : start + TOGETHER]
            decoded = _decode_alike(library, [files[number] for number in some], height, width, max_resolution)
            for number, image in zip(some, decoded, strict=True):
                images[number] = image
    return images


def _decode_alike(
    library: ctypes.CDLL, files: list[bytes], height: int, width: int, max_resolution: int
) -> Sequence[np.ndarray | None]:
    """Decode up to TOGETHER files of (height, width) px: all of them or, if the library declines one, none."""
    count, longest = len(files), max(map(len, files))
    reduced = 3 * max_resolution == 2 * max(height, width) and height % 3 == 0 and width % 3 == 0
    shape = (height // 3 * 2, width // 3 * 2, 3) if reduced else (height, width, 3)
    size = shape[0] * shape[1] * 3
    images = [np.empty(size + _ROW_SLACK, np.uint8) for _ in files]
    scratch = np.empty(library.dermscale_files_scratch(longest, width), np.uint8)
    declined = library.dermscale_decode_files(
        (ctypes.c_char_p * count)(*files),
        (ctypes.c_int64 * count)(*map(len, files)),
        *(count, height, width, reduced, scratch.ctypes.data, scratch.size),
        (ctypes.c_void_p * count)(*(image.ctypes.data for image in images)),
        library.dermscale_decode_level(),
    )
    return [None] * count if declined else [image[:size].reshape(shape) for image in images]


def _plain_frame(data: bytes) -> bytes | None:
    """The frame header (SOF0) of an image that is upright; None without one. Images with the same are decoded alike."""
    for marker, start, end in _segments(data):
        if marker == 0xC0 and end == start + 15 <= len(data):
            try:
                return data[start:end] if exif_orientation(data) == 1 else None
            except BadImageError:
                return None
    return None


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the contents of each segment of a JPEG file that is before the scan."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        if data[position + 1] == 0xFF:  # a fill byte
            position += 1
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        yield data[position + 1], position + 4, end
        position = end


def exif_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG file, 1 to 8; 1 without EXIF or with a value outside. Raises BadImageError."""
    for marker, start, end in _segments(data):
        if marker == 0xE1 and data[start : start + 6] == b"Exif\0\0":
            return _read_exif(data[start:end])
    return 1


def _read_exif(segment: bytes) -> int:
    """The orientation in an APP1 segment of EXIF data, from the table of its first directory (TIFF 6.0, section 2).

    Pillow is no help here: it silently skips an entry beyond the segment, and all entries after it.
    """
    while segment.startswith(b"Exif\0\0"):
        segment = segment[6:]
    if not segment:
        return 1
    order = {b"II": "<", b"MM": ">"}.get(segment[:2])
    try:
        if order is None or 42 not in struct.unpack_from("<H", segment, 2) + struct.unpack_from(">H", segment, 2):
            raise ValueError("no TIFF header")
        (start,) = struct.unpack_from(f"{order}L", segment, 4)
        (entries,) = struct.unpack_from(f"{order}H", segment, start)
        table = segment[start + 2 : start + 2 + 12 * entries]
        if len(table) < 12 * entries:
            raise ValueError(f"{entries} entries, and room for {len(table) // 12}")
        for tag, kind, count, value in struct.iter_unpack(f"{order}HHL4s", table):
            if tag == 0x0112 and kind in _INTEGERS and count:
                # If the values do not fit, `value` is an offset and not an orientation.
                if count * struct.calcsize(order + _INTEGERS[kind]) > len(value):
                    raise ValueError(f"{count} orientations")
                (orientation,) = struct.unpack_from(order + _INTEGERS[kind], value)
                return orientation if 1 <= orientation <= 8 else 1
    except (ValueError, struct.error) as error:
        raise BadImageError(f"has damaged EXIF data ({error}), so its orientation is unknown") from None
    return 1


def turn_upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (2 to 8; Exif 2.3, tag 0x0112) of an (H, W, 3) image."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def shrink(image: np.ndarray, max_resolution: int) -> np.ndarray:
    """Reduce (H, W, 3) uint8 so that the longer side is `max_resolution` px; smaller images stay as they are.

    As FFCV does (`fields/rgb_image.py`), except that the shorter side is rounded, not truncated, and at least 1 px.
    """
    height, width = image.shape[:2]
    longer = max(height, width)
    if longer <= max_resolution:
        return image
    target = [max(1, (2 * side * max_resolution + longer) // (2 * longer)) for side in (height, width)]
    return area_shrink(image, target[0], target[1])


def area_shrink(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area interpolation of (H, W, 3) uint8 to (height, width, 3): each pixel is the mean of the area that it covers.

    HAM10000's 600×450 → 400×300 makes 2 pixels of every 3. For ratios of n to n + 1, each result mixes two neighbours
    with one of n pairs of weights: n weighted sums of every (n + 1)th row. That takes 0.33 ms (0.14 in the compiled
    kernel for 2 of 3), OpenCV's INTER_AREA 1.17 ms; the results differ by at most 1 of 255. OpenCV does other ratios.
    """
    if not (_two_taps(image.shape[0], height) and _two_taps(image.shape[1], width)):
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    library = _vectorised()
    if library is not None and 3 * height == 2 * image.shape[0] and 3 * width == 2 * image.shape[1]:
        return _two_thirds(library, np.ascontiguousarray(image))
    return cv2.transpose(_shrink_rows(cv2.transpose(_shrink_rows(image, height)), width))


def _vectorised() -> ctypes.CDLL | None:
    """The compiled kernels, if the processor has AVX2, which this module's kernels need."""
    library = compiled()
    return library if library is not None and library.dermscale_resample_level() else None


def _two_thirds(library: ctypes.CDLL, image: np.ndarray) -> np.ndarray:
    """Two of every three pixels in both directions, by the compiled kernel: the same values."""
    height, width = image.shape[:2]
    out = np.empty((height // 3 * 2, width // 3 * 2, 3), np.uint8)
    scratch = np.empty(width * 3 + 16, np.uint8)
    library.dermscale_two_thirds(image.ctypes.data, height, width, out.ctypes.data, scratch.ctypes.data)
    return out


def _two_taps(source: int, target: int) -> bool:
    """Whether `target` pixels are n of every n + 1 `source` pixels for a small n, or all of them."""
    step = source - target
    return step == 0 or (step > 0 and target % step == 0 and 2 <= target // step <= _FEW_PHASES)


def _shrink_rows(image: np.ndarray, target: int) -> np.ndarray:
    """Make `target` rows, n of every n + 1. Row i of a group covers rows i and i + 1 by n − i and i + 1 parts."""
    if target == image.shape[0]:
        return image
    n = target // (image.shape[0] - target)
    out = np.empty((target, *image.shape[1:]), np.uint8)
    for i in range(n):
        upper, lower = image[i :: n + 1], image[i + 1 :: n + 1]
        cv2.addWeighted(upper, (n - i) / (n + 1), lower, (i + 1) / (n + 1), 0.0, dst=out[i::n])
    return out


def choose_encoding(spec: EncodeSpec, image_id: str, raw_bytes: int) -> str:
    """`jpg` or `raw`, by FFCV's write modes. `proportion` depends on a hash of the image_id alone."""
    if spec.write_mode == "proportion":
        draw = xxhash.xxh3_64_intdigest(f"proportion/{image_id}".encode()) / 2**64
        return "jpg" if draw < spec.compress_probability else "raw"
    if spec.write_mode == "smart":
        return "jpg" if raw_bytes > spec.smart_threshold else "raw"
    return spec.write_mode


def channel_sums(image: np.ndarray) -> tuple[int, int, int, int, int, int]:
    """Exact sums and sums of squares of the three channels of (H, W, 3) uint8.

    0.03 ms at 400×300 compiled, else 0.07: the fastest exact way found (histograms take 0.18). OpenCV may square a
    square root to get L2SQR, so the result is rounded. That is exact below 2⁵¹, a hundred times the largest image's.
    """
    library = _vectorised()
    if library is not None:
        image, sums = np.ascontiguousarray(image), np.empty(6, np.int64)
        library.dermscale_channel_sums(image.ctypes.data, image.size // 3, sums.ctypes.data)
        red, green, blue, *rest = sums.tolist()
    else:
        squares = (cv2.norm(channel, cv2.NORM_L2SQR) for channel in cv2.split(image))
        red, green, blue, *rest = (round(value) for value in (*cv2.sumElems(image)[:3], *squares))
    return red, green, blue, rest[0], rest[1], rest[2]


@cache
def _npy_header(shape: tuple[int, int, int]) -> bytes:
    """The header of a `.npy` file (format 1.0) of uint8 in C order."""
    import io

    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()
