"""Intervals hold a known truth. Few repeats here, with room for their luck; simulate_coverage.py has the full table."""

import pytest

from tests.support import simulate_coverage as simulate


def near_95(share, repeats):
    """Within three standard errors of 0.93 to 0.97, what 2,000 repeats show."""
    room = 3 * (0.95 * 0.05 / repeats) ** 0.5
    assert 0.93 - room <= share <= min(0.97 + room, 1.0), share


@pytest.mark.parametrize("recalls", ["poor", "middle", "good"])
def test_balanced_accuracy_intervals_hold_the_truth(recalls):
    near_95(simulate.balanced_accuracy(simulate.RECALLS[recalls], 120, resamples=300), 120)


@pytest.mark.slow
def test_the_intervals_of_every_metric_hold_the_truth():
    repeats = 80
    for name, share in simulate.every_metric(repeats, resamples=200, seed=1).items():
        if name == "expected_calibration_error":  # of a calibrated model, the low end is 0 in 97.5 % of cases
            assert share >= 0.9
        else:
            near_95(share, repeats)


def test_equally_good_models_differ_significantly_once_in_twenty():
    held, small = simulate.two_models(simulate.RECALLS["middle"], 120, resamples=300)
    near_95(held, 120)
    near_95(1 - small, 120)


def test_differences_over_seeds_hold_the_truth():
    near_95(simulate.models_with_seeds(80, seed_sd=0.03, resamples=100), 80)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["slow, even noise", "middle, noise falls"])
def test_curve_intervals_hold_the_truth_where_the_curve_is_identifiable(setting):
    repeats = 120
    shares = simulate.curve(setting, repeats, resamples=250)
    assert shares.pop("identifiable") > 0.9
    for name, share in shares.items():
        assert share is not None, name
        near_95(share, repeats)


def test_curves_that_cannot_be_identified_are_said_not_to_be():
    shares = simulate.curve("flat and noisy", 40, resamples=200)
    assert shares["identifiable"] <= 0.1
    for name in ("a", "b", "c", "largest", "twice"):  # and what is said of them is true all the same
        assert shares[name] >= 0.85, name


@pytest.mark.slow
def test_variance_shares_are_unbiased_and_their_intervals_hold_the_truth():
    truth = {"model": 0.3, "size": 0.5, "interaction": 0.1, "seed": 0.1}
    mean, held = simulate.variance(60, resamples=300)
    for name, share in truth.items():
        assert mean[name] == pytest.approx(share, abs=0.01), name
        near_95(held[name], 60)
