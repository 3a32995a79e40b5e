"""The images of a benchmark: the job that every system gets, and the data set on disk that each system reads.

Every format of one job holds the same pixels: the originals, reduced by area interpolation to the packed size. JPEG
files have quality 90 and 4:2:0 chroma. `SOURCE` and `ORIGINALS` are links to the original files. A system brings the
writer of its own format (`benchmarks/peers`); this file has those that several systems share, and keeps what was made.
"""

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from preprocess.ham10000 import METADATA, read_source
from preprocess.records import COLUMNS, Record
from shards.common.errors import DataError
from shards.format import HAM10000

QUALITY = 90
"""JPEG quality of everything that is packed."""


@dataclass(frozen=True)
class Job:
    """The work that every system of a comparison gets.

    source: HAM10000-shaped folder of originals. cache: folder for the prepared data sets. packed_px: longer side of
    the packed images. resolution_px: side of the images that a loader gives. workers: threads or processes. copies:
    how many times each original stands in the data set, under different names, so that an epoch is long enough to
    time. most: number of originals that are used, the first ones by name. samples: number of copies that are used, the
    first ones; None for all. `sized` sets the last three.
    """

    source: Path
    cache: Path
    packed_px: int = 341
    resolution_px: int = 224
    batch_size: int = 64
    workers: int = 2
    copies: int = 8
    most: int | None = None
    samples: int | None = None


@dataclass(frozen=True)
class Format:
    """A way to keep the images on disk.

    name: of its folder in the cache. write: writes a job's images into an empty folder. depends_on: the fields of the
    job, beside the choice of images, that change what is written.
    """

    name: str
    write: Callable[[Job, Path], None]
    depends_on: tuple[str, ...] = ("packed_px",)


