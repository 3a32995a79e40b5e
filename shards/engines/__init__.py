"""Engines carry out a plan: decode the box, resize it, flip or transpose it, and return uint8.

`native` decodes on CPU threads, `dali` uses NVIDIA DALI, `resident` gathers from device memory. All take the same
`Request` and return the same images; `choose.py` selects one.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

ENGINES = ("native", "dali", "resident")


class Request(NamedTuple):
    """One batch to load. samples: (n,) int64 sample numbers; boxes: (n, 4) int32 y, x, h, w; symmetry: (n,) uint8."""

    samples: np.ndarray
    boxes: np.ndarray
    symmetry: np.ndarray


class Draw(NamedTuple):
    """One batch whose plan the engine makes too.

    positions: (N,) int64, the order of its epoch. at: the address of the batch's first position. mask: (n,) bool.
    """

    epoch: int
    positions: np.ndarray
    at: int
    mask: np.ndarray


class Engine(Protocol):
    """What every engine offers."""

    def run(self, requests: Iterable[Request], resolution: int) -> "Iterator[torch.Tensor]":
        """The images of each request, in order.

        (n, 3, resolution, resolution) uint8, 0 to 255, RGB, channels-last, on the loader's device. A tensor stays
        valid for as long as the caller keeps it. Closing the iterator stops all work in progress; with dali, a thread
        does that, and `close` waits for it. Raises DataError naming a damaged sample.
        """
        ...

    def close(self) -> None:
        """Release threads, buffers and device memory."""
        ...
