"""A Loader in the hands of other code: its batches as tuples and trees, passes side by side, PyTorch's DataLoader."""

import itertools
import pickle
import time
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed, multiprocessing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader

from shards import Batch
from shards.common.errors import UsageError
from shards.engines import transfer
from tests.conftest import free_port
from tests.support.clients import EPOCH, epochs, make, samples


@pytest.fixture(scope="module")
def expected(tiny_shards):
    return epochs(tiny_shards, 6)


def test_a_batch_is_a_tuple_a_tree_and_goes_to_a_device(tiny_shards):
    with closing(make(tiny_shards)) as loader:
        batch = next(iter(loader))
    images, labels, *rest = batch
    assert images is batch.images and labels is batch.labels and len(rest) == 3
    leaves, _ = tree_flatten(batch)
    assert all(leaf is tensor for leaf, tensor in zip(leaves, batch, strict=True))
    shapes = tree_map(lambda tensor: tuple(tensor.shape), batch)
    assert shapes == Batch((8, 3, 32, 32), (8,), (8,), (8, 3, 4), (8,))
    assert all(a is b for a, b in zip(batch.to("cpu"), batch, strict=True))
    there = batch.to(torch.device("meta"), non_blocking=True)
    assert isinstance(there, Batch) and {tensor.device.type for tensor in there} == {"meta"}
    assert there.images.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(pickle.loads(pickle.dumps(batch)), batch, strict=True))


@pytest.mark.parametrize("slow", ["device", "loader"])
def test_waiting_for_a_device_that_is_behind_does_not_count_as_waiting_for_data(tiny_shards, monkeypatch, slow):
    class Ahead:
        def __init__(self, device) -> None: ...

        def wait(self) -> None:
            time.sleep(0.2 if slow == "device" else 0.0)

    def late(batches):
        for batch in batches:
            time.sleep(0.2 if slow == "loader" else 0.0)
            yield batch

    monkeypatch.setattr(transfer, "Ahead", Ahead)
    with closing(make(tiny_shards)) as loader:
        opened = loader._open
        monkeypatch.setattr(loader, "_open", lambda start: replace(s := opened(start), batches=late(s.batches)))
        loader.device = torch.device("cuda")  # its engine is that of the CPU
        began = time.perf_counter()
        count = sum(1 for _ in itertools.islice(loader, 5))
        seconds = time.perf_counter() - began
    assert count == 5
    assert seconds - loader.waited_s >= 0.8 if slow == "device" else loader.waited_s >= 1.0


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_dataloader_without_workers_passes_the_batches_on(tiny_shards, split):
    with closing(make(tiny_shards, split)) as loader:
        torchs = DataLoader(loader, batch_size=None)
        assert len(torchs) == len(loader)
        found = [samples(torchs) for _ in range(3)]  # of all its epochs
        assert all(isinstance(batch, Batch) for batch in torchs)
        loader.set_epoch(1)
        found.append(samples(torchs))
    truth = epochs(tiny_shards, 3, split)
    assert found == [*truth, truth[1]]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dataloader_with_workers_is_refused_in_one_line(tiny_shards, workers):
    with closing(make(tiny_shards)) as loader:
        torchs = DataLoader(loader, batch_size=None, num_workers=workers)
        with pytest.raises(UsageError, match=f"num_workers={workers}: use num_workers=0; "):
            next(iter(torchs))


@pytest.mark.parametrize("engine", ["native", "resident", "dali"])
def test_a_loader_zipped_with_itself_goes_through_one_epoch_twice(tiny_shards, engine, expected):
    with closing(make(tiny_shards, engine=engine)) as loader:
        for epoch in range(2):
            pairs = [(a.samples.tolist(), b.samples.tolist()) for a, b in zip(loader, loader, strict=False)]
            assert pairs == [(each, each) for each in expected[epoch]]
            assert (loader.epoch, loader.state_dict()["batch"]) == (epoch + 1, 0)
        state = loader.state_dict() | {"batch": 4}
        loader.load_state_dict(state)
        pairs = [(a.samples.tolist(), b.samples.tolist()) for a, b in zip(loader, loader, strict=True)]
        assert pairs == [(each, each) for each in expected[2][4:]]  # both from the loaded position
        assert loader.epoch == 3 and samples(loader) == expected[3]


@given(st.lists(st.integers(0, 2), min_size=20, max_size=45))
def test_passes_side_by_side_are_each_one_epoch(tiny_shards, expected, turns):
    """Whoever's turn it is gets the next batch of an epoch; an epoch counts once, however many passes it had."""
    with closing(make(tiny_shards)) as loader:
        passes: dict = {}
        for turn in turns:
            if turn not in passes:
                passes[turn] = [iter(loader), loader.epoch, 0]
            iterator, epoch, done = passes[turn]
            batch = next(iterator, None)
            if batch is None:
                assert done == EPOCH
                del passes[turn]
                continue
            assert batch.samples.tolist() == expected[epoch][done]
            passes[turn][2] += 1
            if passes[turn][2] == EPOCH:
                assert loader.epoch > epoch
        for iterator, _, _ in passes.values():
            iterator.close()
        assert loader.epoch <= len(turns) // EPOCH
        assert samples(loader) == expected[loader.epoch - 1]


def test_a_pass_that_goes_on_after_set_epoch_changes_nothing(tiny_shards, expected):
    with closing(make(tiny_shards)) as loader:
        early = iter(loader)
        next(early)
        loader.set_epoch(3)
        assert samples(early) == expected[0][1:]
        assert (loader.epoch, loader.state_dict()["batch"]) == (3, 0)
        assert samples(loader) == expected[3]


def test_a_pass_has_the_epoch_that_is_set_when_its_first_batch_is_taken(tiny_shards, expected):
    """Training code makes its iterator first and then calls hooks, in which users set the epoch."""
    with closing(make(tiny_shards)) as loader:
        iter(loader)  # only tried
        ahead = iter(loader)
        loader.set_epoch(2)
        assert samples(ahead) == expected[2]


def of_a_group(rank, world_size, port, shards, folder, loader):
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=world_size, rank=rank)
    made = make(shards)
    whole = make(shards, rank=0, world_size=1)
    parts = [torch.stack([b.samples for b in passes]) for passes in (loader, made)]
    torch.save([*parts, torch.stack([b.samples for b in whole])], folder / f"{rank}.pt")
    distributed.destroy_process_group()


def test_the_ranks_are_those_of_the_process_group(tiny_shards, tmp_path, expected):
    """Of one that is initialised after the loader was made, too. Given ranks go before it."""
    with closing(make(tiny_shards)) as loader:
        work = tiny_shards, tmp_path, loader
        multiprocessing.spawn(of_a_group, (2, free_port(), *work), nprocs=2)
    early, made, whole = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)), strict=True)
    assert torch.cat(early, 1).tolist() == torch.cat(made, 1).tolist() == expected[0]
    assert whole[0].tolist() == whole[1].tolist() == expected[0]


@pytest.mark.parametrize("options", [{"rank": 1}, {"world_size": 2}])
def test_half_a_place_among_the_ranks_is_refused(tiny_shards, options):
    with pytest.raises(UsageError, match="give both, or neither"):
        make(tiny_shards, **options)
