"""The job that every loader gets: the same images, packed alike, cropped alike, in equal batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SCALE = (0.25, 1.0)
"""Share of the image's area that a random-resized crop takes, as in `shards.plan.Augment`."""
RATIO = (3 / 4, 4 / 3)
"""Width over height of the crop."""
QUALITY = 90
"""JPEG quality of everything that is packed."""


@dataclass(frozen=True)
class Work:
    """What a loader is asked for.

    source: HAM10000-shaped folder of originals. cache: folder for the prepared forms. packed_px: longer side of the
    packed images. resolution_px: side of the images that come out. workers: threads or processes. copies: how many
    times each original stands in the data set, under names of its own, so that an epoch is long enough to time.
    most: originals that are used, the first by name. samples: of all copies, the first that are used. None for all.
    `forms.sized` finds the three.
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


Batch = tuple[Any, Any]
"""Images, a torch tensor or array (n, 3, S, S) or (n, S, S, 3) uint8, and labels (n,); a ceiling's labels are None."""

Epoch = Callable[[], Iterator[Batch]]
"""Starts one pass over the data."""


@dataclass(frozen=True)
class System:
    """One way to load images.

    form: the data set on disk that it reads (`forms.FORMS`). packages: distributions that it needs. note: what it does
    differently. open: sets up and returns how to start an epoch. ceiling: True for a bound that gives no batches.
    before: of what `open` returned, what throws away batches that were made ready outside the clock. on_gpu: it hands
    its batches over in a GPU's memory.
    """

    name: str
    form: str
    open: Callable[[Work, Path], Epoch]
    packages: tuple[str, ...] = ()
    note: str = ""
    ceiling: bool = False
    encoding: str = "jpg"
    before: Callable[[Any], Callable[[], None]] | None = None
    on_gpu: bool = False


class WrongBatchError(Exception):
    """A loader's output is not what was asked for."""


class MissingPeerError(Exception):
    """A system needs something that is not installed."""


def to_array(images: Any) -> np.ndarray:
    """Images of a batch as an array, without a copy where that can be had."""
    return images.cpu().numpy() if hasattr(images, "cpu") else np.asarray(images)


def check_batch(batch: Batch, work: Work, mean: tuple[float, float, float]) -> None:
    """Refuse a batch that is not uint8 photographs of the size asked for, with labels.

    mean: channel means of the data set, 0 to 255, in RGB. A wrong order of axes or channels, noise, flat or repeated
    images, and values scaled to another range are all told apart from real ones. Raises WrongBatchError.
    """
    images, labels = to_array(batch[0]), np.asarray(to_array(batch[1])).reshape(-1)
    n, side = work.batch_size, work.resolution_px
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
    if np.abs(found - np.array(mean)).max() > 25:
        raise WrongBatchError(
            f"channel means {found.round().tolist()} are far from the data set's {list(mean)}: not its RGB"
        )
