"""Pairs of runs on the same test lesions."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from shards.common.errors import DataError
from shards.format import HAM10000
from tests.support import simulate_coverage as simulate
from train.metrics.bootstrap import pooled_freedom
from train.metrics.differences import between_pairs, model_difference, model_differences, student
from train.metrics.differences import tested as make_ready
from train.metrics.run_metrics import evaluate

COUNTS = np.array([327, 514, 1099, 115, 1113, 6705, 142])
PRIORS = {"classes": HAM10000, "prior": "balanced", "logits_prior": "balanced", "training_prior": COUNTS}


def predictions(skill, seed=0, *, lesions=200, data_seed=0):
    """A run's table, val and test rows; runs of one data_seed share images and what makes them hard."""
    shared, own = np.random.default_rng(data_seed), np.random.default_rng([seed, 1])
    label = np.concatenate([np.repeat(np.arange(7), 6), shared.choice(7, lesions)])
    views = shared.choice([1, 2], label.size)
    labels = np.repeat(label, views)
    hard = np.repeat(shared.normal(size=(label.size, 7)), views, axis=0)
    logits = 1.5 * hard + 0.5 * own.normal(size=hard.shape)
    logits[np.arange(labels.size), labels] += skill
    table = pd.DataFrame(
        {
            "image_id": [f"ISIC_{i:07d}" for i in range(labels.size)],
            "lesion_id": np.repeat([f"HAM_{i}" for i in range(label.size)], views),
            "split": np.where(np.repeat(np.arange(label.size) % 4 == 0, views), "val", "test"),
            "label": labels,
        }
    )
    return table.assign(**{f"logit_{name}": logits[:, c].astype(np.float32) for c, name in enumerate(HAM10000.names)})


def evaluated(table: pd.DataFrame, resamples: int) -> dict:
    """What `evaluate` returns for one run's test images."""
    rows = table[table["split"] == "test"]
    return evaluate(
        rows[[f"logit_{name}" for name in HAM10000.names]].to_numpy(),
        rows["label"].to_numpy(),
        rows["lesion_id"].to_numpy(),
        split=rows["split"].to_numpy(),
        resamples=resamples,
        **PRIORS,
    )


def test_both_sides_are_what_evaluate_returns():
    table = predictions(2.0)
    found = model_difference([make_ready(table, **PRIORS)], [make_ready(predictions(1.0, 1), **PRIORS)], resamples=50)
    alone = evaluated(table, 50)
    for name, cell in found.items():
        assert cell["first"] == pytest.approx(alone[name]["value"]), name
        assert cell["difference"]["value"] == pytest.approx(cell["first"] - cell["second"])
    json.dumps(found, allow_nan=False)


def test_a_clear_difference_is_found_whatever_the_order_of_rows_and_turns_sign_with_the_runs():
    better, worse = predictions(2.0), predictions(1.0, 1)
    shuffled = worse.sample(frac=1, random_state=3)
    one, two = make_ready(better, **PRIORS), make_ready(shuffled, **PRIORS)
    there, back = (model_difference([a], [b], resamples=500) for a, b in ((one, two), (two, one)))
    for name in ("balanced_accuracy", "macro_auc"):
        cell = there[name]["difference"]
        assert 0 < cell["low"] < cell["value"] < cell["high"] and there[name]["p"] < 0.01
        mirrored = back[name]["difference"]
        assert mirrored["low"] == pytest.approx(-cell["high"], abs=0.005)
        assert mirrored["value"] == pytest.approx(-cell["value"])
    assert there == model_difference([one], [make_ready(worse, **PRIORS)], resamples=500)


