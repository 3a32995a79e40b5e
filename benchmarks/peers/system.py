"""What every loader of the comparison is: a `System`; and the check that its batches are what was asked for.

All systems get the same `Job`: random-resized crops of a quarter to the whole of the image, a mirror image with
probability one half, uint8 batches, shuffled, the last incomplete batch dropped, `job.workers` threads or processes.
Each is set up as its own documentation shows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.datasets import Format, Job
from benchmarks.machine import installed

SCALE = (0.25, 1.0)
"""Share of the image's area that a random-resized crop takes, as in `shards.plan.Augment`."""
RATIO = (3 / 4, 4 / 3)
"""Width over height of the crop."""

Batch = tuple[Any, Any]
"""Images, a torch tensor or array (n, 3, S, S) or (n, S, S, 3) uint8, and labels (n,); a ceiling's labels are None."""

Epoch = Callable[[], Iterator[Batch]]
"""Starts one pass over the data."""


@dataclass(frozen=True)
class System:
    """One way to load images.

    format: the data set on disk that it reads. open: (job, folder of that data set) → how to start an epoch. packages:
    distributions that it needs. note: what it does differently from the others. ceiling: it does a
    part of the work alone, and gives no batches. encoding: of its images on disk, for the tables. before: takes what
    `open` returned and returns a call that throws away batches that were prepared outside the clock. on_gpu: its
    batches end in a GPU's memory.
    """

    name: str
    format: Format
    open: Callable[[Job, Path], Epoch]
    packages: tuple[str, ...] = ()
    note: str = ""
    ceiling: bool = False
    encoding: str = "jpg"
    before: Callable[[Any], Callable[[], None]] | None = None
    on_gpu: bool = False


class WrongBatchError(Exception):
    """A loader's output is not what was asked for."""


class MissingPeerError(Exception):
    """A system needs a package that is not installed."""


def need(packages: Sequence[str]) -> None:
    """Raise MissingPeerError where one of these distributions is not installed; it says how to install them."""
    found = installed(packages)
    absent = [package for package in packages if package not in found]
    if absent:
        raise MissingPeerError(f"{', '.join(absent)} not installed: run `make peers`, use .venv-peers/bin/python")


def to_array(images: Any) -> np.ndarray:
    """Images of a batch as an array, without a copy where that is possible."""
    return images.cpu().numpy() if hasattr(images, "cpu") else np.asarray(images)


def check_batch(batch: Batch, job: Job, mean: tuple[float, float, float]) -> None:
    """Refuse a batch that is not uint8 photographs of the requested size with labels.

    mean: channel means of the data set, 0 to 255, in RGB. A wrong order of axes or channels, noise, flat or repeated
    images, and values in another range are all found. Raises WrongBatchError.
    """
    images, labels = to_array(batch[0]), np.asarray(to_array(batch[1])).reshape(-1)
    n, side = job.batch_size, job.resolution_px
    if images.shape not in ((n, 3, side, side), (n, side, side, 3)):
        raise WrongBatchError(f"shape {images.shape} instead of ({n}, 3, {side}, {side}) or ({n}, {side}, {side}, 3)")
    if images.dtype != np.uint8:
        raise WrongBatchError(f"type {images.dtype} instead of uint8")
    if images.shape[1] == 3 and side != 3:
        images = images.transpose(0, 2, 3, 1)
    if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() > 6:
        raise WrongBatchError(f"labels of shape {labels.shape} and type {labels.dtype} instead of {n} integers 0 to 6")
    pixels = images.astype(np.float32)
    spread = pixels.std(axis=(1, 2, 3))
    if spread.min() < 2:
        raise WrongBatchError(f"image {int(spread.argmin())} of the batch is flat")
    if len(np.unique(pixels[:, ::7, ::7].reshape(n, -1), axis=0)) < n // 2:
        raise WrongBatchError("most images of the batch are the same")
    # Photographs are smooth: neighbours differ far less than pixels apart. Scrambled axes and noise are not.
    step = np.abs(np.diff(pixels, axis=1)).mean() + np.abs(np.diff(pixels, axis=2)).mean()
    apart = np.abs(pixels - pixels[:, ::-1, ::-1]).mean()
    if step > apart:
        raise WrongBatchError(
            f"not a photograph: neighbours differ by {step / 2:.1f} of 255, opposite pixels by {apart:.1f}"
        )
    found = pixels.mean(axis=(0, 1, 2))
    # A batch of eight images may be 35 off its data set's means; red and blue of skin are 50 apart and more.
    off, swapped = (np.abs(found - of).max() for of in (np.array(mean), np.array(mean)[::-1]))
    if off > min(60, swapped):
        raise WrongBatchError(
            f"channel means {found.round().tolist()} are far from the data set's {list(mean)}: not its RGB"
        )
