"""Engines on a device beside native's pixels on the CPU, quietly and under load (for `benchmarks/gpu_check.py`).

Nothing here names a device: the same functions run on a CPU, where the tests run them.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards import Loader, Selection
from shards.engines import Engine, Request
from shards.engines.dali import DaliEngine
from shards.engines.native import NativeEngine
from shards.engines.resident import ResidentEngine
from shards.engines.selfcheck import contents
from train import device as devices


@dataclass(frozen=True)
class Tolerance:
    """How far images may differ, in values of 0 to 255: a `share` by `within` or less, and on average under `mean`."""

    within: int
    share: float
    mean: float

    def holds(self, difference: Mapping[str, Any]) -> bool:
        """Whether the numbers of `Difference.numbers` keep to it."""
        histogram = np.array(difference["histogram"])
        near = histogram[: self.within + 1].sum()
        return bool(
            histogram.sum() > 0 and near >= self.share * histogram.sum() and difference["mean_difference"] < self.mean
        )


SAME = Tolerance(within=0, share=1.0, mean=0.25)
ROUNDING = Tolerance(within=1, share=1.0, mean=0.25)
RAW = Tolerance(within=1, share=1.0, mean=1.0)
DECODED_ON_GPU = Tolerance(within=4, share=0.999, mean=1.0)
"""Another JPEG decoder than libjpeg's: nvJPEG."""


def tolerance(engine: str, kinds: str, device: torch.device) -> Tolerance:
    """What an engine is allowed, beside native on the CPU. kinds: `jpg`, `raw` or `mixed`."""
    if engine == "native":
        return SAME
    if engine == "resident" or device.type == "cpu":
        return ROUNDING
    return RAW if kinds == "raw" else DECODED_ON_GPU


class Difference:
    """The absolute differences of many batches, as a histogram."""

    def __init__(self) -> None:
        self.histogram = np.zeros(256, np.int64)

    def add(self, expected: Tensor, got: Tensor) -> None:
        """Both (n, 3, S, S) uint8, compared where `got` is. Raises ValueError for another shape or kind."""
        if expected.shape != got.shape or got.dtype != torch.uint8:
            raise ValueError(f"a batch is {tuple(got.shape)} {got.dtype}, and should be {tuple(expected.shape)} uint8")
        apart = (expected.to(got.device).int() - got.int()).abs().flatten()
        self.histogram += torch.bincount(apart, minlength=256).cpu().numpy()

    def numbers(self) -> dict[str, Any]:
        """max_difference, mean_difference, share_within_4, values, and the histogram up to its last entry."""
        values = int(self.histogram.sum())
        largest = int(np.flatnonzero(self.histogram)[-1]) if values else 0
        return {
            "max_difference": largest,
            "mean_difference": float(self.histogram @ np.arange(256)) / max(values, 1),
            "share_within_4": float(self.histogram[:5].sum()) / max(values, 1),
            "values": values,
            "histogram": self.histogram[: largest + 1].tolist(),
        }


def engines(selection: Selection, device: torch.device) -> dict[str, Callable[[], Engine]]:
    """Every engine that can run on `device`, by name; DALI's two graphs count as two. Nothing is built yet."""
    data, where, kinds = selection.data, str(device), contents(selection.data, selection.samples)
    found: dict[str, Callable[[], Engine]] = {
        "native": lambda: NativeEngine(data, where),
        "dali region": lambda: DaliEngine(data, where, contents=kinds, variant="region"),
        "dali whole": lambda: DaliEngine(data, where, contents=kinds, variant="whole"),
        "resident": lambda: ResidentEngine(selection, where),
    }
    if kinds == "raw":
        del found["dali whole"]  # nothing to decode: it is the same graph
    return found


def requests_of(selection: Selection, *, train: bool, batch_size: int, batches: int) -> list[Request]:
    """The first batches of the epochs 0, 1, … as engines get them; fewer where an evaluation has fewer."""
    requests: list[Request] = []
    with closing(Loader(selection, batch_size=batch_size, train=train, seed=1, engine="native")) as loader:
        for epoch in range(batches if train else 1):
            loader.set_epoch(epoch)
            order, plan = loader.plan()
            for start in range(0, len(loader) * batch_size, batch_size):
                rows = order[start : start + batch_size]
                requests.append(Request(selection.samples[rows], plan.boxes[rows], plan.symmetry[rows]))
                if len(requests) == batches:
                    return requests
    return requests


def reference(selection: Selection, requests: Iterable[Request], resolution: int) -> list[Tensor]:
    """Native's images on the CPU, (n, 3, S, S) uint8 each."""
    with closing(NativeEngine(selection.data, "cpu")) as native:
        return [images.clone() for images in native.run(requests, resolution)]


def parity(
    engine: Engine,
    device: torch.device,
    requests: list[Request],
    expected: list[Tensor],
    resolution: int,
    allowed: Tolerance,
) -> tuple[bool, dict[str, Any]]:
    """Whether an engine gives the expected images on `device`, and by how much they differ."""
    difference, seen = Difference(), 0
    for wanted, images in zip(expected, engine.run(iter(requests), resolution), strict=True):
        if not images.is_contiguous(memory_format=torch.channels_last) or images.device != device:
            raise ValueError(f"a batch is not channels-last on {device}")
        difference.add(wanted, images)
        seen += len(images)
    numbers = {"images": seen, "batches": len(requests), "resolution_px": resolution, "allowed": asdict(allowed)}
    found = difference.numbers()
    return allowed.holds(found), numbers | found


def heavy_kernels(device: torch.device, side: int, repeats: int) -> Callable[[], None]:
    """A load: `repeats` products of (side, side) float32 matrices, queued on the current stream and not waited for."""
    matrix = torch.rand(side, side, device=device)
    out = torch.empty_like(matrix)
    devices.synchronize(device)  # another stream may come to use them

    def load() -> None:
        for _ in range(repeats):
            torch.mm(matrix, matrix, out=out)

    return load


def stress(
    engine: Engine,
    requests: list[Request],
    expected: list[Tensor],
    resolution: int,
    allowed: Tolerance,
    load: Callable[[], None],
    consumer: AbstractContextManager[Any] | None = None,
) -> tuple[bool, dict[str, Any]]:
    """Whether batches are whole for a consumer whose stream lags far behind the host.

    Heavy kernels are queued before each batch is read, and the batch is let go of before they have run: an engine
    that does not order its writes with the consumer's reads hands over, or overwrites, unfinished images. consumer:
    makes another stream the current one; the load is then on both.
    """
    kept: list[Tensor] = []
    load()
    with consumer or nullcontext():
        for images in engine.run(iter(requests), resolution):
            load()
            kept.append(images.clone())  # queued behind the load
            del images  # from here on the engine may use the memory again
    if kept:
        devices.synchronize(kept[0].device)  # the comparison is on another stream
    difference = Difference()
    for wanted, images in zip(expected, kept, strict=True):
        difference.add(wanted, images)
    numbers = {"batches": len(requests), "resolution_px": resolution, "allowed": asdict(allowed)}
    found = difference.numbers()
    return allowed.holds(found), numbers | found
