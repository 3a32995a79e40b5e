"""Learning curves `y = a − b·n^−c`: fitted, with intervals, and with reasons where the data cannot show them.

    curve = fit_curve(n_train, balanced_accuracy)
    curve.c                    # {"value": 0.42, "low": 0.31, "high": 0.55}
    curve.band()               # [{"n": 4000, "value": 0.61, "low": 0.60, "high": 0.62}, …]
    hold_out_largest(n_train, balanced_accuracy)["inside"]

    learning_curves(table, "balanced_accuracy")   # of every model of a table of runs, as a dict for JSON

The intervals say how much seeds and training subsets move the result on the test set as it is. They take the runs as
independent. Runs of one subset seed share training images, so a spread shared by all sizes is not in the intervals.

A table of runs has one row a run: `model`, `fraction`, `n_train`, `seed`, `subset_seed`, and each metric with its
interval as `<metric>`, `<metric>_low`, `<metric>_high` (`run_metrics.flatten`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shards.common.errors import DataError
from train.study.numbers import p_value
from train.study.powerlaw import C_MAX, C_MIN, CEILING, PowerLawFit, size_groups

if TYPE_CHECKING:
    import pandas as pd

EXTRAPOLATION = 2.0
ROUNDING = 1.05
"""Lesions stay whole, so half of a training set is half of its images only to within a few percent."""

MIN_SIZES = 4

Floats = NDArray[np.float64]
Estimate = dict[str, float | None]


@dataclass
class LearningCurve:
    """A fitted curve. Estimates are {"value", "low", "high"}, 95 %; an open end is None.

    a: the score with endless data, b and c: how far below it the curve starts and how fast it rises. identifiable:
    False where the data do not bound them; `reasons` says why. Values between the measured sizes are valid even then
    if the form fits (`lack_of_fit_p`).
    noise_sd: standard deviation of a run at the largest size; noise_power: its variance falls as n^−noise_power.
    lack_of_fit_p: small where the means of the sizes are farther from the curve than their runs are from each other.
    """

    a: Estimate
    b: Estimate
    c: Estimate
    identifiable: bool
    reasons: list[str]
    runs: int
    sizes: int
    n_min: float
    n_max: float
    noise_sd: float | None
    noise_power: float | None
    lack_of_fit_p: float | None
    fit: PowerLawFit | None = field(repr=False, default=None)

    def band(self, *, beyond: bool = True) -> list[dict[str, float]]:
        """The curve and its 95 % interval, {"n", "value", "low", "high"}, at 40 sizes evenly spaced in log n, from the
        smallest to twice the largest, or to the largest where not beyond the data. Empty without a fit."""
        if self.fit is None:
            return []
        end = self.n_max * (EXTRAPOLATION if beyond else 1.0)
        sizes = np.geomspace(self.n_min, end, 40).tolist()
        return [dict(zip(("n", "value", "low", "high"), (n, *self.fit.value_at(n)), strict=True)) for n in sizes]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the fit itself, for JSON."""
        return {key: value for key, value in vars(self).items() if key != "fit"}


