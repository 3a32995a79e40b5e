"""Splits and fractions: lesions whole, classes in proportion, fractions nested, for every seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.common.errors import UsageError
from shards.subsets import nested_subset, split_lesions


@st.composite
def data_sets(draw):
    """Labels and lesion names of a made-up data set: 7 classes, 3 to 60 lesions each, 1 to 5 images a lesion."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels, lesions = [], []
    for label in range(7):
        for lesion in range(rng.integers(3, 60)):
            views = int(rng.integers(1, 6))
            labels += [label] * views
            lesions += [f"L{label}_{lesion}"] * views
    order = rng.permutation(len(labels))
    return np.array(labels)[order], np.array(lesions, dtype=object)[order].tolist()


@given(data_sets(), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_no_lesion_is_in_two_splits_and_every_class_in_each(data, seed):
    labels, lesions = data
    splits = split_lesions(labels, lesions, seed=seed)
    home = {}
    for lesion, split in zip(lesions, splits, strict=True):
        assert home.setdefault(lesion, split) == split
    for split in ("train", "val", "test"):
        assert set(labels[splits == split]) == set(range(7))


@given(data_sets(), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_splits_do_not_hang_on_the_order_of_rows(data, seed):
    labels, lesions = data
    forward = split_lesions(labels, lesions, seed=seed)
    backward = split_lesions(labels[::-1], lesions[::-1], seed=seed)
    assert np.array_equal(forward, backward[::-1])


def test_shares_are_near_the_ratio():
    rng = np.random.default_rng(0)
    lesions = [str(i) for i in range(5000) for _ in range(1 + i % 3)]
    labels = np.array([int(lesion) % 7 for lesion in lesions])
    splits = split_lesions(labels, lesions, (70, 10, 20), seed=int(rng.integers(100)))
    for label in range(7):
        share = [np.mean(splits[labels == label] == name) for name in ("train", "val", "test")]
        assert np.allclose(share, [0.7, 0.1, 0.2], atol=0.01)


@given(data_sets(), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_fractions_nest_keep_lesions_whole_and_hold_every_class(data, seed):
    labels, lesions = data
    inside = set()
    for fraction in (1 / 64, 0.05, 0.1, 0.25, 0.5, 0.9, 1.0):
        rows = nested_subset(labels, lesions, fraction, seed)
        assert inside <= set(rows)
        inside = set(rows)
        taken = {lesions[row] for row in rows}
        assert inside == {row for row, lesion in enumerate(lesions) if lesion in taken}
        assert set(labels[rows]) == set(range(7))
        assert len(rows) >= min(fraction * len(labels), len(labels))
    assert len(inside) == len(labels)


def test_fractions_are_close_to_class_proportional():
    lesions = [str(i) for i in range(3000) for _ in range(1 + i % 2)]
    labels = np.array([0 if int(lesion) % 10 else 1 for lesion in lesions])
    for fraction in (0.1, 0.3, 0.6):
        rows = nested_subset(labels, lesions, fraction, seed=5)
        assert len(rows) == pytest.approx(fraction * len(labels), abs=2)
        assert np.mean(labels[rows]) == pytest.approx(np.mean(labels), abs=0.005)


def test_another_seed_draws_other_lesions():
    lesions = [str(i) for i in range(1000)]
    labels = np.arange(1000) % 7
    first, second = (set(nested_subset(labels, lesions, 0.3, seed)) for seed in (0, 1))
    assert 0.15 < len(first & second) / len(first) < 0.45


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, float("nan")])
def test_fractions_outside_the_range_are_refused(fraction):
    with pytest.raises(UsageError, match=r"outside \(0, 1\]"):
        nested_subset(np.zeros(2), ["a", "b"], fraction)


@pytest.mark.parametrize("ratio", [(0, 50, 50), (70, -10, 40)])
def test_ratios_without_training_images_are_refused(ratio):
    with pytest.raises(UsageError, match="train/val/test"):
        split_lesions(np.zeros(2), ["a", "b"], ratio)
