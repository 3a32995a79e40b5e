"""From logits to the numbers of a run's result.json, each with a 95 % interval from a bootstrap over lesions.

Where no resample moves a share, as with none of 12 lesions found, its interval is the exact one for so many lesions.

    result = evaluate(logits, labels, lesions, split=split, prior="balanced", logits_prior="balanced", training_prior=n)
    result["balanced_accuracy"]   # {"value": 0.61, "low": 0.57, "high": 0.65}

All of it on 1,000 resamples of 1,955 images took 0.4 s on a two-core machine. Nothing here knows of torch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.common.errors import DataError
from shards.format import CLASSES
from train.metrics.bootstrap import CONFIDENCE, LesionBootstrap, exact_interval, interval, refuse_unfit
from train.metrics.calibration import (
    BINS,
    ConfidenceBins,
    at_prior,
    class_prior,
    fit_temperature,
    prior_weights,
    softmax,
)
from train.metrics.estimates import estimate, f1_estimate, mean_freedom, number, unmoved
from train.metrics.scores import Scores

MALIGNANT = ("mel", "bcc", "akiec")
MELANOMA = "mel"

SCALARS = (
    "balanced_accuracy",
    "accuracy",
    "macro_auc",
    "macro_f1",
    "expected_calibration_error",
    "melanoma_sensitivity_at_90_specificity",
    "malignant_auc",
    "malignant_sensitivity",
    "malignant_specificity",
    "malignant_sensitivity_at_90_specificity",
)
"""Keys of a result that hold one {"value", "low", "high"}; `per_class` holds those of CLASS_SCALARS."""

CLASS_SCALARS = ("precision", "recall", "f1", "auc")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def balanced_accuracy(logits: Any, labels: Any) -> float:
    """Mean recall of the classes among the labels, for the line of an epoch. logits (N, C), labels (N,); 0 to 1.

    Raises DataError without any sample.
    """
    scores, truth = np.asarray(logits), np.asarray(labels, dtype=np.int64)
    if truth.size == 0:
        raise DataError("balanced accuracy of no samples: the split is empty")
    size = np.bincount(truth)
    right = np.bincount(truth[scores.argmax(axis=1) == truth], minlength=size.size)
    return float((right[size > 0] / size[size > 0]).mean())


def checked(logits: Any, labels: Any, classes: Sequence[str]) -> tuple[Floats, Ints]:
    """(N, C) float64 logits, (N,) int64 labels. Raises DataError for wrong shapes, no rows, NaN or unknown labels."""
    scores, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if truth.ndim != 1 or truth.size == 0:
        raise DataError(f"labels have shape {truth.shape}: one is needed for each of at least one sample")
    if scores.shape != (truth.size, len(classes)):
        raise DataError(f"logits have shape {scores.shape}, and {(truth.size, len(classes))} is needed")
    bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if bad.size:
        raise DataError(
            f"logits of {bad.size} samples are not finite, first row {bad[0]}: the model has diverged; "
            "train it with a lower --lr"
        )
    if not np.issubdtype(truth.dtype, np.integer) or truth.min() < 0 or truth.max() >= len(classes):
        raise DataError(f"labels run from {truth.min()} to {truth.max()}, and classes from 0 to {len(classes) - 1}")
    return scores, truth.astype(np.int64)


def prepare(
    logits: Any, labels: Any, *, prior: str, logits_prior: str, training_prior: Any, classes: Sequence[str] = CLASSES
) -> Scores:
    """Scores under the named prior; arguments as for `evaluate`."""
    raw, truth = checked(logits, labels, classes)
    return Scores(
        at_prior(raw, estimated=logits_prior, wanted=prior, training_prior=training_prior),
        truth,
        prior=class_prior(prior, training_prior),
        malignant=np.array([i for i, name in enumerate(classes) if name in MALIGNANT], dtype=np.int64),
        melanoma=classes.index(MELANOMA) if MELANOMA in classes else None,
    )


def replicate(scores: Sequence[Scores], bootstrap: LesionBootstrap) -> list[dict[str, Floats]]:
    """Each model's scores (see `Scores.measure`) on the test set itself (row 0) and on every resample (rows 1 up).

    All models are measured on the same resamples.
    """
    parts: list[list[dict[str, Floats]]] = [[] for _ in scores]
    for weights in bootstrap.weights():
        for mine, one in zip(parts, scores, strict=True):
            mine.append(one.measure(weights))
    return [{key: np.concatenate([part[key] for part in mine]) for key in mine[0]} for mine in parts]


def calibration_error(
    replicates: Floats, bins: ConfidenceBins, scores: Scores, bootstrap: LesionBootstrap
) -> tuple[dict[str, float | None], float | None]:
    """The expected calibration error with its interval, and the mean error that chance alone would show.

    The error is an average of absolute gaps, so noise in each bin makes it larger: with true chances for confidences it
    is 0, and a test set of 900 images shows 0.03 to 0.06. Resamples add that once more, hence the `basic` interval, and
    its low end is 0 where chance alone explains the value (97.5 % of draws). The intervals then hold the truth of a
    calibrated model in 97 to 99 % of 400 simulated test sets, and of an overconfident one in 88 to 89 %
    (`python -m tests.support.simulate_coverage --only metrics`), less than those of the other metrics (92 to 97 %).
    They are about the error without its bias, and may lie below the value that is shown: they are then widened to it.
    """
    cell = estimate(replicates, kind="basic")
    if cell["value"] is None:
        return cell, None
    weights = prior_weights(scores.labels, np.ones((scores.labels.size, 1)), scores.prior)
    chance = bins.of_chance(weights, bootstrap.codes, draws=1000, seed=bootstrap.seed)
    if cell["value"] <= np.quantile(chance, (1 + CONFIDENCE) / 2) and cell["low"] is not None:
        cell["low"] = 0.0
    if cell["low"] is not None and cell["high"] is not None:
        # An interval without its own estimate reads as a mistake, and a wider one holds the truth no less often.
        cell["low"], cell["high"] = min(cell["low"], cell["value"]), max(cell["high"], cell["value"])
    return cell, float(chance.mean())


def reliability(replicates: dict[str, Floats], images: Ints) -> list[dict[str, Any]]:
    """One dict a bin of confidence: its edges, images, share of the (prior-weighted) images, confidence, accuracy."""
    mass = replicates["reliability_mass"]
    return [
        {
            "from": b / BINS,
            "to": (b + 1) / BINS,
            "images": int(images[b]),
            "share": number(mass[0, b]),
            "confidence": number(replicates["reliability_confidence"][0, b]),
            "accuracy": estimate(replicates["reliability_accuracy"][:, b]),
        }
        for b in range(BINS)
    ]


def evaluate(
    logits: Any,
    labels: Any,
    lesions: Sequence[Any] | NDArray[Any] | None,
    *,
    split: Sequence[str] | NDArray[Any],
    prior: str,
    logits_prior: str,
    training_prior: Any,
    image_id: Sequence[str] | NDArray[Any] | None = None,
    mask: NDArray[np.bool_] | None = None,
    wanted_split: str = "test",
    val_logits: Any = None,
    val_labels: Any = None,
    resamples: int = 1000,
    seed: int = 0,
    classes: Sequence[str] = CLASSES,
) -> dict[str, Any]:
    """Every metric of the study with its interval, as a dict for JSON (no NaN: None where a metric is undefined).

    logits (N, C), labels (N,) 0 to C − 1, lesions (N,) ids (None: images are resampled, and the result says so), split
    (N,) names, image_id (N,), mask (N,) False where padded: rows that are padded, twice or not of `wanted_split` are
    refused with DataError. prior: the one (`balanced` or `training`) that probabilities, calls and calibration are for.
    logits_prior: the one that the raw logits stand for (`calibration.at_prior`). training_prior: (C,) counts of the
    training images. val_logits, val_labels: a temperature is fitted on them and the calibration after it reported.

    Classes without a test image are listed in `absent_classes`, and means are over the others. Calibration is measured
    on the test images weighted to the named prior; every other metric on the images as they are.
    """
    refuse_unfit(split, image_id=image_id, mask=mask, wanted=wanted_split)
    scores = prepare(
        logits, labels, prior=prior, logits_prior=logits_prior, training_prior=training_prior, classes=classes
    )
    if len(np.asarray(split)) != scores.labels.size:
        raise DataError(f"{len(np.asarray(split))} split names for {scores.labels.size} samples")
    bootstrap = LesionBootstrap(scores.labels, lesions, resamples=resamples, seed=seed)
    found = replicate([scores], bootstrap)[0]
    images = np.bincount(scores.labels, minlength=len(classes))
    groups = np.bincount(bootstrap.lesion_label, minlength=len(classes))
    rates = found["confusion"] / np.maximum(found["confusion"].sum(axis=2, keepdims=True), 1e-300)
    ends, exact = interval(rates[1:], rates[0]), exact_interval(rates[0], np.maximum(groups, 1)[:, None])
    low, high = (np.where(unmoved(rates), sure, end) for sure, end in zip(exact, ends, strict=True))
    result: dict[str, Any] = {
        "split": wanted_split,
        "prior": prior,
        "logits_prior": logits_prior,
        "training_prior": dict(zip(classes, class_prior("training", training_prior).tolist(), strict=True)),
        "images": int(scores.labels.size),
        "lesions": bootstrap.lesions if lesions is not None else None,
        "confidence": CONFIDENCE,
        "resamples": resamples,
        "resampled": bootstrap.unit,
        "bootstrap_seed": seed,
        "absent_classes": [name for name, n in zip(classes, images, strict=True) if n == 0],
        "classes_of_one_lesion": [classes[c] for c in bootstrap.single],
    }
    malignant = sum(int(n) for name, n in zip(classes, groups, strict=True) if name in MALIGNANT)
    of = {
        "melanoma_sensitivity_at_90_specificity": int(groups[scores.melanoma or 0]),
        "malignant_sensitivity": malignant,
        "malignant_sensitivity_at_90_specificity": malignant,
        "malignant_specificity": bootstrap.lesions - malignant,
    }
    result |= {key: estimate(found[key], lesions=of.get(key)) for key in SCALARS}
    freed = mean_freedom(found["recall"], bootstrap)
    result["balanced_accuracy"] = estimate(found["balanced_accuracy"], freedom=freed)
    result["expected_calibration_error"], result["calibration_error_of_chance"] = calibration_error(
        found["expected_calibration_error"], scores.bins, scores, bootstrap
    )
    result["per_class"] = {
        name: {"images": int(images[c]), "lesions": int(groups[c]) if lesions is not None else None}
        | _of_class(found, c, int(groups[c]), np.unique(bootstrap.codes[scores.predicted == c]).size)
        for c, name in enumerate(classes)
    }
    present = images > 0
    result["confusion_matrix"] = {
        "classes": list(classes),
        "counts": np.rint(found["confusion"][0]).astype(int).tolist(),
        "rates": _rows(rates[0], present),
        "low": _rows(low, present),
        "high": _rows(high, present),
    }
    result["reliability"] = reliability(found, scores.bins.images)
    result["temperature_scaling"] = None
    if val_logits is not None:
        raw, truth = checked(val_logits, val_labels, classes)
        val = at_prior(raw, estimated=logits_prior, wanted=prior, training_prior=training_prior)
        test = at_prior(logits, estimated=logits_prior, wanted=prior, training_prior=training_prior)
        result["temperature_scaling"] = _scaled(test, scores, bootstrap, val, truth)
    return result


def _of_class(found: dict[str, Floats], c: int, lesions: int, called: int) -> dict[str, Any]:
    """CLASS_SCALARS of class c. lesions, called: as for `f1_estimate`."""
    freedom = max(lesions - 1, 1)
    return {
        "precision": estimate(found["precision"][:, c], freedom=freedom, lesions=called),
        "recall": estimate(found["recall"][:, c], freedom=freedom, lesions=lesions),
        "f1": f1_estimate(found, c, lesions, called),
        "auc": estimate(found["auc"][:, c], freedom=freedom),
    }


def _rows(matrix: Floats, present: NDArray[np.bool_]) -> list[list[float] | None]:
    """Rows of the present classes, None for the others."""
    return [row.tolist() if here else None for row, here in zip(matrix, present, strict=True)]


def _scaled(test: Floats, scores: Scores, bootstrap: LesionBootstrap, val: Floats, val_labels: Ints) -> dict[str, Any]:
    """Calibration on the test set after the temperature that fits val best; the calls stay as they are."""
    fitted = fit_temperature(val, val_labels, scores.prior)
    bins = ConfidenceBins(softmax(test / fitted.temperature), scores.labels)
    parts = [bins.measure(prior_weights(scores.labels, weights, scores.prior)) for weights in bootstrap.weights()]
    error, chance = calibration_error(np.concatenate([p.error for p in parts]), bins, scores, bootstrap)
    found = {
        "reliability_mass": np.concatenate([p.mass.T for p in parts]),
        "reliability_confidence": np.concatenate([p.confidence.T for p in parts]),
        "reliability_accuracy": np.concatenate([p.accuracy.T for p in parts]),
    }
    return {
        "temperature": fitted.temperature,
        "at_limit": fitted.at_limit,
        "val_images": int(val_labels.size),
        "val_loss_before": number(fitted.loss_before),
        "val_loss_after": number(fitted.loss_after),
        "expected_calibration_error": error,
        "calibration_error_of_chance": chance,
        "reliability": reliability(found, bins.images),
    }


def flatten(result: dict[str, Any]) -> dict[str, float | None]:
    """One row of a table: `name`, `name_low`, `name_high` for each scalar, `recall_mel` … for each of each class."""
    cells = {key: result[key] for key in SCALARS}
    for name, scores in result["per_class"].items():
        cells |= {f"{key}_{name}": scores[key] for key in CLASS_SCALARS}
    if result["temperature_scaling"] is not None:
        cells["expected_calibration_error_scaled"] = result["temperature_scaling"]["expected_calibration_error"]
    row: dict[str, float | None] = {}
    for key, cell in cells.items():
        row |= {key: cell["value"], f"{key}_low": cell["low"], f"{key}_high": cell["high"]}
    return row
