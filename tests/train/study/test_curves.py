"""Learning curves: the fit against scipy's, the profile against refits, refusals, and what is not identifiable."""

import json
import math

import numpy as np
import pytest
from scipy.optimize import curve_fit, least_squares

from shards.common.errors import DataError, UsageError
from train.study.curves import fit_curve, hold_out_largest
from train.study.profile import C_MAX, C_MIN, Lines, Quantity, power_weights, size_groups, variance_power

SIZES = np.round(5600 / 2.0 ** np.arange(6, -1, -1))


def runs(a=0.75, b=1.6, c=0.3, sizes=SIZES, seeds=3, sd=0.01, seed=0):
    n = np.repeat(sizes, seeds)
    return n, a - b * n**-c + sd * np.random.default_rng(seed).normal(size=n.size)


def test_exact_points_give_back_the_curve():
    n, y = runs(sd=0)
    curve = fit_curve(n, y, resamples=50)
    for estimate, truth in ((curve.a, 0.75), (curve.b, 1.6), (curve.c, 0.3)):
        assert estimate["value"] == pytest.approx(truth, rel=1e-4)
    assert curve.at(8000)["value"] == pytest.approx(0.75 - 1.6 * 8000**-0.3, abs=1e-6)


def test_the_fit_is_scipys_weighted_least_squares():
    n, y = runs(sd=0.02, seed=4)
    curve = fit_curve(n, y, resamples=50)
    assert curve.noise_power is not None
    found, _ = curve_fit(
        lambda x, a, b, c: a - b * x**-c,
        n,
        y,
        p0=(0.7, 1.0, 0.4),
        sigma=n ** (-curve.noise_power / 2),
        bounds=([-np.inf, 0, C_MIN], [1, np.inf, C_MAX]),
    )
    np.testing.assert_allclose([curve.a["value"], curve.b["value"], curve.c["value"]], found, rtol=2e-3)


@pytest.mark.parametrize("what", ["a", "b", "value at 2000"])
def test_a_profile_is_what_constrained_refits_leave(what):
    """Independent: fix the quantity, refit the two other parameters with scipy, and compare the sums of squares."""
    n, y = runs(sd=0.01, seed=1)
    grid = np.geomspace(C_MIN, C_MAX, 4000)
    lines = Lines(n, y[:, None], np.ones((n.size, 1)), grid, 1.0)
    top = n.max()
    quantity, start, of = {
        "a": (Quantity(1.0, np.zeros_like(grid)), 0.75, lambda q, b, c: q - b * (n / top) ** -c),
        "b": (Quantity(0.0, -np.ones_like(grid)), 0.12, lambda q, a, c: a - q * (n / top) ** -c),
        "value at 2000": (
            Quantity(1.0, (2000 / top) ** -grid),
            0.585,
            lambda q, b, c: q - b * ((n / top) ** -c - (2000 / top) ** -c),
        ),
    }[what]
    for fixed in (start * 0.9, start * 1.05):
        refit = least_squares(
            lambda p, fixed=fixed: of(fixed, *p) - y,
            (0.6 if what == "b" else 0.12, 0.3),
            bounds=([0, C_MIN], [5, C_MAX]),
            xtol=1e-14,
            ftol=1e-14,
        )
        left = 2 * refit.cost
        expected = (left - lines.least[0]) / lines.variance[0]
        assert lines.distance(quantity, fixed)[0] == pytest.approx(expected, rel=0.01, abs=0.02)
        # The interval with exactly this limit ends there.
        assert min(abs(end - fixed) for end in lines.limits(quantity, expected)) < 1e-3 * abs(fixed)


def test_lines_equal_numpys_least_squares_at_each_exponent_and_keep_under_the_ceiling():
    rng = np.random.default_rng(3)
    n, grid = np.repeat(SIZES, 2), np.array([0.1, 0.5, 1.5])
    y, weights = rng.uniform(0.4, 1.2, size=(n.size, 40)), rng.uniform(0.5, 2, size=(n.size, 40))
    lines = Lines(n, y, weights, grid, 1.0)
    bound = 0
    for g, c in enumerate(grid):
        x = (n / n.max()) ** -c
        for s in range(40):
            root = np.sqrt(weights[:, s])
            found = least_squares(
                lambda p, x=x, s=s, root=root: root * (p[0] + p[1] * x - y[:, s]),
                (0.5, -0.1),
                bounds=([-np.inf, -np.inf], [1.0, 0.0]),
                xtol=1e-12,
                ftol=1e-12,
            )
            bound += lines.pinned[g, s]
            assert lines.rss[g, s] == pytest.approx(2 * found.cost, rel=2e-3)
    assert 0 < bound < 120  # both kinds were met