def prepared(kind: Format, job: Job) -> Path:
    """The folder with a job's images in this format, written now if it is not there.

    Raises DataError where the source is not a HAM10000-shaped folder.
    """
    name = "-".join([kind.name, *(str(getattr(job, field)) for field in kind.depends_on)])
    folder = job.cache / _key(job) / name
    if folder.exists():
        return folder
    partial = folder.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        kind.write(job, partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _key(job: Job) -> str:
    """The name of a choice of images: other files or another number of samples give another one."""
    import xxhash

    files = "\n".join(f"{path.name} {path.stat().st_size}" for path, _, _ in originals(job))
    return f"{xxhash.xxh3_64_hexdigest(files.encode())[:8]}-{len(samples(job))}"


def sized(job: Job, count: int, *, whole_batches: bool = False) -> Job:
    """The same job with about `count` samples: copies of the originals, or a part of them.

    whole_batches: choose a number that gives every worker the same number of whole batches, at least one. Loaders drop
    an incomplete batch, some before they decode it and some after, some once per worker; and some give no batch at all
    where a worker has none. Raises DataError where the source is not a HAM10000-shaped folder.
    """
    found = len(originals(replace(job, most=None)))
    copies, batches = max(1, count // found), job.batch_size * job.workers
    if not whole_batches:
        return replace(job, copies=copies, most=count, samples=None)
    once = min(found, count)
    copies = max(copies, math.ceil(batches / once))
    return replace(job, copies=copies, most=count, samples=once * copies // batches * batches)


def described(job: Job) -> str:
    """What a job reads, in words: `312 images of originals, 8 times each`, and how many of these samples it uses."""
    count, whole = len(originals(job)), len(samples(job))
    times = f", {job.copies} times each" if job.copies > 1 else ""
    fewer = f", the first {whole:,} samples" if whole < count * job.copies else ""
    return f"{count:,} images of {job.source.resolve().name}{times}{fewer}"


def originals_in(source: Path) -> Path:
    """The folder of originals: the source itself, or the folder `originals` in it."""
    inner = source / "originals"
    return inner if inner.is_dir() else source


@cache
def originals(job: Job) -> list[tuple[Path, int, Record]]:
    """The usable originals of the source: path, label, and record, sorted by name. Raises DataError.

    Read once per process, so that no timed round has to look for files.
    """
    records = sorted(read_source(job.source).records, key=lambda record: record.image_id)[: job.most]
    return [(job.source / record.file, HAM10000.names.index(record.dx), record) for record in records]


def samples(job: Job) -> list[tuple[str, Path, int]]:
    """Every sample: its name, the original that it is a copy of, and its label."""
    of_all = originals(job)
    found = [(f"{path.stem}c{copy}", path, label) for copy in range(job.copies) for path, label, _ in of_all]
    return found[: job.samples]


def packed_pixels(path: Path, packed_px: int) -> np.ndarray:
    """An original reduced to the packed size: (H, W, 3) uint8 RGB."""
    import cv2

    from shards.encode import shrink

    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    if image is None:
        raise DataError(f"{path}: cannot be decoded")
    return shrink(image, packed_px)


def packed_size(height: int, width: int, packed_px: int) -> tuple[int, int]:
    """Height and width after reduction of the longer side to `packed_px`, the shorter one rounded."""
    longer = max(height, width)
    if longer <= packed_px:
        return height, width
    return round(height * packed_px / longer), round(width * packed_px / longer)


# ------------------------------------------------------------------ formats that several systems read


def _write_source(job: Job, folder: Path) -> None:
    """A HAM10000-shaped folder in which every original stands under several names, as links."""
    images = folder / "HAM10000_images_part_1"
    images.mkdir()
    records = {path: record for path, _, record in originals(job)}
    rows = []
    for name, path, _ in samples(job):
        (images / f"{name}.jpg").symlink_to(path.resolve())
        lesion = f"{records[path].lesion_id}c{name.rpartition('c')[2]}"
        of_source = {key: getattr(records[path], key) for key in (*COLUMNS, "dataset")}
        rows.append(of_source | {"image_id": name, "lesion_id": lesion})
    with (folder / METADATA[0]).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_originals(job: Job, folder: Path) -> None:
    """A folder per class with links to the originals, as torchvision's ImageFolder expects it."""
    for name, path, label in samples(job):
        (folder / HAM10000.names[label]).mkdir(exist_ok=True)
        (folder / HAM10000.names[label] / f"{name}.jpg").symlink_to(path.resolve())


def _write_packed(job: Job, folder: Path) -> None:
    """A folder per class of packed JPEG files, and stats.json with their size and channel means (RGB, 0 to 255)."""
    import cv2

    totals, sizes = np.zeros(3), set()
    known: dict[tuple[Path, int], list[str]] = {}
    for name, path, label in samples(job):
        known.setdefault((path, label), []).append(name)
    for (path, label), copies in known.items():
        pixels = packed_pixels(path, job.packed_px)
        totals += pixels.reshape(-1, 3).mean(axis=0)
        sizes.add(pixels.shape[1::-1])
        options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
        done, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)
        if not done:
            raise DataError(f"{path}: cannot be encoded")
        home = folder / HAM10000.names[label]
        home.mkdir(exist_ok=True)
        for name in copies:
            (home / f"{name}.jpg").write_bytes(data.tobytes())
    stats = {"mean": (totals / len(known)).tolist(), "sizes": sorted(f"{w}x{h}" for w, h in sizes)}
    (folder / "stats.json").write_text(json.dumps(stats), encoding="utf-8")


SOURCE = Format("source", _write_source, depends_on=())
ORIGINALS = Format("originals", _write_originals, depends_on=())
PACKED = Format("packed", _write_packed)


def packed_files(job: Job, kind: Format = PACKED) -> list[tuple[Path, int]]:
    """The packed JPEG files with their labels, in the order of `samples`. kind: a format with a folder per class."""
    folder = prepared(kind, job)
    return [(folder / HAM10000.names[label] / f"{name}.jpg", label) for name, _, label in samples(job)]


def stats(job: Job) -> tuple[tuple[float, float, float], str]:
    """Channel means of the packed images (RGB, 0 to 255), and their size as text, `341x256`."""
    found = json.loads((prepared(PACKED, job) / "stats.json").read_text(encoding="utf-8"))
    return tuple(found["mean"]), ", ".join(found["sizes"])
