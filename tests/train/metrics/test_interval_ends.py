"""Intervals of small or calibrated test sets hold the value beside which they are printed."""

import numpy as np
import pytest

from shards.format import CLASSES
from tests.support import simulate_coverage as simulate
from train.metrics.bootstrap import exact_interval
from train.metrics.calibration import softmax
from train.metrics.summary import CLASS_SCALARS, evaluate

MEL, BCC, DF, NV = (CLASSES.index(name) for name in ("mel", "bcc", "df", "nv"))


def calibrated(seed, images=400):
    """Logits and labels of a model that is right as often as it says: its calibration error is bias alone."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(images, 7))
    labels = np.array([rng.choice(7, p=p) for p in softmax(logits)])
    return logits, labels


def run(logits, labels, **more):
    return evaluate(
        logits,
        labels,
        None,
        split=["test"] * labels.size,
        prior="training",
        logits_prior="training",
        training_prior=np.bincount(labels, minlength=7),
        resamples=200,
        **more,
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_of_a_calibration_error_holds_it_before_and_after_scaling(seed):
    """Resamples add the error's bias once more, and mirrored about the value they end below it."""
    logits, labels = calibrated(seed)
    result = run(logits, labels, val_logits=logits, val_labels=labels)
    for told in (result, result["temperature_scaling"]):
        cell = told["expected_calibration_error"]
        assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1


@pytest.mark.parametrize("rare", [1, 2])
def test_intervals_of_a_class_of_few_lesions_hold_their_value(rare):
    logits, labels = calibrated(4, images=60)
    keep = np.ones(labels.size, dtype=bool)
    keep[np.flatnonzero(labels == 1)[rare:]] = False
    told = run(logits[keep], labels[keep])["per_class"]["bcc"]
    assert told["images"] == rare
    for name in CLASS_SCALARS:
        cell = told[name]
        if cell["value"] is not None:
            assert cell["low"] <= cell["value"] <= cell["high"], name


def told_of_few(right, lesions=12, views=2):
    """A test set of two views of each of so many df lesions and 100 nv images; (N,) whether each df image is right."""
    labels = np.concatenate([np.full(lesions * views, DF), np.full(100, NV)])
    called = np.concatenate([np.where(right, DF, NV), np.full(100, NV)])
    names = [f"a{i // views}" for i in range(lesions * views)] + [f"b{i}" for i in range(100)]
    return evaluate(
        6.0 * np.eye(7)[called],
        labels,
        names,
        split=["test"] * labels.size,
        prior="balanced",
        logits_prior="balanced",
        training_prior=np.ones(7),
        resamples=200,
    )


def test_none_of_twelve_lesions_right_does_not_mean_that_none_ever_is():
    result = told_of_few(np.zeros(24, dtype=bool))
    df = result["per_class"]["df"]
    assert df["recall"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / 12))}
    assert df["recall"]["high"] == pytest.approx(0.265, abs=1e-3)
    assert df["precision"] == {"value": None, "low": None, "high": None}
    # A precision that is unknown may be 1: F1 = 2r / (1 + r).
    high = df["recall"]["high"]
    assert df["f1"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(2 * high / (1 + high))}
    matrix = result["confusion_matrix"]
    assert matrix["low"][DF][NV] == pytest.approx(1 - high) and matrix["high"][DF][NV] == 1.0
    assert matrix["high"][DF][DF] == pytest.approx(high) and matrix["low"][MEL] is None
    assert matrix["high"][NV][DF] == pytest.approx(1 - 0.025 ** (1 / 100))


def test_all_of_twelve_lesions_right_does_not_mean_that_all_ever_are():
    result = told_of_few(np.ones(24, dtype=bool))
    df, nv = result["per_class"]["df"], result["per_class"]["nv"]
    low = 0.025 ** (1 / 12)
    for name in ("recall", "precision", "f1"):  # twelve lesions are of the class, and twelve are called so
        assert df[name] == {"value": 1.0, "low": pytest.approx(low), "high": 1.0}, name
    assert nv["recall"]["low"] == pytest.approx(0.025 ** (1 / 100))
    assert result["malignant_specificity"] == {"value": 1.0, "low": pytest.approx(0.025 ** (1 / 112)), "high": 1.0}


def test_the_sensitivity_of_a_model_that_misses_every_melanoma_has_an_upper_end():
    labels = np.concatenate([np.full(15, MEL), np.full(5, BCC), np.full(60, NV)])
    logits = 6.0 * np.eye(7)[np.full(labels.size, NV)]
    logits[labels == NV, MEL] = 1.0  # nevi look more like melanoma than melanoma does
    result = run(logits, labels)
    for name, lesions in (
        ("melanoma_sensitivity_at_90_specificity", 15),
        ("malignant_sensitivity_at_90_specificity", 20),
        ("malignant_sensitivity", 20),
    ):
        assert result[name] == {"value": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025 ** (1 / lesions))}, name


def test_where_resamples_differ_the_interval_is_theirs():
    right = np.repeat(np.arange(12) < 5, 2)
    cell = told_of_few(right)["per_class"]["df"]["recall"]
    low, high = exact_interval(5 / 12, 12)
    assert cell["value"] == pytest.approx(5 / 12) and cell["low"] != pytest.approx(float(low))
    assert 0 < cell["low"] < 5 / 12 < cell["high"] < 1 and cell["high"] != pytest.approx(float(high))


@pytest.mark.parametrize("recall", [0.02, 0.1, 0.5, 0.9])
def test_the_recall_of_a_rare_class_holds_the_truth(recall):
    """Intervals of no width where none or all are right would hold it in 21 to 90 %."""
    assert simulate.recall_of_few(recall, 12, 200, resamples=100) >= 0.93
