"""Comparing engines: requests for them, damaged sets, and the differences between the batches of two loaders."""

from pathlib import Path

import numpy as np
import torch

from shards import Augment, Loader, ShardSet
from shards.engines import Request
from shards.loader import Batch
from shards.plan import training_plan


def batches(loader: Loader) -> list[Batch]:
    """An epoch, with copies of the images."""
    return [batch._replace(images=batch.images.clone()) for batch in loader]


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


def requests_of(data: ShardSet, sizes: list[int]) -> list[Request]:
    """Consecutive training crops in batches of these sizes."""
    samples = data.select("train").samples
    plan = training_plan(5, 1, samples, data.column("height")[samples], data.column("width")[samples], Augment())
    ends = np.cumsum(sizes)
    assert ends[-1] <= len(samples)
    return [
        Request(samples[a:b], plan.boxes[a:b], plan.symmetry[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)
    ]


def flip_a_bit(folder: Path, position: int) -> str:
    """Damage the training sample at this position; returns its name."""
    data = ShardSet(folder)
    victim = int(data.select("train").samples[position])
    file = folder / data.manifest.shards[int(data.column("shard")[victim])].file
    content = bytearray(file.read_bytes())
    content[int(data.column("offset")[victim]) + int(data.column("length")[victim]) - 9] ^= 0x10
    file.write_bytes(content)
    return str(data.column("image_id")[victim])
