"""The Loader on the native engine: pixels against a plain reading, the same batches whatever the ranks and restarts."""

import gc
import hashlib
import json
import threading

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from shards import Augment, Loader, ShardSet, jpeg
from shards.common.errors import DataError, UsageError
from shards.engines import resample
from shards.kernels.load import in_use
from tests.conftest import growth_bytes, write_set


def batches(loader):
    return [(b.images.clone(), b.labels, b.samples, b.colour, b.mask) for b in loader]


def equal(a, b):
    return len(a) == len(b) and all(all(map(torch.equal, x, y)) for x, y in zip(a, b, strict=True))


def plain_symmetry(image, symmetry):
    """The definition in Plan's docstring, in numpy."""
    if symmetry & 4:
        image = image.transpose(1, 0, 2)
    if symmetry & 1:
        image = image[:, ::-1]
    if symmetry & 2:
        image = image[::-1]
    return image


@pytest.mark.parametrize("kind", ["jpg", "raw", "mixed", "sizes"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("built", [True, False])
def test_pixels_equal_a_plain_reading(shard_sets, kind, train, built, monkeypatch):
    """Without the compiled kernels to the bit, for OpenCV makes both; with them within 1."""
    if not built:
        for module in (resample, jpeg):
            monkeypatch.setattr(module, "compiled", lambda: None)
    exact = not built or in_use()["resize"] == "opencv"
    data = shard_sets[kind]
    selection = data.select("train")
    loader = Loader(selection, batch_size=16, resolution=48, train=train, seed=4, engine="native")
    order, plan = loader.plan()
    at = {int(selection.samples[p]): p for p in order}
    count = 0
    for batch in loader:
        assert batch.images.dtype == torch.uint8 and batch.images.shape[1:] == (3, 48, 48)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for image, label, sample, colour, mask in zip(
            batch.images, batch.labels, batch.samples.tolist(), batch.colour, batch.mask, strict=True
        ):
            y, x, h, w = plan.boxes[at[sample]]
            crop = np.ascontiguousarray(data.pixels(sample)[y : y + h, x : x + w])
            expected = plain_symmetry(cv2.resize(crop, (48, 48)), plan.symmetry[at[sample]])
            difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected)
            assert difference.max() <= (0 if exact else 1) and difference.mean() < 0.25
            assert label == data.column("label")[sample]
            assert np.array_equal(colour.numpy(), plan.colour[at[sample]])
            count += bool(mask)
    assert count == (len(selection) // 16 * 16 if train else len(selection))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_global_batches_are_the_same_for_every_world_size(tiny_shards, world_size, train):
    selection = ShardSet(tiny_shards).select("train", fraction=0.6)
    options = {"batch_size": 10, "resolution": 32, "train": train, "seed": 1}
    whole = batches(Loader(selection, **options))
    ranks = [batches(Loader(selection, **options, rank=r, world_size=world_size)) for r in range(world_size)]
    joined = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert equal(whole, joined)


def test_a_set_closed_or_mapped_by_many_threads_at_once_keeps_its_bytes(tiny_shards):
    """Threads meet at the first sample of a shard: the mapping whose address one has must not be another's to drop."""
    expected = batches(Loader(ShardSet(tiny_shards).select("train"), batch_size=8, resolution=32, threads=1))
    for _ in range(20):
        data = ShardSet(tiny_shards)
        loader = Loader(data.select("train"), batch_size=8, resolution=32, threads=8, prefetch=8)
        found = []
        for batch in loader:
            found.append((batch.images.clone(), batch.labels, batch.samples, batch.colour, batch.mask))
            data.close()
        loader.close()
        assert equal(expected, found)


def test_an_epoch_is_a_permutation_and_epochs_differ(tiny_shards):
    selection = ShardSet(tiny_shards).select("train")
    loader = Loader(selection, batch_size=8, resolution=32)
    first, second = (torch.cat([b.samples for b in loader]) for _ in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == selection.samples.tolist()
    assert first.tolist() != second.tolist()


def test_epochs_run_into_each_other_unseen(tiny_shards):
    """The next epoch's batches are under way when one ends; whatever is asked for next, the right ones come."""

    def fresh(epoch, resolution=32):
        loader = Loader(ShardSet(tiny_shards).select("train"), batch_size=8, resolution=resolution)
        loader.set_epoch(epoch)
        return batches(loader)

    loader = Loader(ShardSet(tiny_shards).select("train"), batch_size=8, resolution=32)
    assert equal(batches(loader), fresh(0)) and loader.epoch == 1
    assert equal(batches(loader), fresh(1))  # straight on
    loader.set_epoch(7)
    assert equal(batches(loader), fresh(7))  # another epoch
    loader.set_resolution(48)
    assert equal(batches(loader), fresh(8, 48))  # another size
    running = iter(loader)
    for _ in range(len(loader)):
        next(running)
    running.close()  # left right after the last batch
    assert equal(batches(loader), fresh(10, 48))
    running = iter(loader)
    next(running)
    running.close()  # left in the middle: the epoch starts anew
    assert equal(batches(loader), fresh(11, 48))
    loader.close()


@pytest.mark.parametrize("stop", [0, 1, 5, 8, 9, 13])
def test_a_loader_resumed_anywhere_goes_on_with_the_same_batches(tiny_shards, stop):
    def fresh(rank=0, world_size=1):
        selection = ShardSet(tiny_shards).select("train")
        return Loader(selection, batch_size=8, resolution=32, seed=7, rank=rank, world_size=world_size)

    def stream(loader, epochs=3):
        for epoch in range(loader.epoch, epochs):
            loader.set_epoch(epoch)
            yield from loader

    everything = [b.samples.tolist() for b in stream(fresh())]
    loader, seen = fresh(), []
    running = stream(loader)
    seen += [next(running).samples.tolist() for _ in range(stop)]
    state = loader.state_dict()
    running.close()
    assert all(isinstance(v, int | str | bool) for v in state.values())
    resumed = fresh()
    resumed.load_state_dict(state)
    assert seen + [b.samples.tolist() for b in stream(resumed)] == everything
    halves = [fresh(rank, 2) for rank in range(2)]  # and by another number of processes
    for half in halves:
        half.load_state_dict(state)
    parts = zip(*map(stream, halves), strict=True)
    assert seen + [a.samples.tolist() + b.samples.tolist() for a, b in parts] == everything


def test_a_state_at_the_end_of_an_evaluation_starts_the_next_one(tiny_shards):
    def fresh():
        return Loader(ShardSet(tiny_shards).select("val"), batch_size=8, resolution=32, train=False)

    loader = fresh()
    everything = [b.samples.tolist() for b in loader]
    resumed = fresh()
    resumed.load_state_dict(loader.state_dict())
    assert everything and [b.samples.tolist() for b in resumed] == everything


def test_a_state_of_another_loader_is_refused_by_name(tiny_shards):
    data = ShardSet(tiny_shards)
    state = Loader(data.select("train"), batch_size=8, seed=1).state_dict()
    with pytest.raises(UsageError, match="seed 1 → 2"):
        Loader(data.select("train"), batch_size=8, seed=2).load_state_dict(state)
    with pytest.raises(UsageError, match="selection"):
        Loader(data.select("train", fraction=0.5), batch_size=8, seed=1).load_state_dict(state)
    with pytest.raises(UsageError, match="version"):
        Loader(data.select("train"), batch_size=8).load_state_dict({"version": 9})


def test_batches_stay_valid_when_kept_and_buffers_are_used_again(tiny_shards):
    selection = ShardSet(tiny_shards).select("train")
    loader = Loader(selection, batch_size=8, resolution=32, prefetch=2)
    kept = [b.images for b in loader]
    loader.set_epoch(0)
    assert all(map(torch.equal, kept, [images for images, *_ in batches(loader)]))
    del kept
    addresses = set()
    for epoch in range(6):
        loader.set_epoch(epoch)
        addresses |= {b.images.data_ptr() for b in loader}
    # 54 batches of 6 epochs: those ahead, the one in hand, and the one before it. The kept ones above are found again.
    assert len(addresses) <= 9 + 4


def test_a_damaged_sample_is_named(tmp_path):
    folder = write_set(tmp_path / "set", images=60)
    data = ShardSet(folder)
    victim = int(data.select("train").samples[5])
    file = folder / data.manifest.shards[int(data.column("shard")[victim])].file
    content = bytearray(file.read_bytes())
    content[int(data.column("offset")[victim]) + 700] ^= 0x10
    file.write_bytes(content)
    damaged = ShardSet(folder)
    with pytest.raises(DataError, match=f"{data.column('image_id')[victim]}: damaged in .*shard-00000.tar"):
        batches(Loader(damaged.select("train"), batch_size=4, resolution=32))
    problems = dict(damaged.verify())
    assert len(problems[file.name]) == 2 and not problems["shard-00001.tar"]


def say_in_the_index(folder, sizes):
    """Write an index, with its checksum in the manifest, in which all images have other sizes (height, width)."""
    table = pq.read_table(folder / "index.parquet")
    for name, value in sizes.items():
        place = table.schema.get_field_index(name)
        values = pa.array([value] * len(table), table.schema.field(name).type)
        table = table.set_column(place, table.schema.field(name), values)
    pq.write_table(table, folder / "index.parquet")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["index_sha256"] = hashlib.sha256((folder / "index.parquet").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["jpg", "raw"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"height": 144},
        {"width": 9600},
        {"height": 65535, "width": 1},
        {"height": 1, "width": 65535},
        {"height": 0},
        {"width": 0},
    ],
)
@pytest.mark.parametrize("built", [True, False])
def test_a_size_that_is_not_the_images_is_refused(tmp_path, kind, sizes, built, monkeypatch):
    """A crop at a place that the image does not have: never what memory holds there."""
    if not built:
        for module in (resample, jpeg):
            monkeypatch.setattr(module, "compiled", lambda: None)
    folder = write_set(tmp_path / "set", kind, images=60)
    say_in_the_index(folder, sizes)
    at_once = "its payload is shorter than its image|its height or width is 0"  # when the set is opened
    with pytest.raises(DataError, match=rf"damaged in .*does not decode to the size that the index says|{at_once}"):
        batches(Loader(ShardSet(folder).select("train"), batch_size=4, resolution=32, engine="native"))


def test_leaving_an_epoch_early_stops_its_work(tiny_shards):
    before = set(threading.enumerate())
    loader = Loader(ShardSet(tiny_shards).select("train"), batch_size=8, resolution=32, threads=2)
    for _ in range(3):
        running = iter(loader)
        next(running)
        running.close()
    loader.close()
    gc.collect()
    assert set(threading.enumerate()) <= before  # those that earlier tests left may end meanwhile


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch size 0"),
        ({"batch_size": 1000}, "larger than the training set of 72"),
        ({"batch_size": 4, "resolution": 0}, "resolution 0"),
        ({"batch_size": 4, "prefetch": 0}, "prefetch 0"),
        ({"batch_size": 4, "threads": 0}, "threads 0"),
        ({"batch_size": 4, "engine": "warp"}, "auto, native, dali, resident"),
        ({"batch_size": 4, "rank": 3, "world_size": 2}, "rank 3"),
        ({"batch_size": 4, "seed": -1}, "seed -1"),
    ],
)
def test_wrong_values_are_refused_by_name(tiny_shards, options, words):
    with pytest.raises(UsageError, match=words):
        Loader(ShardSet(tiny_shards).select("train"), **options)


def test_augment_is_obeyed(tiny_shards):
    selection = ShardSet(tiny_shards).select("train")
    plain = Augment(scale=(1, 1), symmetries=False, brightness=0, contrast=0, saturation=0, hue=0)
    batch = next(iter(Loader(selection, batch_size=8, resolution=32, augment=plain)))
    identity = torch.eye(3, 4).expand(8, 3, 4)
    assert torch.allclose(batch.colour, identity, atol=1e-6)


def test_memory_stays_constant_over_epochs(shard_sets):
    """Memory grows by no more than the prefetch buffers."""
    for kind in ("jpg", "raw"):
        loader = Loader(shard_sets[kind].select("train"), batch_size=8, resolution=160, threads=2, prefetch=2)
        batch_bytes = 8 * 160 * 160 * 3

        def epoch(number: int, loader: Loader = loader) -> None:
            loader.set_epoch(number)
            for batch in loader:
                assert len(batch.images) == 8

        assert growth_bytes(epoch) <= (2 + 2) * batch_bytes, kind
