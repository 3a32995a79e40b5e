"""Intervals of small or calibrated test sets hold the value beside which they are printed."""

import numpy as np
import pytest

from train.calibration import softmax
from train.metrics import CLASS_SCALARS, evaluate


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