def _checked(n_train: Any, scores: Any) -> tuple[Floats, Floats]:
    """Sizes and scores as (m,) float64. Raises DataError for wrong ones."""
    n, y = np.asarray(n_train, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if n.ndim != 1 or n.shape != y.shape or n.size == 0:
        raise DataError(f"{n.size} sizes and {y.size} scores: a learning curve needs one score for each run's size")
    if not (np.isfinite(n).all() and (n > 0).all() and np.isfinite(y).all()):
        raise DataError("a learning curve needs positive sizes and finite scores: leave out runs without a result")
    return n, y


def fit_curve(
    n_train: Sequence[float] | NDArray[Any],
    scores: Sequence[float] | NDArray[Any],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> LearningCurve:
    """Fit `score = a − b·n^−c`, a ≤ 1, b ≥ 0, C_MIN ≤ c ≤ C_MAX, to one score a run.

    n_train: (m,) training images; scores: (m,). Runs weigh by the inverse of a noise variance that falls as a power of
    n, estimated from the runs of each size. The point is the one of scipy's `curve_fit`. Intervals are profiles
    (`powerlaw.py`) whose limit is calibrated on `resamples` sets of runs drawn from the fitted curve.

    Coverage on simulated results of known curves, seven sizes of three runs, 2,000 repeats of each of three curves: the
    95 % intervals of a, b, c, of the curve from the smallest to twice the largest size, and of the held-out mean hold
    the truth in 93.9 to 95.4 %. With four sizes they do in 93.2 to 96.0 %, but such a curve is identifiable in only one
    case of eight (`python -m tests.support.simulate_coverage --only curves`).

    Not identifiable (a, b, c then have open ends, None): fewer than MIN_SIZES sizes, equal scores, an interval of c
    that reaches the end of its range, or one of a that reaches the highest possible score, 1. Raises DataError for
    unusable numbers.
    """
    n, y = _checked(n_train, scores)
    groups = size_groups(n)
    sizes = int(groups.max()) + 1
    common: dict[str, Any] = {
        "runs": int(n.size),
        "sizes": sizes,
        "n_min": float(n[groups == 0].mean()),
        "n_max": float(n[groups == sizes - 1].mean()),
    }
    reasons: list[str] = []
    if sizes < MIN_SIZES:
        reasons.append(f"{sizes} sizes, and three parameters need at least {MIN_SIZES}")
    elif np.ptp(y) < 1e-9:
        reasons.append("every run has the same score")
    if reasons:
        nothing: Estimate = {"value": None, "low": None, "high": None}
        return LearningCurve(
            **common, a=nothing, b=nothing, c=nothing, identifiable=False, reasons=reasons,
            noise_sd=None, noise_power=None, lack_of_fit_p=None,
        )  # fmt: skip
    fit = PowerLawFit(n, y, resamples=resamples, seed=seed)
    none = np.zeros_like(fit.grid)
    c_low, c_high = fit.exponent_interval()
    a_low, a_high = fit.interval(1.0, none, fit.a)
    scale = float(n.max()) ** fit.c
    b_low, b_high = fit.interval(0.0, -(n.max() ** fit.grid), fit.b * scale)
    if c_low <= C_MIN:
        reasons.append(
            f"c may be {C_MIN} or less: within these sizes the rise looks logarithmic, without an upper limit"
        )
    if c_high >= C_MAX:
        reasons.append(f"c may be {C_MAX} or more: only the smallest size shows a rise")
    if a_high >= CEILING:
        reasons.append(f"a may be the highest possible score, {CEILING:g}")
    if b_low <= 0:
        reasons.append("b may be 0: the score may not depend on the number of training images at all")
    return LearningCurve(
        **common,
        a={"value": fit.a, "low": a_low if c_low > C_MIN else None, "high": a_high if a_high < CEILING else None},
        b={
            "value": fit.b * scale,
            "low": max(b_low, 0.0),
            "high": b_high if c_low > C_MIN and c_high < C_MAX else None,
        },
        c={"value": fit.c, "low": c_low if c_low > C_MIN else None, "high": c_high if c_high < C_MAX else None},
        identifiable=not reasons,
        reasons=reasons,
        noise_sd=fit.sd / math.sqrt(float(fit.weights[groups == sizes - 1].mean())),
        noise_power=fit.power,
        lack_of_fit_p=fit.lack_of_fit(y),
        fit=fit,
    )


def hold_out_largest(
    n_train: Sequence[float] | NDArray[Any],
    scores: Sequence[float] | NDArray[Any],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit without the largest size, predict the mean of its runs, and compare it with the observed mean.

    Returns {"n", "runs", "observed", "predicted", "low", "high", "inside", "reason"}; low to high holds the mean of so
    many runs in 95 % of cases if the curve is right. Without a prediction the four before `reason` are None.
    """
    n, y = _checked(n_train, scores)
    groups = size_groups(n)
    last = groups == groups.max()
    measured = {"n": float(n[last].mean()), "runs": int(last.sum()), "observed": float(y[last].mean())}
    refused = {"predicted": None, "low": None, "high": None, "inside": None}
    if not (~last).any():
        return measured | refused | {"reason": "one size only"}
    curve = fit_curve(n[~last], y[~last], resamples=resamples, seed=seed)
    if curve.fit is None:
        return measured | refused | {"reason": "without the largest size: " + "; ".join(curve.reasons)}
    if measured["n"] > curve.n_max * EXTRAPOLATION * ROUNDING:
        far = f"{measured['n']:.0f} training images are more than {EXTRAPOLATION:.0f}× the next size, {curve.n_max:.0f}"
        return measured | refused | {"reason": f"{far}: a fitted curve is not valid there; train at more sizes"}
    value, low, high = curve.fit.new_mean_at(measured["n"], measured["runs"])
    return measured | {
        "predicted": value,
        "low": low,
        "high": high,
        "inside": bool(low <= measured["observed"] <= high),
        "reason": None,
    }


def learning_curve(runs: "pd.DataFrame", metric: str, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The learning curve of one model's runs as a dict for JSON. Raises DataError where no run has the metric.

    Keys: `curve` (LearningCurve.to_dict), `hold_out` (hold_out_largest), `doubts` (reasons not to read the curve beyond
    the data; empty where there is none), `band` ([{"n", "value", "low", "high", "low_patients", "high_patients"}], to
    twice the largest size, or to the largest where there are doubts; empty where no curve is fitted), `points`
    ([{"n", "value", "seed"}], every run), `notes`.

    Where sizes have several runs of one subset seed, which share their training images, the curve is fitted to the
    means of those. low to high is for the test lesions as they are. The `_patients` ends add the sampling of the
    lesions, from the runs' own intervals, because all runs share one test set and err together. They are None where no
    run has an interval.
    """
    rows = runs.dropna(subset=[metric, "n_train"])
    if not len(rows):
        raise DataError(f"no run has a {metric}: a learning curve needs finished runs")
    means, averaged = _of_subsets(rows, metric)
    n, y = means["n_train"].to_numpy(dtype=np.float64), means[metric].to_numpy(dtype=np.float64)
    curve = fit_curve(n, y, resamples=resamples, seed=seed)
    check = hold_out_largest(n, y, resamples=resamples, seed=seed)
    doubts = _doubts(curve, check)
    band: list[dict[str, Any]] = [dict(point) for point in curve.band(beyond=not doubts)]
    error = _test_error(rows, metric)
    for point in band:
        ends: tuple[float | None, float | None] = (None, None)
        if error is not None:
            shared = 1.96 * float(np.interp(np.log(point["n"]), *error))
            ends = (
                max(point["value"] - float(np.hypot(point["value"] - point["low"], shared)), 0.0),
                min(point["value"] + float(np.hypot(point["high"] - point["value"], shared)), 1.0),
            )
        point["low_patients"], point["high_patients"] = ends
    points = zip(rows["n_train"].tolist(), rows[metric].tolist(), rows["seed"].tolist(), strict=True)
    return {
        "curve": curve.to_dict(),
        "hold_out": check,
        "doubts": doubts,
        "band": band,
        "points": [{"n": float(size), "value": float(value), "seed": number} for size, value, number in points],
        "notes": [*curve.reasons, *averaged, *_shared_subsets(means, curve, n, y)],
    }


def _of_subsets(rows: "pd.DataFrame", metric: str) -> tuple["pd.DataFrame", list[str]]:
    """The runs, or their means by size and subset seed where a size has several runs of one, and a note on that.

    With crossed seeds nine runs of a size share three subsets. Counted as nine independent runs they would make the
    intervals narrower than three subsets allow.
    """
    sized = rows.assign(size=size_groups(rows["n_train"].to_numpy(dtype=np.float64)))
    means = sized.groupby(["size", "subset_seed"], sort=False).agg({"n_train": "mean", metric: "mean"}).reset_index()
    if len(means) == len(rows):
        return rows, []
    return means, [
        f"runs of one size that share a subset seed are averaged before the fit ({len(rows)} runs, {len(means)} means)"
    ]


def _doubts(curve: LearningCurve, check: dict[str, Any]) -> list[str]:
    """Reasons not to trust a curve beyond the largest measured size; none where no curve is fitted."""
    if curve.fit is None:
        return []
    doubts = []
    if check["inside"] is False:
        doubts.append("fitted without the largest size, the curve does not predict that size")
    p = curve.lack_of_fit_p
    if p is not None and p < 0.05:
        doubts.append(f"the means of the sizes are farther from the curve than chance explains (p {p_value(p)})")
    _, low, high = curve.fit.value_at(curve.n_max)
    if not low <= check["observed"] <= high:
        doubts.append("the measured mean of the largest size is outside its 95 % interval there")
    return doubts


def _test_error(rows: "pd.DataFrame", metric: str) -> tuple[Floats, Floats] | None:
    """Rising log sizes and the standard errors of the test set there, from the widths of the runs' intervals."""
    known = rows.dropna(subset=[f"{metric}_low", f"{metric}_high"])
    if not len(known):
        return None
    width = (known[f"{metric}_high"] - known[f"{metric}_low"]).to_numpy(dtype=np.float64) / (2 * 1.96)
    logs = np.log(known["n_train"].to_numpy(dtype=np.float64))
    places, group = np.unique(logs, return_inverse=True)
    return places, np.bincount(group, width) / np.bincount(group)


def _shared_subsets(rows: "pd.DataFrame", curve: LearningCurve, n: Floats, y: Floats) -> list[str]:
    """A note where runs of one subset seed deviate from the curve together, which the intervals do not include."""
    from scipy.stats import f_oneway

    if curve.fit is None:
        return []
    subset = rows["subset_seed"].to_numpy()
    away = y - np.array([curve.fit.value_at(float(size))[0] for size in n])
    groups = [away[subset == s] for s in np.unique(subset)]
    groups = [group for group in groups if group.size >= 2]
    if len(groups) < 2 or np.ptp(away) < 1e-12:
        return []
    p = float(f_oneway(*groups).pvalue)
    if p >= 0.05:
        return []
    return [f"runs of one subset seed deviate from the curve together (p {p_value(p)}): the intervals are too narrow"]


def learning_curves(table: "pd.DataFrame", metric: str, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """`learning_curve` of every model of a table of runs, by the model's name."""
    return {
        str(name): learning_curve(rows, metric, resamples=resamples, seed=seed)
        for name, rows in table.groupby("model", sort=True)
    }
