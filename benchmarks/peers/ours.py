"""This project's loader with each of its engines; and ceilings, which do one part of the work without a loader."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.datasets import PACKED, QUALITY, SOURCE, Format, Job, packed_files, prepared, samples
from benchmarks.peers.system import Batch, Epoch, System
from benchmarks.worker import run_module

if TYPE_CHECKING:
    import torch

    from shards import Loader, ShardSet
    from shards.shardset import Selection


def shard_set(name: str, write_mode: str, split: str = "100/0/0") -> Format:
    """This project's own format in the folder `set`, written by its own command. split: as `preprocess.shard` takes
    it."""

    def write(job: Job, folder: Path) -> None:
        options = {"--source": prepared(SOURCE, job), "--out": folder / "set", "--write-mode": write_mode}
        options |= {"--split": split, "--max-resolution": job.packed_px, "--jpeg-quality": QUALITY}
        run_module("preprocess.shard", options)

    return Format(name, write)


SHARDS_JPG, SHARDS_RAW = shard_set("shards-jpg", "jpg"), shard_set("shards-raw", "raw")
SHARDS_SPLIT = shard_set("shards-split", "jpg", "70/10/20")
"""For whole runs, which evaluate too."""


def _write_payloads(job: Job, folder: Path) -> None:
    """A folder per class with the JPEG files that `SHARDS_JPG` holds, byte by byte."""
    from shards import ShardSet

    with ShardSet(prepared(SHARDS_JPG, job) / "set") as data:
        for row, (name, dx) in enumerate(zip(data.column("image_id"), data.column("dx"), strict=True)):
            (folder / dx).mkdir(exist_ok=True)
            (folder / dx / f"{name}.jpg").write_bytes(data.read(row))


PAYLOADS = Format("payloads", _write_payloads)


def loader_of(
    data: "ShardSet",
    job: Job,
    engine: str,
    device: "str | torch.device",
    threads: int | None = None,
    selection: "Selection | None" = None,
    window: int | None = None,
) -> "Loader":
    """This project's loader of training batches. threads: default, one per worker. selection: default, the training
    split. window: as `Loader` takes it."""
    from shards import Loader

    return Loader(
        selection or data.select("train"),
        batch_size=job.batch_size,
        resolution=job.resolution_px,
        train=True,
        seed=0,
        engine=engine,
        device=device,
        threads=threads or job.workers,
        window=window,
    )


class Epochs:
    """A loader's epochs, one a call."""

    def __init__(self, loader: "Loader") -> None:
        self._loader = loader

    def __call__(self) -> Iterator[Batch]:
        """The next epoch."""
        from train import device as devices

        for batch in self._loader:
            yield batch.images, batch.labels
        devices.synchronize(self._loader.device)  # what was handed over may still be on its way to a GPU

    def skip(self) -> None:
        """Skip the next epoch: its first batches were prepared after the last one ended, outside the clock."""
        self._loader.set_epoch(self._loader.epoch + 1)


def _engine(name: str, format: Format, engine: str, threads: int | None = None, **about: Any) -> System:
    """This project's loader. threads: if not one per worker. about: the other fields of System."""
    device = "cuda" if about.get("on_gpu") else "cpu"

    def open_(job: Job, folder: Path) -> Epochs:
        from shards import ShardSet

        return Epochs(loader_of(ShardSet(folder / "set"), job, engine, device, threads))

    return System(name, format, open_, before=lambda epochs: epochs.skip, **about)


def _on_threads(job: Job, count: int, do: Callable[[int], Any]) -> Epoch:
    """Epochs that call `do` with each number below `count`; each worker is a thread with an equal part of them."""
    parts = [range(count * i // job.workers, count * (i + 1) // job.workers) for i in range(job.workers)]

    def part(numbers: range) -> None:
        for number in numbers:
            do(number)

    def epoch() -> Iterator[Batch]:
        with ThreadPoolExecutor(job.workers) as pool:
            list(pool.map(part, parts))
        yield range(count), None

    return epoch


def _decode_only(job: Job, folder: Path) -> Epoch:
    """`cv2.imdecode` of whole packed JPEG files that are in memory already."""
    import cv2

    cv2.setNumThreads(0)
    data = [np.frombuffer(path.read_bytes(), np.uint8) for path, _ in packed_files(job)]
    return _on_threads(job, len(data), lambda number: cv2.imdecode(data[number], cv2.IMREAD_COLOR_RGB))


def _copy_only(job: Job, folder: Path) -> Epoch:
    """Memory copies of finished images, (S, S, 3) uint8 each, as many as an epoch has, from more than caches hold."""
    side, count = job.resolution_px, len(samples(job))
    source = np.random.default_rng(0).integers(0, 256, (min(count, 1024), side, side, 3), np.uint8)
    out = np.empty((job.batch_size * 4, side, side, 3), np.uint8)
    return _on_threads(job, count, lambda number: np.copyto(out[number % len(out)], source[number % len(source)]))


_NATIVE_NOTE = (
    "decodes only the blocks that the crop shows where a restart table is packed; bilinear without antialias; all "
    "eight symmetries; plans the colour change too; verifies every payload's checksum"
)
OURS = (
    _engine("dermscale native jpg", SHARDS_JPG, "native", note=_NATIVE_NOTE),
    _engine("dermscale native raw", SHARDS_RAW, "native", encoding="raw"),
    _engine("dermscale native jpg, 1 thread", SHARDS_JPG, "native", 1),
    _engine("dermscale native raw, 1 thread", SHARDS_RAW, "native", 1, encoding="raw"),
    _engine("dermscale native jpg, 16 threads", SHARDS_JPG, "native", 16),
    _engine("dermscale native raw, 16 threads", SHARDS_RAW, "native", 16, encoding="raw"),
    _engine(
        "dermscale native proportion",
        shard_set("shards-proportion", "proportion"),
        "native",
        note="half of the images are JPEG, half raw",
        encoding="proportion",
    ),
    _engine(
        "dermscale dali jpg (on the CPU)",
        SHARDS_JPG,
        "dali",
        packages=("nvidia-dali-cuda120",),
        note="the GPU engine's graph, built for the CPU: the same batches as native",
    ),
    _engine(
        "dermscale resident (on the CPU)",
        SHARDS_JPG,
        "resident",
        note="for a GPU's memory; everything is decoded before the clock starts",
    ),
)

OURS_ON_GPU = (
    _engine(
        "dermscale native jpg, to the GPU",
        SHARDS_JPG,
        "native",
        note="decoded on the CPU, copied to the GPU a batch ahead",
        on_gpu=True,
    ),
    _engine("dermscale native raw, to the GPU", SHARDS_RAW, "native", encoding="raw", on_gpu=True),
    _engine(
        "dermscale dali jpg, on the GPU",
        SHARDS_JPG,
        "dali",
        packages=("nvidia-dali-cuda120",),
        note="decoded on the GPU, whole or cut as its self-check takes it, then sliced",
        on_gpu=True,
    ),
    _engine(
        "dermscale resident, on the GPU",
        SHARDS_JPG,
        "resident",
        note="decoded before the clock starts; cropped and resized on the GPU",
        on_gpu=True,
    ),
)
"""Measured where there is a GPU."""

CEILINGS = (
    System(
        "ceiling: decode only",
        PACKED,
        _decode_only,
        note="cv2.imdecode of the whole packed JPEG files, in memory; no crop, no resize",
        ceiling=True,
    ),
    System(
        "ceiling: memory copy only",
        PACKED,
        _copy_only,
        note="copies finished (S, S, 3) images",
        ceiling=True,
        encoding="none",
    ),
)
