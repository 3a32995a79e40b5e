"""The features that no other test shows by themselves (`docs/features.md` names them)."""

import numpy as np
import pytest

from shards.loader import Loader
from shards.shardset import ShardSet


@pytest.mark.parametrize("kind", ["jpg", "raw", "mixed"])
def test_samples_are_read_by_number_in_any_order(shard_sets, kind):
    data = shard_sets[kind]
    in_order = [bytes(data.read(sample)) for sample in range(len(data))]
    for sample in np.random.default_rng(0).permutation(len(data)).tolist():
        assert bytes(data.read(sample)) == in_order[sample]
    assert len(set(in_order)) == len(data)


def test_resuming_reads_nothing_of_what_was_seen(tiny_shards):
    """The engine is asked for the remaining batches alone, whatever the position; the state's size does not grow."""
    selection = ShardSet(tiny_shards).select("train")
    whole = [b.samples.tolist() for b in Loader(selection, batch_size=8, resolution=32, seed=3)]
    sizes = set()
    for stop in range(1, len(whole)):
        loader = Loader(selection, batch_size=8, resolution=32, seed=3)
        running = iter(loader)
        for _ in range(stop):
            next(running)
        state = loader.state_dict()
        running.close()
        sizes.add(len(state))
        resumed, asked = Loader(selection, batch_size=8, resolution=32, seed=3), []
        run = resumed._engine.run

        def recorded(work, resolution, run=run, asked=asked):
            return run((asked.append(item.samples.tolist()) or item for item in work), resolution)

        resumed._engine.run = recorded
        resumed.load_state_dict(state)
        assert [b.samples.tolist() for b in resumed] == whole[stop:]
        ahead = len(asked) - len(whole[stop:])  # of the next epoch, under way already
        assert asked[: len(whole[stop:])] == whole[stop:] and 0 <= ahead <= 3
    assert len(sizes) == 1
