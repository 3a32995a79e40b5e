"""What every engine does: native's pixels in whole epochs, valid batches, an error that names a damaged sample."""

import gc

import pytest
import torch

from shards import Loader, ShardSet
from shards.common.errors import DataError
from shards.engines import ENGINES
from shards.engines.dali import VARIANTS, DaliEngine
from tests.conftest import growth_bytes, write_set
from tests.support.parity import assert_parity, batches, equal, flip_a_bit


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


@pytest.mark.parametrize("engine", ["native", "dali"])
@pytest.mark.parametrize("kind", ["jpg", "mixed"])
def test_threads_and_batches_ahead_change_nothing(shard_sets, engine, kind):
    """Fewer threads get larger tasks."""
    selection, found = shard_sets[kind].select("train"), []
    for threads, prefetch in ((1, 1), (2, 5), (5, 2), (16, 2)):
        options = {"batch_size": 20, "resolution": 40, "threads": threads, "prefetch": prefetch}
        loader = Loader(selection, engine=engine, **options)
        found.append(batches(loader))
        loader.close()
    assert all(equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["jpg", "raw"])
def test_a_damaged_sample_is_named_after_the_batches_before_it(tmp_path, kind, engine):
    folder = write_set(tmp_path / "set", kind, images=60)
    name = flip_a_bit(folder, 21)
    loader = Loader(ShardSet(folder).select("train"), batch_size=4, resolution=32, engine=engine, train=False)
    for _ in range(2):  # a second time too: the engine is still of use
        taken = []
        with pytest.raises(DataError, match=f"{name}: damaged in .*shard-00000.tar") as error:
            taken.extend(batch.samples for batch in loader)
        assert type(error.value) is DataError and len(taken) == (0 if engine == "resident" else 21 // 4)
    problems = dict(ShardSet(folder).verify())
    assert len(problems["shard-00000.tar"]) == 2 and not problems["shard-00001.tar"]


@pytest.mark.parametrize(
    ("engine", "kind"), [("native", "jpg"), ("native", "raw"), pytest.param("dali", "mixed", marks=pytest.mark.slow)]
)
def test_memory_stays_constant_over_epochs(shard_sets, engine, kind):
    """Memory grows by no more than the batches ahead. A batch kept in each epoch would show as 15."""
    options = {"batch_size": 8, "resolution": 160, "threads": 2, "prefetch": 2}
    loader = Loader(shard_sets[kind].select("train"), engine=engine, **options)

    def epoch(number: int) -> None:
        loader.set_epoch(number)
        for batch in loader:
            assert len(batch.images) == 8

    assert growth_bytes(epoch) <= (8 if engine == "dali" else 4) * 8 * 160 * 160 * 3
