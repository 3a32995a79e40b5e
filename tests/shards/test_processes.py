"""Sets and loaders in other processes: sent there, or inherited by a fork."""

import copy
import gc
import os
import pickle
import shutil
import subprocess
import sys
import weakref
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from shards import Loader, ShardSet
from shards.common.errors import DataError
from shards.kernels.load import compiled
from shards.kernels.workers import CROPS, Loading, Workers
from tests.conftest import write_set
from tests.support.parity import batches


@pytest.mark.parametrize("send", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_set_and_a_loader_can_be_sent_at_any_time(tiny_shards, send):
    data = ShardSet(tiny_shards)
    loader = Loader(data.select("train"), batch_size=8, resolution=32, seed=3, threads=2)
    loader.set_epoch(2)
    with closing(iter(loader)) as iterator:
        first = [next(iterator).images.clone() for _ in range(3)]
        sent = send(loader)  # in the middle of an epoch, the files mapped
        rest = [batch.images.clone() for batch in iterator]
    loader.close()
    again = [batch.images for batch in batches(sent)]
    sent.close()
    assert len(first) == 3 and len(again) == len(rest)
    assert all(torch.equal(a, b) for a, b in zip(again, rest, strict=True))
    other = send(data)
    assert bytes(other.read(5)) == bytes(data.read(5))


def test_a_set_that_has_changed_meanwhile_is_not_taken_for_the_one_that_was_sent(tmp_path):
    sent = pickle.dumps(ShardSet(write_set(tmp_path / "set", images=30)))
    shutil.rmtree(tmp_path / "set")
    write_set(tmp_path / "set", images=40)
    with pytest.raises(DataError, match="holds another shard set"):
        pickle.loads(sent)


def in_a_fork(job) -> str:
    """What `job()` returns in a forked child, or its error; a child that hangs is killed after 20 s."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = job()
        except BaseException as error:  # noqa: BLE001 (the parent tells)
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    import select

    ready, _, _ = select.select([read], [], [], 20)
    if not ready:
        os.kill(child, 9)
    text = os.read(read, 10_000).decode() if ready else "hung"
    os.close(read)
    os.waitpid(child, 0)
    return text


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["jpg", "raw"])
def test_an_engine_that_was_used_works_in_a_forked_child(shard_sets, kind, train):
    """In training its threads are loading the next epoch already, and the child has none of them."""
    loader = Loader(shard_sets[kind].select("train"), batch_size=8, resolution=32, train=train, threads=2)

    def epoch():
        loader.set_epoch(1)
        return [int(batch.images.long().sum()) for batch in loader]

    expected = epoch()
    loader.set_epoch(0)
    for _ in loader:
        pass
    assert in_a_fork(lambda: str(epoch())) == str(expected)
    assert epoch() == expected  # and in the parent as before
    loader.close()


@pytest.mark.usefixtures("built")
def test_an_iteration_that_began_before_a_fork_ends_in_one_line_in_the_child(shard_sets):
    loader = Loader(shard_sets["raw"].select("train"), batch_size=8, resolution=32, threads=2)
    with closing(iter(loader)) as iterator:
        next(iterator)
        found = in_a_fork(lambda: str(next(iterator).images.shape))
        assert "forked" in found and "start its iteration again" in found
        next(iterator)
    loader.close()


def test_a_path_is_absolute_once_a_set_is_opened(tiny_shards, monkeypatch, tmp_path):
    monkeypatch.chdir(tiny_shards.parent)
    data = ShardSet(Path(tiny_shards.name))
    monkeypatch.chdir(tmp_path)
    assert len(data.read(0)) and len(pickle.loads(pickle.dumps(data))) == len(data)


@pytest.mark.skipif(compiled() is None, reason="the compiled library was not built")
def test_a_batch_that_nobody_waits_for_ends_before_its_memory_is_used_again(shard_sets):
    data = shard_sets["raw"]
    workers, samples = Workers(data, 2, False), np.arange(60)
    boxes = np.tile(np.array([0, 0, 72, 96], np.int32), (60, 1))
    for _ in range(20):
        out = np.zeros((60, 256, 256, 3), np.uint8)
        Loading(workers, samples, out, CROPS, boxes=boxes, symmetry=np.zeros(60, np.uint8))  # dropped at once
        assert not workers.held
    workers.close()


@pytest.mark.usefixtures("built")
def test_a_loader_that_was_closed_loads_nothing_more(shard_sets):
    loader = Loader(shard_sets["jpg"].select("train"), batch_size=8, resolution=32, threads=2)
    running = iter(loader)
    next(running)
    loader.close()
    for iterator in (running, iter(loader)):
        with pytest.raises(RuntimeError, match=r"closed|shutdown"):
            list(iterator)


def test_a_loader_is_collected_while_it_runs(shard_sets):
    loader = Loader(shard_sets["jpg"].select("train"), batch_size=8, resolution=32, threads=2)
    running = iter(loader)
    next(running)
    loader.itself = loader, running  # only the garbage collector finds it, and in any order
    gone = weakref.ref(loader)
    del loader, running
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(compiled() is None, reason="the compiled library was not built")
def test_more_threads_than_the_system_has_are_refused_in_one_line(shard_sets):
    script = (
        "import resource, sys; from shards import Loader, ShardSet; from shards.kernels.workers import Workers; "
        "resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30)); Workers(ShardSet(sys.argv[1]), 100_000, False)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(shard_sets["jpg"].path)], capture_output=True, text=True)
    assert "UsageError: threads 100000: the system could not start so many" in done.stderr


@pytest.mark.skipif(compiled() is None, reason="the compiled library was not built")
def test_a_batch_whose_shard_cannot_be_mapped_holds_nothing(shard_sets, monkeypatch):
    def lost(shard):
        raise DataError("it cannot be mapped")

    with ShardSet(shard_sets["jpg"].path) as data, Workers(data, 1, False) as workers:
        monkeypatch.setattr(data, "shard", lost)
        with pytest.raises(DataError, match="cannot be mapped"):
            Loading(workers, np.arange(3), np.empty((3, 8, 8, 3), np.uint8), CROPS, boxes=np.ones((3, 4), np.int32))
        assert not workers.held
