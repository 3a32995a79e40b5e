"""The engines against native: the same pixels and order in whole epochs, for every rank and after restarts."""

import gc

import pytest
import torch

from shards import Loader
from shards.engines.dali import VARIANTS, DaliEngine
from tests.support.parity import assert_parity, batches

ENGINES = ("dali", "resident")


@pytest.mark.parametrize("engine", [*(f"dali {variant}" for variant in VARIANTS), "resident"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["jpg", "raw", "mixed", "sizes"])
def test_whole_epochs_equal_native_at_every_resolution(shard_sets, kind, train, engine):
    name, _, variant = engine.partition(" ")
    selection = shard_sets[kind].select("train")
    native, loader = (Loader(selection, batch_size=12, train=train, seed=3, engine=e) for e in ("native", name))
    if isinstance(loader._engine, DaliEngine):
        contents = loader._engine.graph.contents
        assert contents == {"jpg": "jpg", "raw": "raw"}.get(kind, "mixed")
        loader._engine.close()
        loader._engine = DaliEngine(selection.data, contents=contents, variant=variant)
    for epoch, resolution in enumerate((48, 32, 37, 150)):  # 150 px enlarges every crop
        for one in (native, loader):
            one.set_epoch(epoch)
            one.set_resolution(resolution)
        # resident rounds as OpenCV does, except for a few ties
        assert_parity(batches(native), batches(loader), mean=0.001 if engine == "resident" else 0.25)
    loader.close()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_equals_native(shard_sets, world_size, engine):
    selection = shard_sets["sizes"].select("train")
    for rank in range(world_size):
        for train in (True, False):
            options = {"batch_size": 10, "resolution": 40, "seed": 2, "rank": rank, "world_size": world_size}
            native, loader = (Loader(selection, train=train, engine=e, **options) for e in ("native", engine))
            assert_parity(batches(native), batches(loader))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("train", [True, False])
def test_a_restart_in_mid_epoch_continues_as_native_does(shard_sets, train, engine):
    selection = shard_sets["mixed"].select("train")
    options = {"batch_size": 8, "resolution": 32, "train": train, "seed": 7}
    whole = batches(Loader(selection, engine="native", **options))
    stopped, resumed = (Loader(selection, engine=engine, **options) for _ in range(2))
    running = iter(stopped)
    for _ in range(3):
        next(running)
    state = stopped.state_dict()
    running.close()
    for loader in (resumed, stopped):
        loader.load_state_dict(state)
        assert_parity(whole[3:], batches(loader))


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_stay_valid_when_kept(shard_sets, engine):
    loader = Loader(shard_sets["mixed"].select("train"), batch_size=8, resolution=64, engine=engine)
    kept = [batch.images for batch in loader]
    copies = [images.clone() for images in kept]
    for epoch in (1, 2):  # overwrite all memory that is reused
        loader.set_epoch(epoch)
        batches(loader)
    loader.close()
    del loader
    gc.collect()
    assert all(map(torch.equal, kept, copies))
