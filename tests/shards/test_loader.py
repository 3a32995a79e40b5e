"""The Loader on the native engine: pixels against a plain reading, the same batches whatever the ranks and restarts."""

import gc
import shutil
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from shards import Augment, Loader, ShardSet
from shards.common.errors import DataError, UsageError
from shards.kernels.load import in_use
from tests.conftest import write_set
from tests.support.parity import batches, change_manifest, equal, with_cells, write_index


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
def test_pixels_equal_a_plain_reading(shard_sets, kind, train, built):
    """Without the compiled kernels to the bit, for OpenCV makes both; with them within 1."""
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


def test_a_set_closed_or_mapped_by_many_threads_at_once_keeps_its_bytes(tiny_shards):
    """Threads meet at the first sample of a shard: the mapping whose address one has must not be another's to drop."""
    expected = batches(Loader(ShardSet(tiny_shards).select("train"), batch_size=8, resolution=32, threads=1))
    for _ in range(20):
        data = ShardSet(tiny_shards)
        loader = Loader(data.select("train"), batch_size=8, resolution=32, threads=8, prefetch=8)
        found = []
        for batch in loader:
            found.append(batch._replace(images=batch.images.clone()))
            data.close()
        loader.close()
        assert equal(expected, found)


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


def balanced(tiny_shards, sampler="balanced", **more):
    """Of a selection in which some classes have one sample."""
    selection = ShardSet(tiny_shards).select("train")
    _, first = np.unique(selection.labels, return_index=True)
    kept = np.union1d(first, np.flatnonzero(selection.labels >= 4))
    return Loader(
        replace(selection, samples=selection.samples[kept]),
        **({"batch_size": 8, "resolution": 32, "seed": 1, "sampler": sampler} | more),
    )


def test_a_balanced_epoch_repeats_samples_in_other_crops(tiny_shards):
    labels, seen = [], {}
    for batch in balanced(tiny_shards):
        labels += batch.labels.tolist()
        for sample, image in zip(batch.samples.tolist(), batch.images.numpy().copy(), strict=True):
            seen.setdefault(sample, []).append(image.tobytes())
    counts = np.bincount(labels)
    assert np.ptp(counts[counts > 0]) <= 8  # the last, incomplete batch is dropped
    assert max(map(len, seen.values())) > 2
    assert all(len(set(images)) == len(images) for images in seen.values())


def test_a_weighted_epoch_has_each_sample_by_its_weight_in_other_crops(tiny_shards):
    seen, times = {}, np.zeros(7)
    for batch in balanced(tiny_shards, "weighted:label", batch_size=1):
        times[int(batch.labels)] += 1
        seen.setdefault(int(batch.samples), set()).add(batch.images.numpy().tobytes())
    labels = balanced(tiny_shards).selection.labels
    wanted = np.bincount(labels, labels, 7) / labels.sum() * len(labels)
    assert np.abs(times - wanted).max() <= 1 + len(labels) / 7 and times[0] == 0 < wanted[6]
    assert sum(map(len, seen.values())) == len(labels)  # no crop comes twice


def test_weights_are_a_column_of_numbers(tiny_shards):
    for column, text in (
        ("sex", "no such column of numbers"),
        ("", "is unknown"),
        ("age", "needs a weight of 0 or more"),
    ):
        with pytest.raises(UsageError, match=f"sampler .?weighted:{column}.*{text}"):
            balanced(tiny_shards, f"weighted:{column}")


@pytest.mark.parametrize("engine", ["native", "resident", "dali"])
@pytest.mark.parametrize("sampler", ["balanced", "weighted:label"])
def test_a_balanced_epoch_is_the_same_for_engines_processes_and_restarts(tiny_shards, engine, sampler):
    expected = batches(balanced(tiny_shards, sampler))
    ranks = [batches(balanced(tiny_shards, sampler, engine=engine, rank=rank, world_size=2)) for rank in range(2)]
    assert len(expected) == len(ranks[0]) > 2
    for whole, *parts in zip(expected, *ranks, strict=True):
        assert torch.equal(whole.samples, torch.cat([part.samples for part in parts]))
        images = torch.cat([part.images for part in parts])
        assert (whole.images.int() - images.int()).abs().max() <= (1 if engine == "dali" else 0)
    loader = balanced(tiny_shards, sampler, engine=engine)
    passes = iter(loader)
    next(passes)
    resumed = balanced(tiny_shards, sampler, engine=engine)
    resumed.load_state_dict(loader.state_dict())
    for whole, batch in zip(expected[1:], resumed, strict=True):
        assert torch.equal(whole.samples, batch.samples) and torch.equal(whole.colour, batch.colour)


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """A set whose training split has several shards."""
    return write_set(tmp_path_factory.mktemp("sets") / "many", "raw", images=600)


@pytest.mark.parametrize("engine", ["native", "resident", "dali"])
def test_a_windowed_epoch_is_the_same_for_engines_processes_and_restarts(many_shards, engine):
    def fresh(**more):
        return Loader(ShardSet(many_shards).select("train"), batch_size=8, resolution=32, seed=1, window=2, **more)

    expected, loader = batches(fresh()), fresh(engine=engine)
    shards = loader.selection.data.column("shard")
    assert len(np.unique(shards[loader.selection.samples])) > 4
    assert all(len(np.unique(shards[batch.samples.numpy()])) <= 3 for batch in expected)
    ranks = [batches(fresh(engine=engine, rank=rank, world_size=2)) for rank in range(2)]
    for whole, *parts in zip(expected, *ranks, strict=True):
        assert torch.equal(whole.samples, torch.cat([part.samples for part in parts]))
        images = torch.cat([part.images for part in parts])
        assert (whole.images.int() - images.int()).abs().max() <= (1 if engine == "dali" else 0)
    passes = iter(loader)
    next(passes)
    resumed = fresh(engine=engine)
    resumed.load_state_dict(loader.state_dict())
    for whole, batch in zip(expected[1:], resumed, strict=True):
        assert torch.equal(whole.samples, batch.samples) and torch.equal(whole.colour, batch.colour)
    assert np.array_equal(
        np.concatenate([b.samples for b in expected]),
        resumed.selection.samples[fresh().plan(0)[0]][: 8 * len(expected)],
    )


