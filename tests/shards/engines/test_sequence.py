"""Elastic and exact: the sequence of (sample, box, symmetry, colour) is the same whoever carries it out.

Recorded where the loader hands work to an engine, and read off the batches: that each engine then does what it is told
is shown by the tests of its pixels.
"""

from collections import deque

import pytest
import torch

from shards import Loader, ShardSet
from shards.engines import ENGINES, Request

EPOCHS, BATCH = 2, 12


class Recorded:
    """An engine that keeps the work it is given."""

    def __init__(self, engine):
        self.engine, self.requests = engine, deque()

    def run(self, requests, resolution):
        self.requests.clear()  # an epoch that runs into the next one stays in the same run

        def watched():
            for request in requests:
                self.requests.append(request)
                yield request

        yield from self.engine.run(watched(), resolution)

    @property
    def draws(self):
        return self.engine.draws

    def draw(self, source, draws, count, resolution):
        self.requests.clear()
        rooms, take = deque(), self.engine._rooms.take
        self.engine._rooms.take = lambda shape: rooms.append(take(shape)) or rooms[-1]
        for batch in self.engine.draw(source, draws, count, resolution):
            room = rooms.popleft()
            self.requests.append(Request(room.samples.copy(), room.boxes.copy(), room.symmetry.copy()))
            yield batch

    def close(self):
        self.engine.close()


def ranks(selection, engine, world_size, train):
    """A recorded loader for each rank."""
    loaders = []
    for rank in range(world_size):
        loader = Loader(
            selection,
            batch_size=BATCH,
            resolution=32,
            train=train,
            seed=11,
            engine=engine,
            rank=rank,
            world_size=world_size,
        )
        loader._engine = Recorded(loader._engine)
        loaders.append(loader)
    return loaders


def sequence(loaders, stop=None, state=None):
    """One entry a sample of the global batches that the ranks load together, up to batch `stop`; and the state then."""
    entries, batches = [], 0
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    first = loaders[0].epoch
    for epoch in range(first, EPOCHS):
        parts = []
        for loader in loaders:
            loader.set_epoch(epoch)
            parts.append(iter(loader))
        for batch in zip(*parts, strict=True):
            for loader, part in zip(loaders, batch, strict=True):
                work = loader._engine.requests.popleft()
                assert part.samples.tolist() == work.samples.tolist()
                for sample, box, symmetry, colour, mask in zip(
                    work.samples, work.boxes, work.symmetry, part.colour, part.mask, strict=True
                ):
                    entries.append(
                        (epoch, int(sample), *box.tolist(), int(symmetry), colour.numpy().tobytes(), bool(mask))
                    )
            batches += 1
            if batches == stop:
                states = [loader.state_dict() for loader in loaders]
                assert all(other == states[0] for other in states)
                for part in parts:
                    part.close()
                return entries, states[0]
    return entries, None


@pytest.mark.parametrize("train", [True, False])
def test_the_sequence_hangs_on_neither_engine_nor_ranks_nor_restarts(shard_sets, train):
    selection = shard_sets["sizes"].select("train")
    expected, _ = sequence(ranks(selection, "native", 1, train))
    per_epoch = len(selection) // BATCH * BATCH if train else -(-len(selection) // BATCH) * BATCH
    assert len(expected) == EPOCHS * per_epoch
    assert len({entry[:2] for entry in expected if entry[-1]}) == EPOCHS * len(selection)  # each sample once an epoch
    if train:
        assert len({entry[6] for entry in expected}) == 8  # all symmetries occur
        assert len({entry[1:] for entry in expected}) == len(expected)  # and no sample is drawn alike twice
    for engine in ENGINES:
        for world_size in (1, 2, 3, 4):
            assert sequence(ranks(selection, engine, world_size, train))[0] == expected, (engine, world_size)
    for stop, before, after in (
        (1, ("native", 2), ("dali", 3)),
        (5, ("dali", 4), ("resident", 1)),
        (8, ("resident", 3), ("native", 4)),
    ):
        head, state = sequence(ranks(selection, *before, train), stop=stop)
        tail, _ = sequence(ranks(selection, *after, train), state=state)
        assert head + tail == expected, (stop, before, after)


def test_the_colours_are_on_every_batch_as_planned(shard_sets):
    selection = shard_sets["jpg"].select("train")
    for engine in ENGINES:
        loader = Loader(selection, batch_size=8, resolution=32, seed=1, engine=engine)
        order, plan = loader.plan()
        colours = torch.cat([batch.colour for batch in loader])
        assert torch.equal(colours, torch.from_numpy(plan.colour[order[: len(colours)]]))


def test_resuming_reads_nothing_of_what_was_seen(tiny_shards):
    """The engine is asked for the remaining batches alone, whatever the position; the state's size does not grow."""
    selection, sizes = ShardSet(tiny_shards).select("train"), set()
    whole = [b.samples.tolist() for b in Loader(selection, batch_size=8, resolution=32, seed=3)]
    for stop in range(1, len(whole)):
        loader, resumed = (Loader(selection, batch_size=8, resolution=32, seed=3) for _ in range(2))
        running = iter(loader)
        for _ in range(stop):
            next(running)
        state = loader.state_dict()
        running.close()
        sizes.add(len(state))
        resumed._engine = Recorded(resumed._engine)
        resumed.load_state_dict(state)
        assert [b.samples.tolist() for b in resumed] == whole[stop:]
        asked = [request.samples.tolist() for request in resumed._engine.requests]
        ahead = len(asked) - len(whole[stop:])  # of the next epoch, under way already
        assert asked[: len(whole[stop:])] == whole[stop:] and 0 <= ahead <= 5
    assert len(sizes) == 1
