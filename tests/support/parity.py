"""How far two loaders' batches are apart."""

import numpy as np
import torch

from shards import Loader
from shards.loader import Batch


def batches(loader: Loader) -> list[Batch]:
    """An epoch, with copies of the images."""
    return [Batch(b.images.clone(), b.labels, b.samples, b.colour, b.mask) for b in loader]


def distances(expected: list[Batch], found: list[Batch]) -> np.ndarray:
    """Absolute differences of all values, flat, after labels, order, colour, mask and layout were found equal."""
    assert len(expected) == len(found) > 0
    parts = []
    for a, b in zip(expected, found, strict=True):
        for name in ("labels", "samples", "colour", "mask"):
            assert torch.equal(getattr(a, name), getattr(b, name).cpu()), name
        assert b.images.dtype == torch.uint8 and a.images.shape == b.images.shape
        assert b.images.is_contiguous(memory_format=torch.channels_last)
        parts.append((a.images.int() - b.images.cpu().int()).abs().numpy().ravel())
    return np.concatenate(parts)


def assert_parity(expected: list[Batch], found: list[Batch], mean: float = 0.25) -> None:
    """Images at most 1 of 255 apart and less than `mean` on average; everything else equal."""
    apart = distances(expected, found)
    assert apart.max() <= 1
    assert apart.mean() < mean
