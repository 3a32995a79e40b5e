"""What every engine does: native's pixels in whole epochs, valid batches, an error that names a damaged sample."""

import gc

import pytest
import torch

from shards import Augment, Loader, ShardSet
from shards.common.errors import DataError
from shards.engines import ENGINES, native, resample
from shards.engines.dali import VARIANTS, DaliEngine
from shards.kernels.load import in_use
from tests.conftest import growth_bytes, write_set
from tests.support.parity import assert_parity, batches, equal, flip_a_bit

KINDS = [(kind, "bilinear") for kind in ("jpg", "raw", "mixed", "sizes")]
KINDS += [("mixed", "bicubic")]


@pytest.mark.parametrize("engine", [*(f"dali {variant}" for variant in VARIANTS), "resident"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("kind", "interpolation"), KINDS)
def test_whole_epochs_equal_native_at_every_resolution(shard_sets, kind, interpolation, train, engine):
    name, _, variant = engine.partition(" ")
    selection, augment = shard_sets[kind].select("train"), Augment(interpolation=interpolation)
    options = {"batch_size": 12, "train": train, "seed": 3, "augment": augment}
    oracle, loader = (Loader(selection, engine=e, **options) for e in ("native", name))
    if isinstance(loader._engine, DaliEngine):
        contents = loader._engine.graph.contents
        assert contents == {"jpg": "jpg", "raw": "raw"}.get(kind, "mixed")
        loader._engine.close()
        graph = {"contents": contents, "variant": variant, "interpolation": interpolation}
        loader._engine = DaliEngine(selection.data, **graph)
    for epoch, resolution in enumerate((48, 32, 37, 150)):  # 150 px enlarges every crop
        for one in (oracle, loader):
            one.set_epoch(epoch)
            one.set_resolution(resolution)
        # without the kernel, native takes OpenCV for bilinear, which rounds in other places
        exact = engine == "resident" and (interpolation == "bicubic" or in_use()["resize"] != "opencv")
        assert_parity(batches(oracle), batches(loader), mean=1e-9 if exact else 0.25)
    loader.close()


def test_bicubic_is_the_same_without_the_library(shard_sets, monkeypatch):
    options = {"batch_size": 12, "resolution": 40, "engine": "native", "augment": Augment(interpolation="bicubic")}
    expected = batches(Loader(shard_sets["mixed"].select("train"), **options))
    monkeypatch.setattr(native, "start_workers", lambda *_: None)
    monkeypatch.setattr(resample, "compiled", lambda: None)
    assert equal(expected, batches(Loader(shard_sets["mixed"].select("train"), **options)))


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
