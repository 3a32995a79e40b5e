"""Pairs of runs on the same test lesions, and learning curves from a table of runs."""

import json

import numpy as np
import pandas as pd
import pytest

from shards.errors import DataError
from shards.format import CLASSES
from train.metrics import evaluate
from train.study import learning_curve, learning_curves, model_difference, model_differences, paired_difference
from train.study import tested as make_ready

COUNTS = np.array([327, 514, 1099, 115, 1113, 6705, 142])
PRIORS = {"prior": "balanced", "logits_prior": "balanced", "training_prior": COUNTS}


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
    return table.assign(**{f"logit_{name}": logits[:, c].astype(np.float32) for c, name in enumerate(CLASSES)})


def test_both_sides_are_what_evaluate_says():
    table = predictions(2.0)
    told = paired_difference(make_ready(table, **PRIORS), make_ready(predictions(1.0, 1), **PRIORS), resamples=50)
    rows = table[table["split"] == "test"]
    alone = evaluate(
        rows[[f"logit_{name}" for name in CLASSES]].to_numpy(),
        rows["label"].to_numpy(),
        rows["lesion_id"].to_numpy(),
        split=rows["split"].to_numpy(),
        resamples=50,
        **PRIORS,
    )
    for name, cell in told.items():
        assert cell["first"] == pytest.approx(alone[name]["value"]), name
        assert cell["difference"]["value"] == pytest.approx(cell["first"] - cell["second"])
    json.dumps(told, allow_nan=False)


def test_a_clear_difference_is_found_whatever_the_order_of_rows_and_turns_sign_with_the_runs():
    better, worse = predictions(2.0), predictions(1.0, 1)
    shuffled = worse.sample(frac=1, random_state=3)
    one, two = make_ready(better, **PRIORS), make_ready(shuffled, **PRIORS)
    there, back = paired_difference(one, two, resamples=500), paired_difference(two, one, resamples=500)
    for name in ("balanced_accuracy", "macro_auc"):
        cell = there[name]["difference"]
        assert 0 < cell["low"] < cell["value"] < cell["high"] and there[name]["p"] < 0.01
        mirrored = back[name]["difference"]
        assert mirrored["low"] == pytest.approx(-cell["high"], abs=0.005)
        assert mirrored["value"] == pytest.approx(-cell["value"])
    assert there == paired_difference(one, make_ready(worse, **PRIORS), resamples=500)


def test_a_run_does_not_differ_from_itself():
    run = make_ready(predictions(1.0), **PRIORS)
    for cell in paired_difference(run, run, resamples=100).values():
        assert cell["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0} and cell["p"] == 1.0
    for cell in model_difference([run, run], [run, run], resamples=100).values():
        assert cell["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0} and cell["p"] == 1.0


def test_pairing_makes_the_interval_narrower_than_two_test_sets_would():
    one, two = make_ready(predictions(1.2), **PRIORS), make_ready(predictions(1.0, 1), **PRIORS)
    cell = paired_difference(one, two, resamples=500)["balanced_accuracy"]["difference"]
    paired = cell["high"] - cell["low"]
    apart = 0.0
    for table in (predictions(1.2), predictions(1.0, 1)):
        rows = table[table["split"] == "test"]
        alone = evaluate(
            rows[[f"logit_{name}" for name in CLASSES]].to_numpy(),
            rows["label"].to_numpy(),
            rows["lesion_id"].to_numpy(),
            split=rows["split"].to_numpy(),
            resamples=500,
            **PRIORS,
        )["balanced_accuracy"]
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


@pytest.mark.parametrize(("shared", "what"), [(1, "subset seeds"), (0, "seeds")])
def test_crossed_runs_are_no_surer_than_the_subsets_or_seeds_that_they_share(shared, what):
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
        assert cell["note"] == f"9 pairs of runs share 3 {what} and count as 3 independent ones"
        assert expected["note"] == ""


def test_on_one_subset_the_seeds_are_independent():
    sides = {
        model: [make_ready(predictions(1.0 + 0.2 * i, 5 * j + i, lesions=80), **PRIORS) for i in range(3)]
        for j, model in enumerate("ab")
    }
    keyed = {model: {(seed, 0): run for seed, run in enumerate(runs)} for model, runs in sides.items()}
    (one,) = model_differences(keyed, resamples=50)
    assert one["metrics"] == model_difference(sides["a"], sides["b"], resamples=50)


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
            paired_difference(run, make_ready(changed, **PRIORS))


def test_padded_train_and_missing_rows_are_refused():
    table = predictions(1.0)
    with pytest.raises(DataError, match="counted only once"):
        make_ready(pd.concat([table, table.iloc[-1:].assign(split="test")] * 2), **PRIORS)
    with pytest.raises(DataError, match="the model has seen them"):
        make_ready(table.assign(split="train"), split="train", **PRIORS)
    with pytest.raises(DataError, match="empty"):
        make_ready(table.assign(split="train"), **PRIORS)
    with pytest.raises(DataError, match="no column logit_mel"):
        make_ready(table.drop(columns="logit_mel"), **PRIORS)


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


def test_a_curve_whose_form_does_not_fit_is_noted():
    table = study_table()
    jump = np.where(table["n_train"] < 500, 0.3, 0.7) + 0.005 * np.random.default_rng(0).normal(size=len(table))
    jumping = table.assign(balanced_accuracy=jump)
    told = learning_curve(jumping[table["model"] == "alexnet"], "balanced_accuracy", resamples=50)
    assert any("its form does not fit" in note and "p < 0.001" in note for note in told["notes"])


def test_few_sizes_give_points_and_a_reason_but_no_curve():
    table = study_table()
    few = table[(table["model"] == "resnet18") & (table["fraction"] > 0.2)]
    told = learning_curve(few, "balanced_accuracy", resamples=50)
    assert told["band"] == [] and len(told["points"]) == 9 and not told["curve"]["identifiable"]
    assert any("at least 4" in note for note in told["notes"])
    with pytest.raises(DataError, match="no run has a balanced_accuracy"):
        learning_curve(few.iloc[:0], "balanced_accuracy")