def test_the_noise_power_is_found():
    rng = np.random.default_rng(0)
    n = np.repeat(SIZES, 40)
    y = rng.normal(size=(n.size, 50)) * 0.01 * ((n / n.max()) ** -0.35)[:, None]
    found, error = variance_power(n, y, size_groups(n))
    assert found.mean() == pytest.approx(0.7, abs=0.03)
    assert found.std() == pytest.approx(error, rel=0.35)
    weights = power_weights(n, found)
    np.testing.assert_allclose(weights.mean(axis=0), 1)


def test_sizes_that_differ_by_a_few_lesions_are_one():
    assert size_groups(np.array([100.0, 103, 97, 205, 199, 400])).tolist() == [0, 0, 0, 1, 1, 2]


def test_more_than_twice_the_sizes_is_refused():
    curve = fit_curve(*runs(), resamples=50)
    curve.at(2 * SIZES[-1])
    curve.at(SIZES[0] / 2)
    for n in (2.2 * SIZES[-1], SIZES[0] / 2.2, math.inf, math.nan, -5):
        with pytest.raises(UsageError, match="more than 2× outside the measured 88 to 5600"):
            curve.at(n)
    assert max(point["n"] for point in curve.band()) <= 2 * SIZES[-1] * (1 + 1e-9)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (runs(sizes=SIZES[-3:]), "3 sizes, and three parameters need at least 4"),
        ((SIZES[:4], np.full(4, 0.5)), "every run has the same score"),
        (runs(b=0.0, c=0.5, sd=0.01), "b may be 0"),
        (
            (np.repeat(SIZES, 3), 0.1 + 0.02 * np.log(np.repeat(SIZES, 3)) + np.tile([-0.003, 0, 0.003], 7)),
            "logarithmic",
        ),
        (runs(a=0.99, b=0.5, c=0.12, sd=0.01), "a may be the highest possible score"),
        (runs(a=0.6, b=1e6, c=3.0, sd=0.01, sizes=SIZES[-5:]), "only the smallest size tells"),
    ],
)
def test_a_curve_that_cannot_be_told_says_why(data, reason):
    curve = fit_curve(*data, resamples=100)
    assert not curve.identifiable
    assert any(reason in line for line in curve.reasons), curve.reasons
    assert None in (
        curve.a["low"],
        curve.a["high"],
        curve.c["low"],
        curve.c["high"],
        curve.b["high"],
    ) or "b may be 0" in (" ".join(curve.reasons))
    json.dumps(curve.to_dict(), allow_nan=False)


def test_a_clear_curve_is_identifiable_and_json():
    curve = fit_curve(*runs(b=2.5, c=0.5, a=0.7), resamples=200)
    assert curve.identifiable and curve.reasons == []
    for name in ("a", "b", "c"):
        cell = getattr(curve, name)
        assert cell["low"] < cell["value"] < cell["high"]
    json.dumps([curve.to_dict(), curve.band()], allow_nan=False)
    assert curve.lack_of_fit_p is not None and curve.lack_of_fit_p > 0.001


def test_a_curve_of_another_shape_is_noticed():
    n = np.repeat(SIZES, 3)
    steps = np.where(n < 500, 0.3, 0.7) + np.random.default_rng(0).normal(size=n.size) * 0.005
    curve = fit_curve(n, steps, resamples=50)
    assert curve.lack_of_fit_p is not None and curve.lack_of_fit_p < 1e-3


def test_the_largest_size_is_predicted_without_being_seen():
    n, y = runs(b=2.5, c=0.5, a=0.7, seed=1)
    told = hold_out_largest(n, y, resamples=200)
    assert told["inside"] and told["low"] < told["predicted"] < told["high"] and told["runs"] == 3
    moved = np.where(n == n.max(), y - 0.1, y)
    surprised = hold_out_largest(n, moved, resamples=200)
    assert not surprised["inside"]
    for key in ("predicted", "low", "high"):
        assert surprised[key] == told[key], "the held-out runs moved their own prediction"


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (np.array([50.0, 100, 200, 400, 4000]), "more than 2× outside"),
        (SIZES[-4:], "3 sizes"),
        (SIZES[-1:], "one size only"),
    ],
)
def test_no_prediction_is_made_where_none_can_be(sizes, reason):
    told = hold_out_largest(*runs(sizes=sizes), resamples=50)
    assert told["predicted"] is None and told["inside"] is None and reason in told["reason"]


def test_unusable_numbers_are_refused():
    n, y = runs()
    for bad in ((n, y[:-1]), (n, np.where(n == n.max(), np.nan, y)), (n * 0, y), ([], [])):
        with pytest.raises(DataError):
            fit_curve(*bad)


def test_equal_seeds_give_equal_intervals():
    n, y = runs()
    assert fit_curve(n, y, resamples=80, seed=5).to_dict() == fit_curve(n, y, resamples=80, seed=5).to_dict()
