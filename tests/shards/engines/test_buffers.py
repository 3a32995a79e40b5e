"""The memory that batches travel in: written again only when nothing reads it any more, and given back at the end."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import closing, nullcontext

import numpy as np
import pytest
import torch

from shards import Loader, ShardSet, decode
from shards.engines import dali, native, transfer
from shards.engines.native import NativeEngine
from tests.support.parity import requests_of


def test_no_row_of_a_decoded_jpeg_is_written_past_the_caches(tiny_shards, monkeypatch):
    """libjpeg-turbo does that where a row starts at a multiple of 32 bytes; JPEG's blocks are 8 or 16 px wide."""
    decode, starts = native.simplejpeg.decode_jpeg, []

    def watched(encoded, buffer):
        image = decode(encoded, buffer=buffer)
        starts.extend(
            image.ctypes.data + row * image.strides[0] for row in range(len(image)) if image.shape[1] % 8 == 0
        )
        return image

    monkeypatch.setattr(native.simplejpeg, "decode_jpeg", watched)
    monkeypatch.setattr(native, "start_workers", lambda *_: None)  # they have a decoder of their own
    with closing(Loader(ShardSet(tiny_shards).select("train"), batch_size=8, engine="native", threads=2)) as loader:
        for _ in loader:
            pass
    assert len(starts) > 1000 and not [start for start in starts if start % 32 == 0]


@pytest.mark.parametrize("size", [1, 31, 262_144, 5_000_000])
def test_memory_for_pixels_holds_what_is_asked_for(size):
    kept = [decode.cached_pixels(size) for _ in range(5)]
    assert all(len(pixels) == size and pixels.flags.c_contiguous and pixels.flags.writeable for pixels in kept)
    assert all(pixels.ctypes.data % 32 == 4 for pixels in kept)


class Copy:
    """Stands in for the event behind a copy that is not done before somebody waits for it."""

    made: list["Copy"] = []  # noqa: RUF012 (the fixture empties it)

    def __init__(self) -> None:
        self.done = False
        self.made.append(self)

    def record(self, stream: object) -> None:
        """Nothing: the copy goes on."""

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True


@pytest.fixture
def copies(monkeypatch) -> list[Copy]:
    """The copies of `to_device`, made without CUDA."""
    monkeypatch.setattr(Copy, "made", [])
    monkeypatch.setattr(torch.cuda, "Event", Copy)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(transfer, "hand_over", lambda images, done, device: images)
    return Copy.made


def buffers(broken: bool = False, count: int = 4) -> Iterator[np.ndarray]:
    for _ in range(count):
        yield np.zeros((2, 8, 8, 3), np.uint8)
    if broken:
        raise ValueError("damaged")


def test_copies_are_waited_for_at_the_end(copies):
    assert len(list(transfer.to_device(buffers(), "cpu"))) == 4
    assert [copy.done for copy in copies] == [True] * 4


def test_copies_are_waited_for_where_the_consumer_stops_early(copies):
    batches = transfer.to_device(buffers(), "cpu")
    next(batches)
    assert [copy.done for copy in copies] == [False] * 2  # meanwhile the host waits for none
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert [copy.done for copy in copies] == [True] * 2


def test_only_so_many_buffers_are_held_by_copies(copies):
    batches = transfer.to_device(buffers(count=9), "cpu")
    for number in range(1, 8):
        next(batches)
        begun = number + 1
        assert [copy.done for copy in copies] == [True] * max(begun - 4, 0) + [False] * min(begun, 4)
    assert len(list(batches)) == 2


def test_large_buffers_are_held_by_fewer_copies(copies, monkeypatch):
    monkeypatch.setattr(transfer, "_MOST_BYTES", 2 * 2 * 8 * 8 * 3 + 1)  # two of them
    batches = transfer.to_device(buffers(count=6), "cpu")
    for begun in range(2, 7):
        next(batches)
        assert [copy.done for copy in copies] == [True] * (begun - 2) + [False] * 2


@pytest.mark.parametrize(("most_bytes", "copies_held"), [(1, 1), (1 << 30, 4)])
def test_the_page_locked_memory_of_an_engine_is_bounded(shard_sets, copies, monkeypatch, most_bytes, copies_held):
    """Copies never end by themselves here: a run takes prefetch + 2 buffers, and those of the copies."""
    made: list[tuple[int, ...]] = []
    to_device = transfer.to_device
    monkeypatch.setattr(transfer, "_MOST_BYTES", most_bytes)
    monkeypatch.setattr(transfer, "pinned_buffer", lambda shape: made.append(shape) or np.empty(shape, np.uint8))
    monkeypatch.setattr(transfer, "to_device", lambda buffers, device: to_device(buffers, "cpu"))
    with closing(NativeEngine(shard_sets["jpg"], "cuda:0", threads=1, prefetch=2)) as engine:
        for images in engine.run(requests_of(shard_sets["jpg"], [2] * 25), 32):
            assert images.shape == (2, 32, 32, 3)
            del images
    large = [shape for shape in made if shape[0] == 2]
    assert len(copies) == 25 and copies_held + 3 <= len(large) <= 2 + 2 + copies_held


def test_copies_are_waited_for_where_loading_fails(copies):
    with pytest.raises(ValueError, match="damaged"):
        list(transfer.to_device(buffers(broken=True), "cpu"))
    assert [copy.done for copy in copies] == [True] * 4


def dalis_batches(closed: list[bool]) -> Iterator[torch.Tensor]:
    try:
        for _ in range(4):
            yield torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    finally:
        closed.append(True)


def test_dali_gets_a_batch_back_when_its_copy_is_done(copies, monkeypatch):
    """Until then it is held, though the copy was handed over; closing early waits for what is under way."""
    held, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda batch: held.append(weakref.ref(batch)) or clone(batch))
    closed: list[bool] = []
    owned = dali._copies(dalis_batches(closed), 0)  # pyright: ignore[reportArgumentType]  # a generator
    own, done = next(owned)
    assert done is copies[0]
    next(owned)
    assert [ref() is not None for ref in held] == [True, True]
    copies[0].done = True
    next(owned)
    assert [ref() is not None for ref in held] == [False, True, True]
    owned.close()
    assert [copy.done for copy in copies] == [True] * 3 and closed == [True]
    assert own.shape == (2, 8, 8, 3)


def test_a_closed_engine_gives_its_buffers_back_and_batches_stay_valid(shard_sets):
    engine = NativeEngine(shard_sets["jpg"], threads=1)
    batch, *others = list(engine.run(requests_of(shard_sets["jpg"], [6, 6, 6]), 32))
    before = batch.clone()
    held = [weakref.ref(room.images) for room in engine._rooms._held]
    del others
    assert len(held) == 3
    engine.close()
    gc.collect()
    assert sum(ref() is not None for ref in held) == 1
    assert torch.equal(batch, before)