def test_a_run_does_not_differ_from_itself():
    run = make_ready(predictions(1.0), **PRIORS)
    for runs in ([run], [run, run]):
        for cell in model_difference(runs, runs, resamples=100).values():
            assert cell["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0} and cell["p"] == 1.0


def test_pairing_makes_the_interval_narrower_than_two_test_sets_would():
    one, two = make_ready(predictions(1.2), **PRIORS), make_ready(predictions(1.0, 1), **PRIORS)
    cell = model_difference([one], [two], resamples=500)["balanced_accuracy"]["difference"]
    paired = cell["high"] - cell["low"]
    apart = 0.0
    for table in (predictions(1.2), predictions(1.0, 1)):
        alone = evaluated(table, 500)["balanced_accuracy"]
        apart += (alone["high"] - alone["low"]) ** 2
    assert paired < 0.8 * apart**0.5


def test_the_difference_of_models_includes_the_spread_of_seeds():
    def side(skills, first_seed):
        return [make_ready(predictions(s, first_seed + i), **PRIORS) for i, s in enumerate(skills)]

    steady = model_difference(side([1.5] * 3, 0), side([1.0] * 3, 10), resamples=200)["balanced_accuracy"]
    restless = model_difference(side([1.0, 1.5, 2.0], 0), side([1.5, 1.2, 0.9], 10), resamples=200)["balanced_accuracy"]
    width = {k: c["difference"]["high"] - c["difference"]["low"] for k, c in {"s": steady, "r": restless}.items()}
    assert width["r"] > 2 * width["s"]
    assert steady["includes_seeds"] and steady["runs"] == 3 and steady["p"] < 0.05 < restless["p"]
    alone = model_difference(side([1.5], 0), side([1.2], 10), resamples=200)["balanced_accuracy"]
    assert not alone["includes_seeds"]
    with pytest.raises(DataError, match="pairs of equal seeds"):
        model_difference(side([1.5], 0), [])


def test_all_models_against_each_other_are_the_single_differences_over_shared_seeds():
    runs = {
        model: {seed: make_ready(predictions(skill, 10 * i + seed), **PRIORS) for seed in seeds}
        for i, (model, skill, seeds) in enumerate([("a", 1.5, (0, 1, 2)), ("b", 1.2, (2, 1)), ("c", 1.0, (7,))])
    }
    (only,) = model_differences(runs, resamples=100)
    assert (only["first"], only["second"]) == ("a", "b")
    pairs = ([runs[model][seed] for seed in (1, 2)] for model in "ab")
    assert only["metrics"] == model_difference(*pairs, resamples=100)
    assert model_differences({}) == []


@pytest.mark.parametrize("shared", [0, 1], ids=["seeds", "subset seeds"])
def test_crossed_runs_have_intervals_as_wide_as_the_subsets_or_seeds_that_they_share(shared):
    """Nine runs that are three, each three times, say exactly what the three say."""
    three = {
        model: [make_ready(predictions(skill, 10 * j + i, lesions=80), **PRIORS) for i, skill in enumerate(skills)]
        for j, (model, skills) in enumerate([("a", (1.2, 1.5, 1.8)), ("b", (1.0, 1.1, 0.9))])
    }
    keys = [(seed, subset) for seed in range(3) for subset in range(3)]
    crossed = {model: {key: runs[key[shared]] for key in keys} for model, runs in three.items()}
    alone = {model: {(i, i): run for i, run in enumerate(runs)} for model, runs in three.items()}
    (nine,), (few,) = (model_differences(runs, resamples=100) for runs in (crossed, alone))
    for name, cell in nine["metrics"].items():
        expected = few["metrics"][name]
        assert cell["runs"] == 9 and cell["p"] == pytest.approx(expected["p"]), name
        assert cell["difference"] == pytest.approx(expected["difference"])
        assert "9 pairs of runs share 3 subset seeds and 3 seeds" in cell["note"]
        assert expected["note"] == ""


def test_interval_and_p_of_a_difference_are_scipys_t_tests():
    gaps = np.random.default_rng(0).normal(0.5, size=9)
    expected = stats.ttest_1samp(gaps, 0)
    low, high, p = student(gaps.mean(), *between_pairs(gaps, range(9))[:2])
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval())) and p == pytest.approx(expected.pvalue)
    at_the_end = student(gaps.mean() - low, gaps.var(ddof=1) / 9, 8)
    assert at_the_end[0] == pytest.approx(0) and at_the_end[2] == pytest.approx(0.05)
    assert student(0.0, 0.0, 8) == (0.0, 0.0, 1.0) and student(0.1, 0.0, 8) == (0.1, 0.1, None)
    other = 3 * np.random.default_rng(1).normal(size=14)
    variances = np.array([gaps.var(ddof=1) / 9, other.var(ddof=1) / 14])
    welch = stats.ttest_ind(gaps, other, equal_var=False).df
    assert pooled_freedom(variances, np.array([8.0, 13.0])) == pytest.approx(welch)
    assert pooled_freedom(np.zeros(2), np.array([3.0, 4.0])) == np.inf


