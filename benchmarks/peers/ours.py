"""This project's engines, and the ceilings that no engine can pass: the bare calls, without a loader around them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.peers.system import Batch, Epoch, System, Work

if TYPE_CHECKING:
    from shards import Loader


class _Epochs:
    """A loader's epochs, one a call."""

    def __init__(self, loader: "Loader") -> None:
        self._loader = loader

    def __call__(self) -> Iterator[Batch]:
        from train import device as devices

        for batch in self._loader:
            yield batch.images, batch.labels
        devices.synchronize(self._loader.device)  # what was handed over may still be on its way to a GPU

    def skip(self) -> None:
        """Leave out the epoch whose first batches are under way since the last one ended: no clock saw them made."""
        self._loader.set_epoch(self._loader.epoch + 1)


def _engine(name: str, form: str, engine: str, threads: int | None = None, **about: Any) -> System:
    """This project's loader. threads: other than one per worker. about: the other fields of System."""
    device = "cuda" if about.get("on_gpu") else "cpu"

    def open_(work: Work, folder: Path) -> _Epochs:
        from shards import Loader, ShardSet

        return _Epochs(
            Loader(
                ShardSet(folder / "set").select("train"),
                batch_size=work.batch_size,
                resolution=work.resolution_px,
                train=True,
                seed=0,
                engine=engine,
                device=device,
                threads=threads or work.workers,
            )
        )

    return System(name, form, open_, before=lambda epochs: epochs.skip, **about)


