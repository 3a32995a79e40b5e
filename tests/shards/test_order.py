"""The order: permutations, the same global batches for every world size, evaluation that counts once."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.common.errors import UsageError
from shards.kernels.load import compiled
from shards.order import (
    balanced_order,
    batch_count,
    epoch_order,
    evaluation_order,
    numpy_order,
    rank_slice,
    weighted_order,
    windowed_order,
)


@given(st.integers(1, 500), st.integers(0, 2**63 - 1), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_each_epoch_is_a_permutation(count, seed, epoch):
    assert np.array_equal(np.sort(epoch_order(count, seed, epoch)), np.arange(count))


def test_seeds_and_epochs_give_other_orders():
    orders = [epoch_order(200, seed, epoch).tobytes() for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25


def test_the_order_is_written_down():
    # The stream of numpy's Philox is promised to stay: a change here would make old runs irreproducible.
    assert epoch_order(8, 0, 0).tolist() == [7, 4, 2, 6, 5, 0, 1, 3]
    assert epoch_order(8, 1, 5).tolist() == [2, 1, 6, 3, 0, 7, 5, 4]
    assert windowed_order(np.array([0, 0, 1, 1, 2, 2, 3, 3]), 2, 1, 5).tolist() == [6, 1, 7, 5, 0, 4, 3, 2]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=300), st.integers(0, 2**63 - 1), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_the_balanced_order_has_each_class_equally_often(classes, seed, epoch):
    labels = np.array(classes)
    positions, before = balanced_order(labels, seed, epoch)
    assert len(positions) == len(before) == len(labels)
    drawn = np.bincount(labels[positions], minlength=10)[np.unique(labels)]
    assert drawn.max() - drawn.min() <= 1
    times = np.bincount(positions, minlength=len(labels))
    for one in np.unique(labels):  # the samples of a class come equally often, within one
        assert np.ptp(times[labels == one]) <= 1
    for position in np.unique(positions):
        assert sorted(before[positions == position]) == list(range(times[position]))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200).filter(any), st.integers(0, 2**63 - 1), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_the_weighted_order_has_each_sample_by_its_weight(given_weights, seed, epoch):
    weights = np.array(given_weights)
    positions, before = weighted_order(weights, seed, epoch)
    assert len(positions) == len(before) == len(weights)
    times, wanted = np.bincount(positions, minlength=len(weights)), weights / weights.sum() * len(weights)
    assert (np.abs(times - wanted) < 1 + 1e-6).all() and not times[weights == 0].any()
    for position in np.unique(positions):
        assert sorted(before[positions == position]) == list(range(times[position]))


def test_the_weighted_order_is_right_on_average_and_written_down():
    weights = np.array([0.0, 0.1, 0.2, 0.7, 3.0])
    times = sum(np.bincount(weighted_order(weights, 1, epoch)[0], minlength=5) for epoch in range(4000)) / 4000
    assert times == pytest.approx(weights / weights.sum() * 5, abs=0.03)
    assert weighted_order(weights, 0, 0)[0].tolist() == [4, 4, 3, 4, 4]
    uniform = [sorted(weighted_order(np.full(7, 0.3), 0, epoch)[0].tolist()) for epoch in range(5)]
    assert uniform == [list(range(7))] * 5


def test_the_balanced_order_is_written_down_and_new_in_each_epoch():
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 2])
    assert balanced_order(labels, 0, 0)[0].tolist() == [7, 6, 2, 7, 6, 5, 4, 6]
    orders = [balanced_order(labels, seed, epoch)[0].tobytes() for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) > 20
    seen = {int(p) for epoch in range(20) for p in balanced_order(labels, 0, epoch)[0]}
    assert seen == set(range(8))


def test_positions_are_spread_evenly():
    places = np.array([np.argsort(epoch_order(10, 3, epoch)) for epoch in range(4000)])
    counts = np.stack([np.bincount(places[:, i], minlength=10) for i in range(10)])
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400 * 0.9)


@given(st.integers(1, 300), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_ranks_share_each_batch_exactly(batch_size, world_size):
    if batch_size < world_size:
        with pytest.raises(UsageError, match="smaller than"):
            rank_slice(batch_size, 0, world_size)
        return
    parts = [np.arange(batch_size)[rank_slice(batch_size, rank, world_size)] for rank in range(world_size)]
    assert np.array_equal(np.concatenate(parts), np.arange(batch_size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(1, 300), st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_evaluation_counts_each_sample_once(count, batch_size):
    positions, mask = evaluation_order(count, batch_size)
    assert len(positions) == len(mask) == batch_count(count, batch_size, train=False) * batch_size
    assert positions[mask].tolist() == list(range(count))
    assert not positions[~mask].any()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_a_windowed_order_has_each_sample_once_and_few_shards_open(sizes, window, seed):
    shards = np.repeat(np.arange(len(sizes)), sizes)
    shards = shards[np.random.default_rng(seed).permutation(len(shards))]
    order = windowed_order(shards, window, seed, 3)
    assert sorted(order.tolist()) == list(range(len(shards)))
    assert np.array_equal(order, windowed_order(shards * 7 + 2, window, seed, 3))  # numbers of shards do not count
    met = shards[order]
    first, last = (np.array([step(np.flatnonzero(met == shard)) for shard in range(len(sizes))]) for step in (min, max))
    places = np.arange(len(met))[:, None]
    assert ((first <= places) & (places <= last)).sum(axis=1).max() <= window


def test_neighbours_of_a_windowed_order_come_from_other_shards():
    """The distance between the origins of neighbours, as a share of the set, is a third if everything is mixed."""
    shards = np.repeat(np.arange(64), 100)
    for window in (1, 2, 8, 64):
        distance = np.abs(np.diff(windowed_order(shards, window, 0, 0))).mean() / len(shards)
        assert abs(distance - (1 - 1 / window) / 3) < 0.02, window
    epochs = [windowed_order(shards, 4, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(np.mean(a == b) < 0.01 for a, b in combinations(epochs, 2))


def test_training_drops_the_incomplete_batch():
    assert batch_count(100, 32, train=True) == 3
    assert batch_count(100, 32, train=False) == 4


@pytest.mark.parametrize(("seed", "epoch"), [(-1, 0), (2**63, 0), (0, -1)])
def test_seeds_outside_the_range_are_refused(seed, epoch):
    with pytest.raises(UsageError, match="is outside 0 to"):
        epoch_order(3, seed, epoch)
    with pytest.raises(UsageError, match="is outside 0 to 1"):
        rank_slice(4, 2, 2)


@pytest.mark.skipif(compiled() is None, reason="the compiled library was not built")
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 100, 2047, 2049, 70_000])
def test_the_compiled_order_is_that_of_numpy(count):
    for seed, epoch in ((0, 0), (3, 17), (2**63 - 1, 2**63 - 1)):
        assert np.array_equal(epoch_order(count, seed, epoch), numpy_order(count, seed, epoch))
