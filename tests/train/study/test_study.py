"""Learning curves from a table of runs, and when they are not to be believed beyond it."""

import json

import numpy as np
import pandas as pd
import pytest

from shards.common.errors import DataError
from train.study.learning import learning_curve, learning_curves


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
    told = learning_curves(study_table(), "balanced_accuracy", resamples=200)
    assert list(told) == ["alexnet", "resnet18"]
    one = told["resnet18"]
    assert one["curve"]["identifiable"] and one["hold_out"]["predicted"] is not None and len(one["points"]) == 21
    assert one["curve"]["a"]["low"] < 0.7 < one["curve"]["a"]["high"]
    for point in one["band"]:
        assert point["low_patients"] < point["low"] < point["value"] < point["high"] < point["high_patients"]
        # Test-set error of ±0.04 and the fit's own, as independent errors.
        up = np.hypot(point["high"] - point["value"], 0.04)
        assert point["high_patients"] - point["value"] == pytest.approx(up, rel=0.01)
    assert one["notes"] == []
    json.dumps(told, allow_nan=False)


def test_without_intervals_in_the_table_the_band_says_nothing_of_other_patients():
    table = study_table()[["model", "n_train", "balanced_accuracy"]]
    told = learning_curve(table[table["model"] == "alexnet"], "balanced_accuracy", resamples=50)
    assert all(point["low_patients"] is None and point["high_patients"] is None for point in told["band"])
    assert all(point["seed"] is None for point in told["points"])


def test_subsets_that_move_all_sizes_together_are_noticed():
    table = study_table(shared=0.02)
    told = learning_curve(table[table["model"] == "alexnet"], "balanced_accuracy", resamples=50)
    assert any("the intervals are too narrow" in note for note in told["notes"])


def largest_at(table, shift):
    """The table with the scores of the largest size moved."""
    moved = table["balanced_accuracy"] + np.where(table["fraction"] == 1.0, shift, 0.0)
    return table.assign(balanced_accuracy=moved)


def test_a_curve_that_holds_is_drawn_beyond_the_data_and_is_not_in_doubt():
    told = learning_curves(study_table(), "balanced_accuracy", resamples=100)["resnet18"]
    assert told["doubts"] == [] and told["band"][-1]["n"] == pytest.approx(2 * told["curve"]["n_max"])


def test_a_curve_whose_form_does_not_fit_ends_with_the_data():
    table = study_table()
    jump = np.where(table["n_train"] < 500, 0.3, 0.7) + 0.005 * np.random.default_rng(0).normal(size=len(table))
    jumping = table.assign(balanced_accuracy=jump)
    told = learning_curve(jumping[table["model"] == "alexnet"], "balanced_accuracy", resamples=50)
    assert any("than chance explains (p < 0.001)" in doubt for doubt in told["doubts"])
    assert told["band"][-1]["n"] == pytest.approx(told["curve"]["n_max"])


def test_a_largest_size_that_falls_off_puts_the_curve_in_doubt():
    table = largest_at(study_table(), -0.06)
    told = learning_curve(table[table["model"] == "resnet18"], "balanced_accuracy", resamples=100)
    assert told["hold_out"]["inside"] is False
    assert any("does not foretell" in doubt for doubt in told["doubts"])
    assert any("lies outside of its 95 % interval there" in doubt for doubt in told["doubts"])
    assert told["band"][-1]["n"] == pytest.approx(told["curve"]["n_max"])


def test_runs_that_share_a_subset_are_averaged_before_the_fit_and_shown_as_they_are():
    """Three seeds on each of three subsets, whose runs differ by their subset alone: as sure as the three subsets."""
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
    told = learning_curve(few, "balanced_accuracy", resamples=50)
    assert told["band"] == [] and len(told["points"]) == 9 and not told["curve"]["identifiable"]
    assert any("at least 4" in note for note in told["notes"])
    with pytest.raises(DataError, match="no run has a balanced_accuracy"):
        learning_curve(few.iloc[:0], "balanced_accuracy")