def test_a_window_is_refused_where_it_means_nothing(many_shards):
    selection = ShardSet(many_shards).select("train")
    for more in ({"window": 0}, {"window": 2, "sampler": "balanced"}):
        with pytest.raises(UsageError, match=f"window {more['window']}: give 1 shard or more"):
            Loader(selection, batch_size=8, **more)
    state = Loader(selection, batch_size=8).state_dict()
    with pytest.raises(UsageError, match="window 0 → 2"):
        Loader(selection, batch_size=8, window=2).load_state_dict(state)


def test_a_loader_is_not_taken_for_a_dataloader(tiny_shards):
    """Lightning's validation looks for a `sampler`, and then for all that a DataLoader has."""
    with closing(Loader(ShardSet(tiny_shards).select("train"), batch_size=8, sampler="balanced")) as loader:
        assert not any(hasattr(loader, name) for name in ("sampler", "batch_sampler", "dataset", "collate_fn"))


def test_a_state_of_another_loader_is_refused_by_name(tiny_shards):
    data = ShardSet(tiny_shards)
    state = Loader(data.select("train"), batch_size=8, seed=1).state_dict()
    with pytest.raises(UsageError, match="seed 1 → 2"):
        Loader(data.select("train"), batch_size=8, seed=2).load_state_dict(state)
    with pytest.raises(UsageError, match="selection"):
        Loader(data.select("train", fraction=0.5), batch_size=8, seed=1).load_state_dict(state)
    with pytest.raises(UsageError, match="resolution 224 → 192"):
        Loader(data.select("train"), batch_size=8, seed=1, resolution=192).load_state_dict(state)
    with pytest.raises(UsageError, match=r"augment_hue 0\.02 → 0\.1; go on"):
        Loader(data.select("train"), batch_size=8, seed=1, augment=Augment(hue=0.1)).load_state_dict(state)
    del state["sampler"]  # as in older releases
    with pytest.raises(UsageError, match="sampler uniform → balanced"):
        Loader(data.select("train"), batch_size=8, seed=1, sampler="balanced").load_state_dict(state)
    Loader(data.select("train"), batch_size=8, seed=1).load_state_dict(state)
    with pytest.raises(UsageError, match="sampler 'rare' is unknown: use one of uniform, balanced, weighted:COLUMN"):
        Loader(data.select("train"), batch_size=8, sampler="rare")
    cubic = Loader(data.select("train"), batch_size=8, seed=1, augment=Augment(interpolation="bicubic"))
    older = {name: value for name, value in state.items() if name != "augment_interpolation"}
    for taken in (state, older):
        with pytest.raises(UsageError, match="augment_interpolation bilinear → bicubic"):
            cubic.load_state_dict(taken)
    Loader(data.select("train"), batch_size=8, seed=1).load_state_dict(older)
    with pytest.raises(UsageError, match="version"):
        Loader(data.select("train"), batch_size=8).load_state_dict({"version": 9})


@pytest.mark.parametrize(("path", "value"), [("mean", [0.1, 0.2, 0.3]), ("encode", {"jpeg_quality": 70})])
def test_a_state_of_another_normalisation_or_encoding_is_refused_by_name(tiny_shards, tmp_path, path, value):
    other = Path(shutil.copytree(tiny_shards, tmp_path / "set"))
    change_manifest(other, lambda m: m.update({path: m[path] | value if path == "encode" else value}))
    state = Loader(ShardSet(tiny_shards).select("train"), batch_size=8).state_dict()
    changed = Loader(ShardSet(other).select("train"), batch_size=8)
    with pytest.raises(UsageError, match={"mean": "mean .* → ", "encode": "encode_jpeg_quality 90 → 70; go on"}[path]):
        changed.load_state_dict(state)
    names = ("version", "epoch", "batch", "shard_set", "selection", "seed", "batch_size", "train")
    changed.load_state_dict({name: state[name] for name in names})  # of an older release, which names no more


def test_buffers_are_used_again(tiny_shards):
    loader, addresses = Loader(ShardSet(tiny_shards).select("train"), batch_size=8, resolution=32, prefetch=2), set()
    for _ in range(6):
        addresses |= {b.images.data_ptr() for b in loader}
    assert len(addresses) <= 9  # of 54 batches: those ahead, the one in hand, and the one before it


@pytest.mark.parametrize(("height", "width"), [(144, None), (None, 9600), (65535, 1), (1, 65535)])
@pytest.mark.usefixtures("built")
def test_a_size_that_is_not_the_images_is_refused(tmp_path, height, width):
    """A crop at a place that the image does not have: never what memory holds there."""
    folder = write_set(tmp_path / "set", images=60)
    table = pq.read_table(folder / "index.parquet")
    for name, side in (("height", height), ("width", width)):
        table = table if side is None else with_cells(table, name, side, slice(None))
    write_index(folder, table)
    with pytest.raises(DataError, match=r"damaged in .*does not decode to the size that the index says"):
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