def _on_threads(work: Work, count: int, do: Callable[[range], Any]) -> list[Any]:
    """Call `do` on one equal part of range(count) per worker, each on a thread of its own."""
    parts = [range(count * i // work.workers, count * (i + 1) // work.workers) for i in range(work.workers)]
    with ThreadPoolExecutor(work.workers) as pool:
        return list(pool.map(do, parts))


def _decode_only(work: Work, folder: Path) -> Epoch:
    """`cv2.imdecode` of whole packed JPEG files that are in memory already."""
    import cv2

    from benchmarks.datasets import packed_files

    cv2.setNumThreads(0)
    data = [np.frombuffer(path.read_bytes(), np.uint8) for path, _ in packed_files(work)]

    def part(numbers: range) -> None:
        for number in numbers:
            cv2.imdecode(data[number], cv2.IMREAD_COLOR_RGB)

    def epoch() -> Iterator[Batch]:
        _on_threads(work, len(data), part)
        yield data, None

    return epoch


def _bare_loop(work: Work, folder: Path) -> Epoch:
    """The calls of the native engine on each image, over an epoch that was planned and read before the clock starts."""
    import cv2
    import simplejpeg

    from shards import Loader, ShardSet
    from shards.decode import cached_pixels, raw_pixels
    from shards.engines.resample import Resampler
    from shards.jpeg import RegionCutter

    cv2.setNumThreads(0)
    data = ShardSet(folder / "set")
    train = data.select("train")
    order, plan = Loader(train, batch_size=work.batch_size, resolution=work.resolution_px, engine="native").plan()
    rows = train.samples[order]
    payloads = [data.read(int(row)) for row in rows]
    heights, widths = data.column("height")[rows].tolist(), data.column("width")[rows].tolist()
    raw = (data.column("encoding")[rows] == "raw").tolist()
    boxes, symmetries = plan.boxes[order].tolist(), plan.symmetry[order].tolist()
    side = work.resolution_px
    out = np.empty((work.batch_size, side, side, 3), np.uint8)

    def part(numbers: range) -> None:
        resample, cut, pixels = Resampler(side), RegionCutter(), cached_pixels(max(heights) * max(widths) * 3)
        for number in numbers:
            y, x, h, w = boxes[number]
            top = left = 0
            if raw[number]:
                image = raw_pixels(payloads[number], heights[number], widths[number])
            else:
                region = cut(payloads[number], heights[number], widths[number], y, x, h, w)
                encoded, top, left = region or (payloads[number], 0, 0)
                image = simplejpeg.decode_jpeg(encoded, buffer=pixels)
            crop = image[y - top : y - top + h, x - left : x - left + w]
            resample(crop, symmetries[number], out[number % len(out)])

    def epoch() -> Iterator[Batch]:
        _on_threads(work, len(rows), part)
        yield rows, None

    return epoch


def _copy_only(work: Work, folder: Path) -> Epoch:
    """Memory copies of finished images, (S, S, 3) uint8 each, as many as an epoch has, from more than caches hold."""
    from benchmarks.datasets import names

    side, count = work.resolution_px, len(names(work))
    source = np.random.default_rng(0).integers(0, 256, (min(count, 1024), side, side, 3), np.uint8)
    out = np.empty((work.batch_size * 4, side, side, 3), np.uint8)

    def part(numbers: range) -> None:
        for number in numbers:
            np.copyto(out[number % len(out)], source[number % len(source)])

    def epoch() -> Iterator[Batch]:
        _on_threads(work, count, part)
        yield range(count), None

    return epoch


_NATIVE_NOTE = (
    "decodes only the blocks that the crop shows where a restart table is packed; bilinear without antialias; all "
    "eight symmetries; plans the colour change too; verifies every payload's checksum"
)
OURS = (
    _engine("dermscale native jpg", "shards-jpg", "native", note=_NATIVE_NOTE),
    _engine("dermscale native raw", "shards-raw", "native", encoding="raw"),
    _engine("dermscale native jpg, 1 thread", "shards-jpg", "native", 1),
    _engine("dermscale native raw, 1 thread", "shards-raw", "native", 1, encoding="raw"),
    _engine(
        "dermscale native proportion",
        "shards-proportion",
        "native",
        note="half of the images are JPEG, half raw",
        encoding="proportion",
    ),
    _engine(
        "dermscale dali jpg (on the CPU)",
        "shards-jpg",
        "dali",
        packages=("nvidia-dali-cuda120",),
        note="the GPU engine's graph, built for the CPU: the same batches as native",
    ),
    _engine(
        "dermscale resident (on the CPU)",
        "shards-jpg",
        "resident",
        note="meant for a GPU's memory; everything is decoded before the clock starts",
    ),
)

OURS_ON_GPU = (
    _engine(
        "dermscale native jpg, to the GPU",
        "shards-jpg",
        "native",
        note="decoded on the CPU, copied to the GPU a batch ahead",
        on_gpu=True,
    ),
    _engine("dermscale native raw, to the GPU", "shards-raw", "native", encoding="raw", on_gpu=True),
    _engine(
        "dermscale dali jpg, on the GPU",
        "shards-jpg",
        "dali",
        packages=("nvidia-dali-cuda120",),
        note="decoded on the GPU, whole or cut as its self-check takes it, then sliced",
        on_gpu=True,
    ),
    _engine(
        "dermscale resident, on the GPU",
        "shards-jpg",
        "resident",
        note="decoded before the clock starts; cropped and resized on the GPU",
        on_gpu=True,
    ),
)
"""Measured where there is a GPU."""

CEILINGS = (
    System(
        "ceiling: bare loop jpg",
        "shards-jpg",
        _bare_loop,
        note="the native engine's calls (cut, decode, resize, flip) on threads with nothing around them: no checksum, "
        "no batches, no order, payloads and plan ready in memory",
        ceiling=True,
    ),
    System("ceiling: bare loop raw", "shards-raw", _bare_loop, ceiling=True, encoding="raw"),
    System(
        "ceiling: decode only",
        "packed",
        _decode_only,
        note="cv2.imdecode of the whole packed JPEG files, in memory; no crop, no resize",
        ceiling=True,
    ),
    System(
        "ceiling: memory copy only",
        "packed",
        _copy_only,
        note="copies finished (S, S, 3) images",
        ceiling=True,
        encoding="none",
    ),
)
