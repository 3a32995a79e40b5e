"""Lesions drawn within their class; intervals and degrees of freedom against scipy's."""

import numpy as np
import pytest
from scipy import stats

from shards.subsets import split_lesions
from train.metrics.bootstrap import LesionBootstrap, interval, lesion_codes, mean_freedom, ratio


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


def test_nan_replicates_are_left_out_and_replicates_without_spread_give_the_value():
    replicates = np.random.default_rng(0).normal(size=501)
    known = replicates[::2].copy()
    replicates[1::2] = np.nan
    assert interval(replicates, 0.0) == interval(known, 0.0)
    assert interval(replicates, 0.0, kind="percentile") == pytest.approx(np.nanquantile(replicates, [0.025, 0.975]))
    assert interval(np.ones(100), 1.0) == (1.0, 1.0)
    assert all(np.isnan(interval(np.zeros(0), 1.0))) and all(np.isnan(interval(known, np.nan)))


def test_rounding_does_not_decide_which_replicates_equal_the_value():
    rng = np.random.default_rng(3)
    replicates = rng.binomial(10, 0.6, size=1000) / 10
    jitter = rng.choice([-1, 0, 1], size=1000) * 1e-16
    assert interval(replicates + jitter, 0.6) == pytest.approx(interval(replicates, 0.6), abs=1e-12)


@pytest.mark.parametrize("freedom", [4.0, 20.0, np.inf])
def test_few_degrees_of_freedom_widen_the_interval_as_students_t_does(freedom):
    replicates = np.random.default_rng(5).normal(size=200_001)
    replicates = 2 + np.concatenate([replicates, -replicates])  # symmetric: no bias and no skewness to correct
    assert interval(replicates, 2.0, freedom=freedom) == pytest.approx(stats.t(freedom, 2).interval(0.95), abs=0.03)


@pytest.mark.parametrize("tail", [1.0, -1.0], ids=["right", "left"])
@pytest.mark.parametrize("freedom", [1.0, 2.0])
@pytest.mark.parametrize("level", [0.1, 0.5, 0.9])
def test_an_interval_holds_its_value_however_few_the_degrees_of_freedom(tail, freedom, level):
    """Student's t is ±12.7 at 1: beyond the pole of BCa's correction for skewness, which must not turn its sign."""
    replicates = tail * np.random.default_rng(7).exponential(size=2000)
    value = float(np.quantile(replicates, level))
    low, high = interval(replicates, value, freedom=freedom)
    narrower = interval(replicates, value)
    assert low <= narrower[0] <= value <= narrower[1] <= high and low < high


def test_resamples_draw_one_lesion_less_than_there_are_of_each_class_and_keep_views_together():
    rng = np.random.default_rng(29)
    label = np.concatenate([np.repeat(np.arange(7), 4), rng.choice(7, 300)])
    views = rng.choice([1, 2, 3], label.size)
    labels, lesions = np.repeat(label, views), np.repeat([f"HAM_{i}" for i in range(label.size)], views)
    codes, _ = lesion_codes(lesions, labels)
    weights = np.concatenate(list(LesionBootstrap(labels, lesions, resamples=300, seed=0).weights()), axis=1)
    assert weights.shape[1] == 301 and (weights[:, 0] == 1).all()
    weights, first = weights[:, 1:], np.unique(codes, return_index=True)[1]
    np.testing.assert_array_equal(weights, weights[first][codes])
    for c in range(7):
        rows = first[labels[first] == c]
        n = rows.size
        draws = weights[rows] * (n - 1) / n
        np.testing.assert_allclose(draws, draws.round(), atol=1e-9)
        np.testing.assert_allclose(draws.sum(axis=0), n - 1)


def test_a_class_of_one_lesion_is_named_and_not_resampled():
    labels = np.array([0, 0, 0, 1, 1])
    bootstrap = LesionBootstrap(labels, ["a", "b", "c", "d", "d"], resamples=20, seed=0)
    weights = np.concatenate(list(bootstrap.weights()), axis=1)
    assert bootstrap.single == [1] and (weights[3:] == 1).all() and not (weights[:3] == 1).all()


def test_null_lesion_ids_are_lesions_of_their_own():
    labels = np.array([0, 0, 0, 0, 1])
    assert len(set(lesion_codes([None, float("nan"), "x", "x", ""], labels)[0].tolist())) == 4


def test_a_group_of_several_classes_is_of_the_rarest_and_stays_together():
    """A patient with moles and a melanoma is drawn with the patients who have a melanoma."""
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    patients = np.array(["a", "a", "b", "c", "c", "d", "d"])
    codes, classes = lesion_codes(patients, labels)
    assert classes.tolist() == [0, 0, 1, 2]
    weights = np.concatenate(list(LesionBootstrap(labels, patients, resamples=50, seed=0).weights()), axis=1)
    assert all((weights[codes == code] == weights[codes == code][0]).all() for code in range(4))
    splits = split_lesions(np.tile(labels, 9), [f"{p}{n}" for n in range(9) for p in patients])
    of_patient = {}
    for name, split in zip([f"{p}{n}" for n in range(9) for p in patients], splits, strict=True):
        assert of_patient.setdefault(name, split) == split
    assert {split for name, split in of_patient.items() if name[0] == "d"} == {"train", "val", "test"}


def test_a_class_that_only_patients_with_a_rarer_one_have_counts_in_the_freedom():
    """Two of three patients with class 1 have class 0 too, which is more frequent: no patient is counted to it."""
    labels = np.array([0] * 8 + [1] * 3 + [2] * 20)
    patients = ["a"] * 4 + ["b"] * 4 + ["a", "b", "c"] + [f"d{n}" for n in range(20)]
    bootstrap = LesionBootstrap(labels, patients, resamples=500, seed=0)
    assert bootstrap.lesions_of(4).tolist() == [2, 3, 20, 0] and not (bootstrap.lesion_label == 0).any()
    right = np.random.default_rng(0).random(len(labels)) < 0.5
    weights = np.concatenate(list(bootstrap.weights()), axis=1)
    shares = [ratio((weights * right[:, None])[labels == c].sum(0), weights[labels == c].sum(0)) for c in range(3)]
    recalls = np.stack(shares, axis=1)
    assert np.isnan(recalls[:, 0]).any()  # of resamples that have c alone
    variances = np.nanvar(recalls[1:], axis=0, ddof=1)
    expected = variances.sum() ** 2 / (variances**2 / [1, 2, 19]).sum()
    assert mean_freedom(recalls, bootstrap) == pytest.approx(expected)
