"""Engines that are lent: one for a set and its options, closed with the pool or the set, never by who borrows it."""

from shards import Loader
from shards.engines.choose import EnginePool
from tests.support.parity import assert_parity, batches


class Counted:
    """An engine that counts how often it was closed."""

    def __init__(self) -> None:
        self.closed = 0

    def run(self, requests, resolution):
        yield from ()

    def close(self) -> None:
        self.closed += 1


def test_the_same_set_and_options_get_the_same_engine(shard_sets):
    pool, made = EnginePool(), []

    def make() -> Counted:
        made.append(Counted())
        return made[-1]

    jpg, raw = shard_sets["jpg"], shard_sets["raw"]
    for data, options in ((jpg, "a"), (jpg, "a"), (jpg, "b"), (raw, "a"), (jpg, "a")):
        pool.get(data, options, make).close()
    assert [engine.closed for engine in made] == [0, 0, 0]
    pool.close(jpg)
    assert [engine.closed for engine in made] == [1, 1, 0]
    pool.get(jpg, "a", make)
    assert len(made) == 4
    pool.close()
    assert [engine.closed for engine in made] == [1, 1, 1, 1]


def test_loaders_of_a_pool_give_the_batches_of_their_own(shard_sets):
    """Also where one has stopped in mid-epoch, and where another one runs at the same time."""
    pool, selection = EnginePool(), shard_sets["mixed"].select("train")
    expected = batches(Loader(selection, batch_size=8, resolution=32, engine="native"))
    first = Loader(selection, batch_size=8, resolution=32, engine="dali", pool=pool)
    running = iter(first)
    next(running)
    second = Loader(selection, batch_size=8, resolution=32, engine="dali", pool=pool)
    assert_parity(expected, batches(second))
    second.close()
    assert_parity(expected[1:], list(running))
    first.close()
    third = Loader(selection, batch_size=8, resolution=32, engine="dali", pool=pool)
    assert_parity(expected, batches(third))
    third.close()
    pool.close()
