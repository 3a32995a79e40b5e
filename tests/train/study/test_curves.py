"""Learning curves: the fit against scipy's, the profile against refits, refusals, doubts, and tables of runs."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import curve_fit, least_squares, lsq_linear

from shards.common.errors import DataError
from train.study.curves import fit_curve, hold_out_largest, learning_curve, learning_curves
from train.study.powerlaw import C_MAX, C_MIN, Lines, Quantity, power_weights, size_groups, variance_power

SIZES = np.round(5600 / 2.0 ** np.arange(6, -1, -1))


def runs(a=0.75, b=1.6, c=0.3, sizes=SIZES, seeds=3, sd=0.01, seed=0):
    n = np.repeat(sizes, seeds)
    return n, a - b * n**-c + sd * np.random.default_rng(seed).normal(size=n.size)


def test_exact_points_give_back_the_curve():
    n, y = runs(sd=0)
    curve = fit_curve(n, y, resamples=50)
    assert curve.to_dict() == fit_curve(n, y, resamples=50).to_dict()
    for estimate, truth in ((curve.a, 0.75), (curve.b, 1.6), (curve.c, 0.3)):
        assert estimate["value"] == pytest.approx(truth, rel=1e-4)
    assert curve.band()[-1]["value"] == pytest.approx(0.75 - 1.6 * 11200**-0.3, abs=1e-6)


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
    lines = Lines(n, y[:, None], np.ones((n.size, 1)), grid)
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


def test_lines_equal_scipys_least_squares_at_each_exponent_and_keep_under_the_ceiling():
    rng = np.random.default_rng(3)
    n, grid = np.repeat(SIZES, 2), np.array([0.1, 0.5, 1.5])
    y, weights = rng.uniform(0.4, 1.2, size=(n.size, 40)), rng.uniform(0.5, 2, size=(n.size, 40))
    lines = Lines(n, y, weights, grid)
    bound = 0
    for g, c in enumerate(grid):
        x = (n / n.max()) ** -c
        for s in range(40):
            root = np.sqrt(weights[:, s])
            design = root[:, None] * np.stack([np.ones_like(x), x], axis=1)
            found = lsq_linear(design, root * y[:, s], bounds=([-np.inf, -np.inf], [1.0, 0.0]), tol=1e-14)
            bound += lines.pinned[g, s]
            assert lines.rss[g, s] == pytest.approx(2 * found.cost)
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


def test_a_curve_is_drawn_from_the_smallest_to_twice_the_largest_size_and_no_further():
    curve = fit_curve(*runs(), resamples=50)
    for beyond, end in ((True, 2), (False, 1)):
        sizes = [point["n"] for point in curve.band(beyond=beyond)]
        assert (sizes[0], sizes[-1]) == pytest.approx((SIZES[0], end * SIZES[-1]))


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
        (runs(a=0.6, b=1e6, c=3.0, sd=0.01, sizes=SIZES[-5:]), "only the smallest size shows"),
    ],
)
def test_a_curve_that_is_not_identifiable_says_why(data, reason):
    curve = fit_curve(*data, resamples=100)
    assert not curve.identifiable
    assert any(reason in line for line in curve.reasons), curve.reasons
    ends = [cell[end] for cell in (curve.a, curve.b, curve.c) for end in ("low", "high")]
    assert None in ends or reason == "b may be 0"
    json.dumps(curve.to_dict(), allow_nan=False)


def test_a_clear_curve_is_identifiable_and_json():
    curve = fit_curve(*runs(b=2.5, c=0.5, a=0.7), resamples=200)
    assert curve.identifiable and curve.reasons == []
    for name in ("a", "b", "c"):
        cell = getattr(curve, name)
        assert cell["low"] < cell["value"] < cell["high"]
    json.dumps([curve.to_dict(), curve.band()], allow_nan=False)
    assert curve.lack_of_fit_p is not None and curve.lack_of_fit_p > 0.001


def test_the_largest_size_is_predicted_without_being_seen():
    n, y = runs(b=2.5, c=0.5, a=0.7, seed=1)
    found = hold_out_largest(n, y, resamples=200)
    assert found["inside"] and found["low"] < found["predicted"] < found["high"] and found["runs"] == 3
    moved = np.where(n == n.max(), y - 0.1, y)
    surprised = hold_out_largest(n, moved, resamples=200)
    assert not surprised["inside"]
    for key in ("predicted", "low", "high"):
        assert surprised[key] == found[key], "the held-out runs moved their own prediction"
    n, y = runs(a=0.99, b=8.0, c=0.8, sd=0.05)
    near_1 = hold_out_largest(n, np.minimum(y, 1.0), resamples=200)
    assert near_1["high"] == 1.0  # no score is higher


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (np.array([50.0, 100, 200, 400, 4000]), "4000 training images are more than 2× the next size, 400"),
        (SIZES[-4:], "3 sizes"),
        (SIZES[-1:], "one size only"),
    ],
)
def test_no_prediction_is_made_where_none_can_be(sizes, reason):
    found = hold_out_largest(*runs(sizes=sizes), resamples=50)
    assert found["predicted"] is None and found["inside"] is None and reason in found["reason"]


def test_unusable_numbers_are_refused():
    n, y = runs()
    for bad in ((n, y[:-1]), (n, np.where(n == n.max(), np.nan, y)), (n * 0, y), ([], [])):
        with pytest.raises(DataError):
            fit_curve(*bad)


def study_table(seeds=3, seed=0, *, shared=0.0):
    rng = np.random.default_rng(seed)
    sizes = np.round(5600 / 2.0 ** np.arange(6, -1, -1)).astype(int)
    rows = []
    for model, a in (("resnet18", 0.7), ("alexnet", 0.62)):
        for s in range(seeds):
            for n in sizes:
                y = a - 2.5 * n**-0.5 + 0.008 * rng.normal() + shared * (s - 1)
                row = {"model": model, "fraction": n / 5600, "n_train": n + 3 * s, "seed": s, "subset_seed": s}
                rows.append(
                    row
                    | {"balanced_accuracy": y, "balanced_accuracy_low": y - 0.04, "balanced_accuracy_high": y + 0.04}
                )
    return pd.DataFrame(rows)


def test_each_model_gets_its_curve_points_and_held_out_check():
    found = learning_curves(study_table(), "balanced_accuracy", resamples=200)
    assert list(found) == ["alexnet", "resnet18"]
    one = found["resnet18"]
    assert one["curve"]["identifiable"] and one["hold_out"]["predicted"] is not None and len(one["points"]) == 21
    assert one["curve"]["a"]["low"] < 0.7 < one["curve"]["a"]["high"]
    for point in one["band"]:
        assert point["low_patients"] < point["low"] < point["value"] < point["high"] < point["high_patients"]
        # Test-set error of ±0.04 and the fit's own, as independent errors.
        up = np.hypot(point["high"] - point["value"], 0.04)
        assert point["high_patients"] - point["value"] == pytest.approx(up, rel=0.01)
    assert one["notes"] == one["doubts"] == []
    assert one["band"][-1]["n"] == pytest.approx(2 * one["curve"]["n_max"])
    json.dumps(found, allow_nan=False)


def test_without_intervals_the_band_does_not_include_other_patients():
    table = study_table().assign(balanced_accuracy_low=np.nan, balanced_accuracy_high=np.nan)
    found = learning_curve(table[table["model"] == "alexnet"], "balanced_accuracy", resamples=50)
    assert all(point["low_patients"] is None and point["high_patients"] is None for point in found["band"])


def test_subsets_that_move_all_sizes_together_are_noticed():
    table = study_table(shared=0.02)
    found = learning_curve(table[table["model"] == "alexnet"], "balanced_accuracy", resamples=50)
    assert any("the intervals are too narrow" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("change", "inside", "doubts"),
    [
        (lambda n, y: np.where(n < 500, 0.3, 0.7) + (y - y.mean()) / 50, None, ["than chance explains (p < 0.001)"]),
        (
            lambda n, y: y - 0.06 * (n > 5000),
            False,
            ["does not predict", "is outside its 95 % interval there"],
        ),
    ],
    ids=["a jump", "a largest size that falls off"],
)
def test_a_curve_whose_form_does_not_fit_ends_with_the_data_and_says_why(change, inside, doubts):
    table = study_table()
    table["balanced_accuracy"] = change(table["n_train"], table["balanced_accuracy"])
    found = learning_curve(table[table["model"] == "resnet18"], "balanced_accuracy", resamples=100)
    assert inside is None or found["hold_out"]["inside"] is inside
    for doubt in doubts:
        assert any(doubt in line for line in found["doubts"]), found["doubts"]
    assert found["band"][-1]["n"] == pytest.approx(found["curve"]["n_max"])


def test_runs_that_share_a_subset_are_averaged_before_the_fit_and_shown_as_they_are():
    """Three seeds on each of three subsets, whose runs differ by their subset alone: intervals as wide as for three."""
    three = study_table(shared=0.01)
    nine = pd.concat([three.assign(seed=seed) for seed in range(3)])
    one, many = (
        learning_curve(table[table["model"] == "resnet18"], "balanced_accuracy", resamples=100)
        for table in (three, nine)
    )
    assert len(many["points"]) == 63 and many["curve"]["runs"] == 21
    for mine, other in zip(many["band"], one["band"], strict=True):
        assert mine == pytest.approx(other)
    assert [note for note in many["notes"] if note not in one["notes"]] == [
        "runs of one size that share a subset seed are averaged before the fit (63 runs, 21 means)"
    ]


def test_few_sizes_give_points_and_a_reason_but_no_curve():
    table = study_table()
    few = table[(table["model"] == "resnet18") & (table["fraction"] > 0.2)]
    found = learning_curve(few, "balanced_accuracy", resamples=50)
    assert found["band"] == [] and len(found["points"]) == 9 and not found["curve"]["identifiable"]
    assert any("at least 4" in note for note in found["notes"])
    with pytest.raises(DataError, match="no run has a balanced_accuracy"):
        learning_curve(few.iloc[:0], "balanced_accuracy")
