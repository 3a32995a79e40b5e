"""The `pack` benchmark: how fast each writer packs, into how many bytes, and how much of the images it keeps."""

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.datasets import QUALITY, SOURCE, Job, originals, packed_size, prepared, samples
from benchmarks.measure import Measurement, Row, ratio_rows, series_rows
from benchmarks.options import ONLY, WORKERS, Settings, benchmark
from benchmarks.pages import Page, place
from benchmarks.peers.ffcv import beton_payload_bytes, read_beton, write_beton
from benchmarks.peers.system import need
from benchmarks.tables import pivot, ratios
from benchmarks.worker import Running, take_turns
from shards.common.errors import DataError

if TYPE_CHECKING:
    from preprocess.records import Source

_JUDGED = 64
"""Number of originals, the first ones by name, whose packed pixels are compared with the source."""

RATIOS = (
    ("dermscale jpg", "FFCV jpg"),
    ("dermscale raw", "FFCV raw"),
    ("dermscale proportion", "FFCV proportion"),
    ("dermscale smart", "FFCV smart"),
    ("dermscale jpg", "webdataset"),
    ("dermscale jpg", "ceiling: bare calls"),
)

METRICS = {
    "bytes_per_image": ("bytes", "payload bytes / image"),
    "file_bytes_per_image": ("bytes", "file bytes / image"),
    "psnr_source_db": ("dB", "PSNR to the source, dB"),
    "psnr_reduced_db": ("dB", "PSNR to the reduced source, dB"),
}
"""What is measured once per packer: metric → unit and title."""


@benchmark("pack", ONLY, WORKERS, rounds=(9, 6), seconds=(2, 0.5))
def command(settings: Settings) -> None:
    """Images per second, bytes and PSNR of writers, by write mode."""
    packers = settings.chosen(PACKERS)
    job = settings.job(400, 624, quick=312)
    with settings.measurement(job, len(packers) * (2 + settings.rounds)) as measurement:
        settings.publish(PAGE, measure_packing(packers, job, measurement))


# ------------------------------------------------------------------ the writers


@dataclass(frozen=True)
class Packer:
    """One way to pack.

    write: packs everything into a new folder. read: (job, folder) → name of the original and packed pixels (H, W, 3)
    uint8, one image after the other. payload_bytes: of all encoded images of a folder. Both None for a ceiling, which
    writes nothing.
    """

    name: str
    write: Callable[[Job, Path], None]
    read: Callable[[Job, Path], Iterator[tuple[str, np.ndarray]]] | None = None
    payload_bytes: Callable[[Path], int] | None = None
    encoding: str = "jpg"
    packages: tuple[str, ...] = ()
    note: str = ""


@cache
def _source(job: Job) -> "Source":
    """The samples as our packer takes them. Read once per process: FFCV's list of files is not timed either."""
    from preprocess.ham10000 import read_source

    return read_source(prepared(SOURCE, job))


def _ours(name: str, write_mode: str, note: str = "", restart: bool = True) -> Packer:
    def write(job: Job, folder: Path) -> None:
        from preprocess.packing import Settings, pack
        from shards.format import EncodeSpec

        spec = EncodeSpec(write_mode=write_mode, max_resolution=job.packed_px, jpeg_quality=QUALITY, restart=restart)
        settings = Settings(encode=spec, ratio=(100, 0, 0), workers=job.workers)
        pack(replace(_source(job)), folder / "set", settings)  # packing takes the records out

    return Packer(name, write, _read_ours, _bytes_ours, write_mode, note=note)