def test_crossed_pairs_add_what_seeds_and_what_subsets_do():
    """Of gaps s_i + u_j, each of variance 1, the mean of 3 × 3 varies by 2/3: either part alone would be half of it."""
    effects = np.array([-1.0, 0.0, 1.0])
    keys = [(seed, subset) for seed in range(3) for subset in range(3)]
    variance, freedom, _ = between_pairs(np.array([effects[i] + effects[j] for i, j in keys]), keys)
    assert variance == pytest.approx(2 / 3) and freedom == pytest.approx(4)
    # Each seed has its own subset, or all runs have one: every pair counts.
    gaps = np.array([0.0, 0.3, 0.9])
    for plain in ([(0, 0), (1, 1), (2, 2)], [(0, 5), (1, 5), (2, 5)], [0, 1, 2]):
        assert between_pairs(gaps, plain) == (pytest.approx(gaps.var(ddof=1) / 3), 2, "")
    # Two seeds with subsets of their own: seeds are all that pairs share.
    variance, freedom, note = between_pairs(np.array([0.0, 0.2, 1.0, 1.2]), [(0, 0), (0, 1), (1, 2), (1, 3)])
    assert variance == pytest.approx(0.25) and freedom == 1 and "share 2 seeds," in note


@pytest.mark.parametrize("spreads", [(1.0, 1.0, 0.3), (0.3, 1.0, 1.0)])
def test_intervals_over_crossed_seeds_hold_the_truth(spreads):
    assert simulate.crossed_pairs(1500, *spreads) >= 0.94


def test_runs_on_different_tests_are_refused():
    table = predictions(1.0)
    run = make_ready(table, **PRIORS)
    test_rows = table.index[table["split"] == "test"]
    other_label = table.copy()
    lesion = table.loc[test_rows[0], "lesion_id"]
    other_label.loc[table["lesion_id"] == lesion, "label"] = (table.loc[test_rows[0], "label"] + 1) % 7
    other_lesion = table.copy()
    other_lesion.loc[test_rows[0], "lesion_id"] = "HAM_x"
    for changed, text in (
        (table.drop(index=test_rows[0]), "different images"),
        (other_label, "disagree on the label"),
        (other_lesion, "disagree on the lesion"),
        (table.assign(lesion_id=None), "disagree on the lesion"),
    ):
        with pytest.raises(DataError, match=text):
            model_difference([run], [make_ready(changed, **PRIORS)])


def test_padded_train_and_missing_rows_are_refused():
    table = predictions(1.0)
    with pytest.raises(DataError, match="counted only once"):
        make_ready(pd.concat([table, table.iloc[-1:].assign(split="test")] * 2), **PRIORS)
    with pytest.raises(DataError, match="empty"):
        make_ready(table.assign(split="train"), **PRIORS)
    with pytest.raises(DataError, match="no column logit_mel"):
        make_ready(table.drop(columns="logit_mel"), **PRIORS)
