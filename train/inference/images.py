"""Image files of any origin → upright RGB pixels, or the reason why a file is refused."""

import io
import struct
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shards.common.errors import one_line
from shards.encode import MOST_PIXELS, BadImageError, decode_upright, turn_upright
from shards.jpeg import has_restart_table

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".avif", ".heic", ".heif")
"""Endings of the files that are taken from a folder. Of a file that is named itself, only the content counts."""

MOST_BYTES = 3 * MOST_PIXELS
"""A larger file is refused unread: no image of MOST_PIXELS needs more."""

_LIMIT = f"{MOST_PIXELS // 1_000_000} megapixels"
_FORMATS = ("PNG", "TIFF", "BMP", "WEBP")  # JPEG goes through the packer's own decoder
_NEWER = {"AVIF": "pip install 'pillow>=11.3'", "HEIF": "pip install 'dermscale[heif]'"}
"""Formats that Pillow may not read here, and what helps. Files of both begin with a `ftyp` box (ISO/IEC 14496-12)."""
_ORIENTATION = 0x0112
_DAMAGE = (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, RuntimeError, EOFError, TypeError)


@dataclass(frozen=True, slots=True)
class Picture:
    """pixels: (H, W, 3) uint8 RGB, upright. packed: the file is from a shard set, so it need not be packed again."""

    pixels: np.ndarray
    packed: bool = False


def find_images(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """The files in `paths`, in order. A folder stands for the files in it and below it, sorted by name.

    Returns (images, left out). From a folder, files with one of SUFFIXES are taken; all others are left out, and hidden
    ones are not listed. Links to folders are followed, except to a folder that the link is in. Every path that is not a
    folder is taken, even if it does not exist, and so is a folder that cannot be read: `read_image` gives the reason.
    """
    images: list[Path] = []
    left_out: list[Path] = []
    for path in paths:
        waiting: list[tuple[Path, frozenset[tuple[int, int]]]] = [(path, frozenset())]  # with the folders around it
        while waiting:
            entry, around = waiting.pop()
            try:
                if not entry.is_dir():
                    (images if entry is path or entry.suffix.lower() in SUFFIXES else left_out).append(entry)
                    continue
                status, inside = entry.stat(), sorted(entry.iterdir(), reverse=True)
                if entry is path:
                    above = [one.stat() for one in entry.resolve().parents]
                    around = frozenset((one.st_dev, one.st_ino) for one in above)
            except OSError:
                images.append(entry)
                continue
            folder = status.st_dev, status.st_ino
            if folder not in around:
                waiting += [(one, around | {folder}) for one in inside if not one.name.startswith(".")]
    return images, left_out


def read_image(path: Path) -> Picture:
    """Read one file. Raises BadImageError with the reason if anything is wrong with it."""
    try:
        if not path.exists():
            raise BadImageError("does not exist")
        if path.is_dir():
            raise BadImageError("is a folder that cannot be read; check its permissions")
        if not path.is_file():
            raise BadImageError("is not a file")
        if (size := path.stat().st_size) > MOST_BYTES:
            raise BadImageError(f"has {size // 1_000_000} MB, above the limit of {MOST_BYTES // 1_000_000}")
        data = path.read_bytes()
    except OSError as error:
        raise BadImageError(f"cannot be read ({error.strerror})") from None
    return open_image(data)


def open_image(data: bytes) -> Picture:
    """Decode the bytes of a JPEG, PNG, TIFF, BMP, WebP, AVIF or HEIC file. Raises BadImageError with the reason.

    JPEG goes through the packer's strict decoder. EXIF orientations are applied. Grey becomes three equal channels, and
    16-bit values keep their upper eight bits. CMYK, Lab, 32-bit and floating-point pixels, transparency and files with
    several images are refused, because the file does not define their RGB colours. So are AVIF and HEIC if what reads
    them is not installed.
    """
    if data[:2] == b"\xff\xd8":
        return Picture(decode_upright(data), has_restart_table(data))
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise BadImageError("is empty")
    try:
        with Image.open(io.BytesIO(data), formats=_newer_formats() if data[4:8] == b"ftyp" else _FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise BadImageError(f"claims {width} × {height} px, above the limit of {_LIMIT}")
            if (frames := getattr(image, "n_frames", 1)) > 1:
                raise BadImageError(f"holds {frames} images; save one of them as a file of its own")
            image.load()
            pixels = _to_rgb(image)
            orientation = image.getexif().get(_ORIENTATION, 1)
    except UnidentifiedImageError:
        raise BadImageError(_why_unknown(data)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImageError(f"claims a size far above the limit of {_LIMIT}") from None
    except (*_DAMAGE, struct.error, zlib.error) as error:
        raise BadImageError(f"is damaged ({one_line(error, 160)})") from None
    turned = isinstance(orientation, int) and 2 <= orientation <= 8
    return Picture(turn_upright(pixels, orientation) if turned else pixels)


@cache
def _newer_formats() -> tuple[str, ...]:
    """Those of _NEWER that can be read here."""
    formats = []
    with suppress(ImportError):
        from PIL import AvifImagePlugin

        formats += ["AVIF"] if AvifImagePlugin.SUPPORTED else []
    with suppress(ImportError):
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]

        register_heif_opener()
        formats += ["HEIF"]
    return tuple(formats)


def _why_unknown(data: bytes) -> str:
    """Why Pillow does not know a file."""
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    kind = "AVIF" if brand[:3] == b"avi" else "HEIF" if brand[:2] == b"he" or brand in (b"mif1", b"msf1") else ""
    if not kind:
        return f"is not an image of a known format (JPEG, {', '.join((*_FORMATS, *_NEWER))})"
    if kind in _newer_formats():
        return f"is damaged, or its kind of {kind} cannot be read"
    return f"is a file of the format {kind}, which cannot be read here; install what reads it: {_NEWER[kind]}"


def _to_rgb(image: "Image") -> np.ndarray:
    """(H, W, 3) uint8 of a loaded image. Raises BadImageError for pixels without a defined RGB colour."""
    mode = image.mode
    if mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif ("transparency" in image.info and mode in ("1", "L", "RGB")) or mode == "LA":
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        if image.getchannel("A").getextrema()[0] != 255:
            raise BadImageError("has transparent parts; save it without transparency")
        image = image.convert("RGB")
    if image.mode in ("RGB", "L", "1", "YCbCr"):
        return np.array(image.convert("RGB"))
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    names = {"CMYK": "CMYK", "LAB": "Lab", "I": "32-bit", "F": "floating-point"}
    raise BadImageError(f"has {names.get(mode, mode)} pixels; convert it to 8-bit RGB")
