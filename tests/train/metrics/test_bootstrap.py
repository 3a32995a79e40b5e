"""Intervals against scipy's bootstrap, and p values against the intervals they belong to."""

import numpy as np
import pytest
from scipy import stats

from shards.common.errors import DataError
from train.metrics.bootstrap import Groups, interval, pooled_freedom, refuse_unfit, two_sided_p


def means_of(sample, resamples=20_000, seed=0):
    rng = np.random.default_rng(seed)
    return sample[rng.integers(sample.size, size=(resamples, sample.size))].mean(axis=1)


@pytest.mark.parametrize("kind", ["percentile", "basic", "bca"])
def test_intervals_equal_scipys(kind):
    """A skewed sample, so that the three kinds differ; scipy takes BCa's acceleration from a jackknife."""
    sample = np.random.default_rng(1).exponential(size=30)
    found = stats.bootstrap(
        (sample,), np.mean, n_resamples=20_000, method="BCa" if kind == "bca" else kind, rng=np.random.default_rng(2)
    ).confidence_interval
    low, high = interval(means_of(sample), sample.mean(), kind=kind)
    spread = sample.std() / np.sqrt(sample.size)
    assert abs(low - found.low) < 0.08 * spread and abs(high - found.high) < 0.08 * spread
    assert abs(found.high - interval(means_of(sample), sample.mean(), kind="percentile")[1]) > 0.1 * spread or (
        kind == "percentile"
    )


def test_columns_are_computed_one_by_one_and_nan_replicates_are_left_out():
    rng = np.random.default_rng(0)
    replicates = rng.normal(size=(501, 2, 3))
    replicates[rng.random(replicates.shape) < 0.2] = np.nan
    replicates[:, 1, 2] = np.nan
    value = np.zeros((2, 3))
    low, high = interval(replicates, value)
    for i in range(2):
        for j in range(3):
            column = replicates[:, i, j]
            alone = interval(column[~np.isnan(column)], 0.0)
            np.testing.assert_allclose([low[i, j], high[i, j]], alone)
    assert np.isnan(low[1, 2]) and np.isfinite(low[0]).all()
    percentiles = np.nanquantile(replicates[:, 0, 0], [0.025, 0.975])
    np.testing.assert_allclose([e[0, 0] for e in interval(replicates, value, kind="percentile")], percentiles)


def test_replicates_without_spread_give_the_value():
    assert interval(np.ones(100), 1.0) == (1.0, 1.0)
    assert all(np.isnan(interval(np.zeros(0), 1.0)))


@pytest.mark.parametrize("value", [-0.5, 0.3, 1.2, 1.9, 2.1, 2.6])
@pytest.mark.parametrize("freedom", [6.0, np.inf])
def test_p_is_small_exactly_where_the_interval_leaves_out_zero(value, freedom):
    replicates = value + np.random.default_rng(3).gamma(40, size=2001) / 6 - 40 / 6
    low, high = interval(replicates, value, kind="t", freedom=freedom)
    p = two_sided_p(replicates, value, freedom=freedom)
    assert (p < 0.05) == bool(low > 0 or high < 0)
    for end in (low, high):  # p is 5 % exactly where an end of the interval is
        assert two_sided_p(replicates, value - end, freedom=freedom) == pytest.approx(0.05)


def test_few_degrees_of_freedom_widen_the_interval_and_raise_p_as_students_t_does():
    replicates = np.random.default_rng(5).normal(size=200_001)
    replicates = 2 + np.concatenate([replicates, -replicates])  # symmetric: no bias and no skewness to correct
    for freedom in (4.0, 20.0, np.inf):
        for kind in ("bca", "t"):
            low, high = interval(replicates, 2.0, kind=kind, freedom=freedom)
            assert [low, high] == pytest.approx(stats.t(freedom, 2).interval(0.95), abs=0.03)
        assert two_sided_p(replicates, 2.0, freedom=freedom) == pytest.approx(2 * stats.t.sf(2, freedom), abs=0.001)


@pytest.mark.parametrize("tail", [1.0, -1.0], ids=["right", "left"])
@pytest.mark.parametrize("freedom", [1.0, 2.0])
def test_an_interval_holds_its_value_however_few_the_degrees_of_freedom(tail, freedom):
    """Student's t is ±12.7 at 1: beyond the pole of BCa's correction for skewness, which must not turn its sign."""
    replicates = tail * np.random.default_rng(7).exponential(size=(2000, 3))
    value = np.quantile(replicates, [0.1, 0.5, 0.9], axis=0).diagonal()
    low, high = interval(replicates, value, freedom=freedom)
    assert (low <= value).all() and (value <= high).all() and (low < high).all()
    narrower = interval(replicates, value)
    assert (low <= narrower[0]).all() and (high >= narrower[1]).all()


def test_pooled_degrees_of_freedom_are_welchs():
    one, two = np.random.default_rng(0).normal(size=9), 3 * np.random.default_rng(1).normal(size=14)
    welch = stats.ttest_ind(one, two, equal_var=False).df
    variances = np.array([one.var(ddof=1) / 9, two.var(ddof=1) / 14])
    assert pooled_freedom(variances, np.array([8.0, 13.0])) == pytest.approx(welch)
    assert pooled_freedom(np.zeros(2), np.array([3.0, 4.0])) == np.inf


def test_p_without_spread_is_one_or_unknown():
    assert two_sided_p(np.zeros(999), 0.0) == 1.0
    assert np.isnan(two_sided_p(np.full(999, 0.1), 0.1))


def test_group_sums_are_numpys():
    rng = np.random.default_rng(0)
    group, weights = rng.choice([0, 2, 3, 6], 50), rng.random((50, 4))
    expected = np.zeros((8, 4))
    np.add.at(expected, group, weights)
    np.testing.assert_allclose(Groups(group, 8).sums(weights), expected)
    assert (Groups(group[:0], 3).sums(weights[:0]) == 0).all()


def test_no_statistic_of_the_training_split():
    with pytest.raises(DataError, match="the model has seen them"):
        refuse_unfit(["train"] * 3, wanted="train")
