"""Sets that are larger than the cache: passes that hold few shards at a time give the same batches."""

from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.common.errors import UsageError
from shards.loader import Loader
from shards.passage import AHEAD, BESIDES, Passage
from shards.shardset import ShardSet
from tests.conftest import write_set

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """A set of many shards of 1 MB: 27 of train and 9 each of val and test."""
    return write_set(tmp_path_factory.mktemp("packed") / "set", "raw", images=2200)


@pytest.fixture(scope="module")
def address(packed) -> str:
    """The same set in a store, which is the memory of this process."""
    system = fsspec.filesystem("memory")
    system.put(str(packed), "/larger", recursive=True)
    return "memory://larger"


def taken(cache: Path) -> int:
    """Bytes of the tars in a cache. One may come after another was counted that leaves meanwhile."""
    size = 0
    for file in cache.glob("*/*.tar"):
        with suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


def epochs(data: ShardSet, cache: Path | None = None, **options) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], int]:
    """Samples and images of the batches of two passes, and the most bytes of tars that the cache held meanwhile."""
    train, most = options.pop("train", True), 0
    selection = data.select("train" if train else "val")
    found = []
    with closing(Loader(selection, batch_size=16, resolution=24, train=train, **options)) as loader:
        for epoch in range(2):
            loader.set_epoch(epoch)
            for batch in loader:
                found.append((batch.samples.clone(), batch.images.clone()))
                most = max(most, taken(cache) if cache else 0)
    return found, most


@pytest.mark.parametrize("engine", ["native", "dali"])
@pytest.mark.parametrize("options", [{"window": 2}, {"train": False}], ids=["train", "evaluation"])
def test_a_set_larger_than_the_cache_gives_the_batches_of_the_folder(packed, address, tmp_path, options, engine):
    expected, _ = epochs(ShardSet(packed), **options)
    limit = 10e6
    with ShardSet(address, cache=tmp_path, cache_gb=limit / 1e9) as data:
        assert sum(shard.bytes for shard in data.manifest.shards if shard.split == "train") > 2 * limit
        found, most = epochs(data, tmp_path, engine=engine, **options)
    assert len(found) == len(expected) > 30 and most <= limit + max(shard.bytes for shard in data.manifest.shards)
    for (samples, images), (these, same) in zip(found, expected, strict=True):
        assert torch.equal(samples, these) and (images.int() - same.int()).abs().max() <= (engine == "dali")


def test_what_does_not_fit_is_refused_with_what_to_do(address, tmp_path):
    with ShardSet(address, cache=tmp_path, cache_gb=0.01) as data:
        with pytest.raises(UsageError, match="or draw from a few shards at a time: --window N"):
            Loader(data.select("train"), batch_size=16)
        with pytest.raises(UsageError, match="hold"):
            Loader(data.select("train"), batch_size=16, window=20)
        Loader(data.select("train"), batch_size=16, window=2).close()


class Told:
    """Stands for a set of which shards are released and fetched."""

    def __init__(self, shards: np.ndarray) -> None:
        self.shards, self.released, self.fetched = shards, [], []

    def column(self, name: str) -> np.ndarray:
        return self.shards

    def release(self, numbers: list[int]) -> None:
        self.released += numbers

    def fetch_ahead(self, samples: np.ndarray) -> None:
        self.fetched += self.shards[samples].tolist()


def test_a_passage_releases_what_it_left_behind_and_fetches_what_comes():
    rng = np.random.default_rng(0)
    shards = rng.permutation(np.repeat(np.arange(30), 20))
    samples = np.argsort(shards // 3, kind="stable")  # three shards at a time
    told = Told(shards)
    passage = Passage(told, samples, samples[:5])  # pyright: ignore[reportArgumentType]
    for position in range(0, 601, 7):
        passage.at(position)
        left = set(shards[samples[:position]]) - set(shards[samples[position:]])
        assert set(told.released) == left and len(told.released) == len(left)
        assert set(told.fetched) >= set(shards[samples[position : position + (AHEAD - 1) * 20]])
        assert len(set(told.fetched) - set(told.released)) <= 3 + AHEAD + BESIDES
