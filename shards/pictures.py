"""Image files of any usual format → upright RGB pixels, or the reason why a file is refused.

JPEG goes through the strict decoder of `shards/encode.py`, everything else through Pillow.
"""

import io
import struct
import zlib
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from shards.common.errors import one_line
from shards.encode import JPEG, MOST_PIXELS, BadImageError, by_rows, cmyk_to_rgb, decode_upright, turn_upright

if TYPE_CHECKING:
    from PIL.Image import Image

_LIMIT = f"{MOST_PIXELS // 1_000_000} megapixels"
_FORMATS = ("PNG", "TIFF", "BMP", "WEBP")  # JPEG goes through the packer's own decoder
_NEWER = {"AVIF": "pip install 'pillow>=11.3'", "HEIF": "pip install 'dermscale[heif]'"}
"""Formats that Pillow may not read here, and what helps. Files of both begin with a `ftyp` box (ISO/IEC 14496-12)."""
_ORIENTATION = 0x0112
_DAMAGE = (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, RuntimeError, EOFError, TypeError)


def decode_picture(data: bytes) -> np.ndarray:
    """Decode the bytes of a JPEG, PNG, TIFF, BMP, WebP, AVIF or HEIC file to upright (H, W, 3) uint8 RGB.

    Raises BadImageError with the reason.

    JPEG goes through the packer's strict decoder. EXIF orientations are applied. Grey becomes three equal channels, and
    16-bit values keep their upper eight bits. CMYK is converted (`encode.cmyk_to_rgb`), and an alpha channel that is
    opaque everywhere is dropped. Lab, 32-bit and floating-point pixels, transparency and files with several images are
    refused, because the file does not define their RGB colours. So are AVIF and HEIC if what reads them is not
    installed.
    """
    if data[:2] == JPEG:
        return decode_upright(data)
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
    return turn_upright(pixels, orientation) if turned else pixels


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
    width, height = image.size
    return by_rows(height, width, lambda top, bottom: _rgb_of(image.crop((0, top, width, bottom))))


def _rgb_of(image: "Image") -> np.ndarray:
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
        return np.asarray(image.convert("RGB"))
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "CMYK":
        return cmyk_to_rgb(image, image.info.get("icc_profile"))
    names = {"LAB": "Lab", "I": "32-bit", "F": "floating-point"}
    raise BadImageError(f"has {names.get(mode, mode)} pixels; convert it to 8-bit RGB")
