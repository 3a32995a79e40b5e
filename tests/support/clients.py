"""What the tests of other projects' training code share: loaders, their batches to compare with, a tiny network."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from shards import Batch, Loader, ShardSet

ROOT = Path(__file__).parents[2]
EPOCH = 9  # batches of 8 among 72 images


def make(shards: Path, split: str = "train", **options: Any) -> Loader:
    """A loader without a place among the ranks."""
    given = {"batch_size": 8, "resolution": 32, "seed": 5, "threads": 1, "train": split == "train"} | options
    return Loader(ShardSet(shards).select(split), **given)


def samples(passes: Iterable[Batch]) -> list[list[int]]:
    """The samples of each batch."""
    return [batch.samples.tolist() for batch in passes]


def epochs(shards: Path, count: int, split: str = "train") -> list[list[list[int]]]:
    """The samples of the first epochs, from a loader for each."""
    found = []
    for epoch in range(count):
        with closing(make(shards, split)) as loader:
            loader.set_epoch(epoch)
            found.append(samples(loader))
    return found


def flat(lists: Iterable[list]) -> list:
    """Their items, one after the other: the batches of epochs, or the samples of batches."""
    return list(itertools.chain(*lists))


class Tiny(torch.nn.Linear):
    """A network that trains at once: of the colour maps alone."""

    def __init__(self) -> None:
        super().__init__(12, 7)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Of the samples that count."""
        images, labels, _, colour, mask = batch
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
        return torch.nn.functional.cross_entropy(self(colour.flatten(1))[mask], labels[mask])


def two_processes(script: str, *arguments: object) -> None:
    """Run Python code in two processes that torchrun starts."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def joined(folder: Path) -> list[list[int]]:
    """The samples of the global batches that two processes wrote as 0.pt and 1.pt, each its own part."""
    parts = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return [a + b for a, b in zip(*parts, strict=True)]