def _read_ours(job: Job, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    from shards import ShardSet

    data = ShardSet(folder / "set")
    for row, image_id in enumerate(data.column("image_id")):
        yield image_id.rpartition("c")[0], data.pixels(row)


def _bytes_ours(folder: Path) -> int:
    from shards import ShardSet

    return int(ShardSet(folder / "set").column("length").sum())


def _ffcv(write_mode: str, note: str = "") -> Packer:
    def write(job: Job, folder: Path) -> None:
        write_beton(job, folder, write_mode)

    return Packer(f"FFCV {write_mode}", write, _read_ffcv, beton_payload_bytes, write_mode, ("ffcv",), note)


def _read_ffcv(job: Job, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    for (_, path, _), pixels in zip(samples(job), read_beton(folder), strict=True):
        yield path.stem, pixels


def _write_tars(job: Job, folder: Path) -> None:
    """The loop that users of webdataset write: Pillow decodes, reduces and encodes, ShardWriter stores; one process."""
    import io

    from PIL import Image
    from webdataset.writer import ShardWriter

    with ShardWriter(f"file:{folder}/%05d.tar", maxsize=64 << 20, verbose=0) as sink:
        for name, path, label in samples(job):
            with Image.open(path) as image:
                height, width = packed_size(image.height, image.width, job.packed_px)
                small = image.convert("RGB").resize((width, height), Image.Resampling.BOX)
            out = io.BytesIO()
            small.save(out, "JPEG", quality=QUALITY)
            sink.write({"__key__": name, "jpg": out.getvalue(), "cls": str(label)})


def _jpegs(folder: Path) -> Iterator[tuple[str, bytes]]:
    import tarfile

    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.name.endswith(".jpg") else None
                if content is not None:
                    yield Path(member.name).stem.rpartition("c")[0], content.read()


def _bytes_tars(folder: Path) -> int:
    return sum(len(content) for _, content in _jpegs(folder))


def _read_tars(job: Job, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    import cv2

    for name, content in _jpegs(folder):
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is None:
            raise DataError(f"{name}: the packed image does not decode")
        yield name, pixels


@cache
def _contents(job: Job) -> list[bytes]:
    """The files of all originals, in memory."""
    return [path.read_bytes() for _, path, _ in samples(job)]


def _bare_calls(job: Job, folder: Path) -> None:
    """Decode, reduce and encode all originals on one thread per worker, out of memory and into it."""
    import cv2
    import simplejpeg

    from shards.encode import shrink

    def encode(data: bytes) -> int:
        small = shrink(simplejpeg.decode_jpeg(data, "RGB"), job.packed_px)
        return len(simplejpeg.encode_jpeg(small, QUALITY, "RGB", "420"))

    cv2.setNumThreads(0)
    with ThreadPoolExecutor(job.workers) as pool:
        for size in pool.map(encode, _contents(job)):
            assert size > 0  # an encoder that gives nothing is fast


_OURS_NOTE = (
    "metadata read before the clock starts; decodes strictly, checks, indexes and hashes; files are flushed to the "
    "disk before it ends"
)
_FFCV_NOTE = (
    "one process per worker; not flushed to the disk; looks every 0.1 s whether it is done; its file has pages of "
    "8 MiB for every worker, not all full in a set this small"
)
_SMART_NOTE = "JPEG where the raw image is larger than 500,000 bytes: none of this size is"

PACKERS = {
    packer.name: packer
    for packer in (
        _ours("dermscale jpg", "jpg", note=_OURS_NOTE),
        _ours("dermscale jpg, no restart table", "jpg", restart=False),
        _ours("dermscale raw", "raw"),
        _ours("dermscale proportion", "proportion"),
        _ours("dermscale smart", "smart", note=_SMART_NOTE),
        _ffcv("jpg", _FFCV_NOTE),
        _ffcv("raw"),
        _ffcv("proportion"),
        _ffcv("smart"),
        Packer(
            "webdataset",
            _write_tars,
            _read_tars,
            _bytes_tars,
            packages=("webdataset",),
            note="its writer only stores: Pillow decodes, reduces (box filter) and encodes, all in one process",
        ),
        Packer(
            "ceiling: bare calls",
            _bare_calls,
            note="simplejpeg's decode and encode calls and this project's reduction on threads, from memory; nothing "
            "is checked or written",
        ),
    )
}
"""Every packer by its name, in the order of the table."""

# ------------------------------------------------------------------ the measurement


def psnr_db(squared_errors: Sequence[float]) -> float:
    """Peak signal-to-noise ratio in dB, on the scale 0 to 255, from the mean squared error of each image."""
    if not squared_errors:
        raise ValueError("no images to compare")
    mean = float(np.mean(squared_errors))
    return 10 * float(np.log10(255.0**2 / mean)) if mean else float("inf")


def judge(job: Job, packed: Iterator[tuple[str, np.ndarray]]) -> dict[str, float]:
    """How close the first packed images are to their originals, in dB: `psnr_source_db` and `psnr_reduced_db`.

    The first compares the original with the packed image, enlarged to its size (bilinear): all that was lost. The
    second compares with the original reduced to the packed size in floating point (area): the loss by encoding and
    rounding.
    """
    import cv2

    files = {path.stem: path for path, _, _ in originals(job)[:_JUDGED]}
    source_errors, reduced_errors = [], []
    for name, pixels in packed:
        path = files.pop(name, None)  # the first copy; packers write in different orders
        if path is None:
            continue
        image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        assert image is not None  # the packer has read it too
        original = image.astype(np.float32)
        enlarged = cv2.resize(pixels, original.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        reduced = cv2.resize(original, pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
        source_errors.append(np.square(original - enlarged, dtype=np.float64).mean())
        reduced_errors.append(np.square(reduced - pixels, dtype=np.float64).mean())
        if not files:
            break
    return {"psnr_source_db": psnr_db(source_errors), "psnr_reduced_db": psnr_db(reduced_errors)}


def set_up(name: str, job: Job) -> Running:
    """Pack once, measure the result, and get ready to pack again."""
    packer = PACKERS[name]
    need(packer.packages)
    home = job.cache / "packing" / name.replace(" ", "-").replace(":", "").replace(",", "")
    shutil.rmtree(home, ignore_errors=True)
    turn = itertools.count()

    def clean() -> None:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)

    def once() -> int:
        folder = home / str(next(turn))
        folder.mkdir()
        packer.write(job, folder)
        return count

    count = len(samples(job))
    clean()
    once()
    first = home / "0"
    about: dict[str, float] = {}
    if packer.read is not None and packer.payload_bytes is not None:
        size = sum(path.stat().st_size for path in first.rglob("*") if path.is_file())
        about = {"bytes_per_image": packer.payload_bytes(first) / count, "file_bytes_per_image": size / count}
        about |= judge(job, packer.read(job, first))
    return Running(once, clean, about=about)


def measure_packing(packers: Sequence[Packer], job: Job, measurement: Measurement) -> list[Row]:
    """Time the packers in turn: images/s, CPU seconds, bytes per image and two PSNRs of each."""
    known = {packer.name: packer for packer in packers}
    series, about = take_turns(set_up, list(known), job, job.cache / "logs", measurement)
    shutil.rmtree(job.cache / "packing", ignore_errors=True)
    height, width = _packed_size(job)

    def columns(name: str) -> dict[str, Any]:
        packed = f"{width}x{height} {known[name].encoding}"
        own = measurement.columns("pack", job, system=name, packed=packed, page_cache="warm")
        return own | {"resolution_px": None, "batch_size": None}

    rows: list[Row] = []
    for name, packer in known.items():
        noted: dict[str, Any] = columns(name) | {"note": packer.note}
        rows += series_rows(series[name], **noted)
        found = about.get(name)
        for metric, (unit, _) in METRICS.items():
            if found is None:  # it could not even be set up
                rows.append(Row(metric=metric, unit=unit, value=None, failed=series[name].failed, **noted))
            elif metric in found:
                rows.append(Row(metric=metric, unit=unit, value=found[metric], **noted))
    return rows + ratio_rows(RATIOS, series, columns)


def _packed_size(job: Job) -> tuple[int, int]:
    import cv2

    image = cv2.imread(str(originals(job)[0][0]), cv2.IMREAD_COLOR)
    assert image is not None  # `prepared` has decoded all originals
    return packed_size(image.shape[0], image.shape[1], job.packed_px)


def tables(rows: Sequence[Row]) -> list[str]:
    """What each packer reached, and the ratios of their speeds."""
    titles = {"img_per_s": "images/s", "cpu_s_per_1000": "CPU s / 1,000"}
    titles |= {metric: title for metric, (_, title) in METRICS.items()}
    return [f"Originals, {place(rows)}.\n", pivot(rows, titles), ratios(rows, "images/s")]


PAGE = Page("pack", "Packing", tables)
