"""A Loader in torchdata's StatefulDataLoader, which keeps its position."""

import itertools

import pytest

from shards.common.errors import UsageError
from tests.support.clients import EPOCH, epochs, flat, make, samples

pytest.importorskip("torchdata.stateful_dataloader", reason="needs the extra `clients`")
from torchdata.stateful_dataloader import StatefulDataLoader


@pytest.mark.parametrize("split", ["train", "val"])
def test_its_epochs_are_the_loaders(tiny_shards, split):
    torchs = StatefulDataLoader(make(tiny_shards, split), batch_size=None)
    assert [samples(torchs) for _ in range(3)] == epochs(tiny_shards, 3, split)


@pytest.mark.parametrize("stop", [0, 1, 4, EPOCH - 1, EPOCH, EPOCH + 5])
def test_a_state_of_any_step_goes_on_with_the_next_batch(tiny_shards, stop):
    def stream(torchs):
        while True:
            yield from torchs

    everything = flat(epochs(tiny_shards, 3))
    torchs = StatefulDataLoader(make(tiny_shards), batch_size=None)
    running = stream(torchs)
    assert samples(itertools.islice(running, stop)) == everything[:stop]
    state = torchs.state_dict()
    resumed = StatefulDataLoader(make(tiny_shards), batch_size=None)
    resumed.load_state_dict(state)
    assert samples(itertools.islice(stream(resumed), len(everything) - stop)) == everything[stop:]


def test_the_state_after_an_epoch_starts_the_next_one(tiny_shards):
    torchs = StatefulDataLoader(make(tiny_shards), batch_size=None)
    samples(torchs)
    resumed = StatefulDataLoader(make(tiny_shards), batch_size=None)
    resumed.load_state_dict(torchs.state_dict())
    assert [samples(resumed) for _ in range(2)] == epochs(tiny_shards, 3)[1:]


def test_workers_are_refused(tiny_shards):
    torchs = StatefulDataLoader(make(tiny_shards), batch_size=None, num_workers=2)
    with pytest.raises(UsageError, match="use num_workers=0"):
        next(iter(torchs))
