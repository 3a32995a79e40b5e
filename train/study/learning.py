"""The learning curve of each model from a table of runs, and whether it may be read beyond the data.

A table of runs has one row a run: `model`, `fraction`, `n_train`, `seed`, `subset_seed`, and each metric with its
interval as `<metric>`, `<metric>_low`, `<metric>_high` (`metrics.flatten`).
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shards.common.errors import DataError
from train.study.curves import LearningCurve, fit_curve, hold_out_largest
from train.study.profile import size_groups

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]


def learning_curve(runs: "pd.DataFrame", metric: str, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The learning curve of one model's runs as a dict for JSON.

    Keys: `curve` (LearningCurve.to_dict), `hold_out` (curves.hold_out_largest), `doubts` (reasons not to read the curve
    beyond the data; empty where there is none), `band` ([{"n", "value", "low", "high", "low_patients",
    "high_patients"}], to twice the largest size, with doubts to the largest; empty where no curve is fitted), `points`
    ([{"n", "value", "seed"}], every run), `notes`.

    Where sizes have several runs of one subset seed, which share their training images, the curve is fitted to the
    means of those. low to high is for the test lesions as they are; the `_patients` ends add their sampling, from the
    runs' own intervals, because all runs share one test set and err together; None where the table has no intervals.
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
    seeds = rows["seed"].tolist() if "seed" in rows else [None] * len(rows)
    points = zip(rows["n_train"].tolist(), rows[metric].tolist(), seeds, strict=True)
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

    With crossed seeds nine runs of a size share three subsets: taken for nine independent ones they would make the
    curve surer than three subsets can.
    """
    if "subset_seed" not in rows:
        return rows, []
    sized = rows.assign(size=size_groups(rows["n_train"].to_numpy(dtype=np.float64)))
    means = sized.groupby(["size", "subset_seed"], sort=False).agg({"n_train": "mean", metric: "mean"}).reset_index()
    if len(means) == len(rows):
        return rows, []
    return means, [
        f"runs of one size that share a subset seed are averaged before the fit ({len(rows)} runs, {len(means)} means)"
    ]


def _doubts(curve: LearningCurve, check: dict[str, Any]) -> list[str]:
    """Reasons not to believe a curve beyond the largest measured size; none where no curve is fitted."""
    if curve.fit is None:
        return []
    doubts = []
    if check["inside"] is False:
        doubts.append("fitted without the largest size, it does not foretell that")
    p = curve.lack_of_fit_p
    if p is not None and p < 0.05:
        told = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
        doubts.append(f"the means of the sizes lie farther off it than chance explains ({told})")
    _, low, high = curve.fit.value_at(curve.n_max)
    if not low <= check["observed"] <= high:
        doubts.append("the measured mean of the largest size lies outside of its 95 % interval there")
    return doubts


def _test_error(rows: "pd.DataFrame", metric: str) -> tuple[Floats, Floats] | None:
    """Rising log sizes and the standard errors of the test set there, from the widths of the runs' intervals."""
    if f"{metric}_low" not in rows or f"{metric}_high" not in rows:
        return None
    known = rows.dropna(subset=[f"{metric}_low", f"{metric}_high"])
    if not len(known):
        return None
    width = (known[f"{metric}_high"] - known[f"{metric}_low"]).to_numpy(dtype=np.float64) / (2 * 1.96)
    logs = np.log(known["n_train"].to_numpy(dtype=np.float64))
    places = np.unique(logs)
    return places, np.array([width[logs == place].mean() for place in places])


def _shared_subsets(rows: "pd.DataFrame", curve: LearningCurve, n: Floats, y: Floats) -> list[str]:
    """A note where runs of one subset seed lie off the curve together, which the intervals do not know of."""
    from scipy.stats import f_oneway

    if curve.fit is None or "subset_seed" not in rows:
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
    return [f"runs of one subset seed lie off the curve together (p = {p:.3f}): the intervals are too narrow"]


def learning_curves(table: "pd.DataFrame", metric: str, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """`learning_curve` of every model of a table of runs, by the model's name."""
    return {
        str(name): learning_curve(rows, metric, resamples=resamples, seed=seed)
        for name, rows in table.groupby("model", sort=True)
    }
