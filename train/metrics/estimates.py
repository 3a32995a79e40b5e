"""A value with its 95 % interval, {"value", "low", "high"}, from what it is on the test set and on every resample."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.metrics.bootstrap import LesionBootstrap, exact_interval, interval, pooled_freedom

Floats = NDArray[np.float64]


def number(value: float) -> float | None:
    """A float that JSON can hold: None for NaN and infinities."""
    return float(value) if math.isfinite(value) else None


def estimate(
    replicates: Floats,
    *,
    kind: str = "bca",
    freedom: float = np.inf,
    limits: tuple[float, float] = (0.0, 1.0),
    lesions: int | None = None,
) -> dict[str, Any]:
    """{"value", "low", "high"} of (R + 1,) replicates whose first is the value; None where undefined.

    kind, freedom: as for `bootstrap.interval`; limits: of the metric. lesions: of a share, how many lesions it is of:
    where no resample moves it, the interval is the exact one for so many, and no empty one.
    """
    if not np.isfinite(replicates[0]):
        return {"value": None, "low": None, "high": None}
    if lesions is not None and unmoved(replicates):
        low, high = exact_interval(replicates[0], lesions)
    else:
        low, high = interval(replicates[1:], replicates[0], kind=kind, freedom=freedom)
    return {
        "value": number(replicates[0]),
        "low": number(float(np.clip(low, *limits))),
        "high": number(float(np.clip(high, *limits))),
    }


def unmoved(replicates: Floats) -> NDArray[np.bool_]:
    """Which of (R + 1, …) replicates are the same in every resample that has them; False without resamples."""
    known = np.where(np.isnan(replicates), replicates[0], replicates)
    return (np.ptp(known, axis=0) < 1e-9) & (len(replicates) > 1)


def f1_estimate(found: dict[str, Floats], c: int, lesions: int, called: int) -> dict[str, Any]:
    """F1 of class c. Where no resample moves it: from F1 of the low to F1 of the high ends of precision and recall.

    lesions, called: of the class, and with an image called so. An undefined precision, of a class never called, counts
    as 1 at the high end. Both ends at once are rarer than either, so the interval is wide rather than narrow.
    """
    cell = estimate(found["f1"][:, c], freedom=max(lesions - 1, 1))
    if cell["value"] is None or not unmoved(found["f1"][:, c]):
        return cell
    recall = exact_interval(found["recall"][0, c], lesions)
    precision = exact_interval(found["precision"][0, c], called) if called else (0.0, 1.0)
    low, high = (float(2 * p * r / (p + r)) if r > 0 and p > 0 else 0.0 for p, r in zip(precision, recall, strict=True))
    return cell | {"low": low, "high": high}


def mean_freedom(recalls: Floats, bootstrap: LesionBootstrap) -> float:
    """Degrees of freedom of a mean of recalls or of differences of recalls, (R + 1, C): few where 15 lesions rule it.

    Lesions of each class are drawn on their own, so the variances add up; NaN columns are absent classes.
    """
    lesions = np.bincount(bootstrap.lesion_label, minlength=recalls.shape[1])
    here = np.isfinite(recalls[0])
    if len(recalls) < 3:
        return np.inf
    variances = np.asarray(recalls[1:, here].var(axis=0, ddof=1), np.float64)
    return pooled_freedom(variances, np.asarray(lesions[here], np.float64) - 1.0)
