"""Image files of any origin → upright RGB pixels, or the reason why a file is refused."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.common.errors import DataError
from shards.encode import MOST_PIXELS, BadImageError
from shards.jpeg import has_restart_table
from shards.pictures import decode_picture
from shards.shardset import ShardSet

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".avif", ".heic", ".heif")
"""Endings of the files that are taken from a folder. Of a file that is named itself, only the content counts."""

MOST_BYTES = 3 * MOST_PIXELS
"""A larger file is refused unread: no image of MOST_PIXELS needs more."""


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


def images_of(data: ShardSet) -> tuple[list[Path], Callable[[Path], Picture]]:
    """The images of a shard set, each named by its image_id as a path, and what reads them in place of `read_image`."""
    samples = {Path(image_id): sample for sample, image_id in enumerate(data.column("image_id"))}

    def read(path: Path) -> Picture:
        try:
            return Picture(data.pixels(samples[path]), packed=True)
        except DataError as error:
            raise BadImageError(str(error)) from None

    return list(samples), read


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
    """Decode the bytes of an image file (`shards/pictures.py`). Raises BadImageError with the reason."""
    return Picture(decode_picture(data), has_restart_table(data))
