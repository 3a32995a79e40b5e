"""Runs compared: paired differences on the same test lesions, and the learning curve of each model.

A table of runs has one row a run: `model`, `fraction`, `n_train`, `seed`, `subset_seed`, and each metric with its
interval as `<metric>`, `<metric>_low`, `<metric>_high` (`metrics.flatten`). Predictions are what a run saves of each
image: predictions.parquet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.format import CLASSES
from train.bootstrap import CONFIDENCE, LesionBootstrap, pooled_freedom, refuse_unfit, two_sided_p
from train.curves import LearningCurve, fit_curve, hold_out_largest
from train.metrics import estimate, mean_freedom, number, prepare, replicate
from train.scores import Scores

if TYPE_CHECKING:
    import pandas as pd

COMPARED = ("balanced_accuracy", "accuracy", "macro_auc", "macro_f1", "malignant_auc")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tested:
    """One run's answers on the test split, by rising image id."""

    image_id: NDArray[Any]
    lesion_id: NDArray[Any] | None
    scores: Scores


def tested(
    table: "pd.DataFrame",
    *,
    prior: str,
    logits_prior: str,
    training_prior: Any,
    split: str = "test",
    classes: Sequence[str] = CLASSES,
) -> Tested:
    """A run's predictions made ready: columns image_id, lesion_id, split, label and logit_<class>.

    Rows of other splits are left out. Priors as in `metrics.evaluate`.
    Raises DataError for a missing column, no row of the split, an image that comes twice (padding), or split `train`.
    """
    columns = [f"logit_{name}" for name in classes]
    missing = [name for name in ("image_id", "lesion_id", "split", "label", *columns) if name not in table]
    if missing:
        raise DataError(f"predictions have no column {', '.join(missing)}")
    rows = table.loc[table["split"] == split].sort_values(by="image_id")
    refuse_unfit(rows["split"].to_numpy(dtype=object), image_id=rows["image_id"].to_numpy(dtype=object), wanted=split)
    lesions = rows["lesion_id"].to_numpy(dtype=object)
    return Tested(
        image_id=rows["image_id"].to_numpy(dtype=object).astype(str),
        lesion_id=None if bool(np.all(rows["lesion_id"].isna())) else lesions,
        scores=prepare(
            rows[columns].to_numpy(dtype=np.float64),
            rows["label"].to_numpy(dtype=np.int64),
            prior=prior,
            logits_prior=logits_prior,
            training_prior=training_prior,
            classes=classes,
        ),
    )


def _same_test(runs: Sequence[Tested]) -> None:
    """Raise DataError unless all runs were tested on the same images with the same labels and lesions."""
    first = runs[0]
    for other in runs[1:]:
        if not np.array_equal(first.image_id, other.image_id):
            mine, theirs = set(first.image_id.tolist()), set(other.image_id.tolist())
            raise DataError(
                f"the runs were tested on different images ({len(mine - theirs)} only in one, {len(theirs - mine)} "
                "only in the other): differences are paired, so train both on the same shard set"
            )
        if not np.array_equal(first.scores.labels, other.scores.labels):
            raise DataError("the runs disagree on the label of a test image: they come from different shard sets")
        one, two = first.lesion_id, other.lesion_id
        if (one is None) != (two is None) or (one is not None and one.astype(str).tolist() != two.astype(str).tolist()):  # pyright: ignore
            raise DataError("the runs disagree on the lesion of a test image: they come from different shard sets")


def paired_difference(
    first: Tested, second: Tested, *, metrics: Sequence[str] = COMPARED, resamples: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """first − second for each metric: {"first", "second", "difference": {"value", "low", "high"}, "p"}.

    Both runs are measured on the same resamples of lesions, so what the test set makes hard for both cancels out. p is
    two-sided, and below 0.05 where the 95 % interval leaves out 0. Both speak of these two trained networks: other
    seeds would give other ones (`model_difference`). Raises DataError unless the test images are the same.
    """
    _same_test([first, second])
    bootstrap = LesionBootstrap(first.scores.labels, first.lesion_id, resamples=resamples, seed=seed)
    one, two = replicate([first.scores, second.scores], bootstrap)
    return _of_one_pair(one, two, bootstrap, metrics)


def _of_one_pair(
    one: dict[str, Floats], two: dict[str, Floats], bootstrap: LesionBootstrap, metrics: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """`paired_difference` from the replicates of two runs."""
    told = {}
    for name in metrics:
        gap = one[name] - two[name]
        freed = mean_freedom(one["recall"] - two["recall"], bootstrap) if name == "balanced_accuracy" else np.inf
        told[name] = {
            "first": number(float(one[name][0])),
            "second": number(float(two[name][0])),
            "difference": estimate(gap, kind="t", freedom=freed, limits=(-1.0, 1.0)),
            "p": number(two_sided_p(gap[1:], float(gap[0]), freedom=freed)) if np.isfinite(gap[0]) else None,
        }
    return told


def model_difference(
    first: Sequence[Tested],
    second: Sequence[Tested],
    *,
    metrics: Sequence[str] = COMPARED,
    resamples: int = 1000,
    seed: int = 0,
    keys: Sequence[Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Mean difference of two models over runs paired by seed: as `paired_difference`, with "runs", "includes_seeds" and
    "note", which is empty where there is nothing to say.

    first, second: runs of the same seeds in the same order, all on one test set. The variance of the mean is that over
    resampled lesions plus that between the pairs over their number; the interval and p are Student's t with Welch and
    Satterthwaite's degrees of freedom. One pair: `paired_difference`, and includes_seeds is False. keys: (seed, subset
    seed) of each pair; pairs that share one of them are not independent and count as fewer. None: all are independent.
    """
    if len(first) != len(second) or not first:
        raise DataError(f"{len(first)} and {len(second)} runs: a difference between models needs pairs of equal seeds")
    if keys is not None and len(keys) != len(first):
        raise DataError(f"{len(keys)} keys for {len(first)} pairs of runs: a difference between models needs one each")
    _same_test([*first, *second])
    bootstrap = LesionBootstrap(first[0].scores.labels, first[0].lesion_id, resamples=resamples, seed=seed)
    found = replicate([run.scores for run in (*first, *second)], bootstrap)
    return _of_pairs(found[: len(first)], found[len(first) :], bootstrap, metrics, keys or range(len(first)))


def _of_pairs(
    first: Sequence[dict[str, Floats]],
    second: Sequence[dict[str, Floats]],
    bootstrap: LesionBootstrap,
    metrics: Sequence[str],
    keys: Sequence[Any],
) -> dict[str, dict[str, Any]]:
    """`model_difference` from the replicates of the runs."""
    from scipy.stats import t

    pairs = len(first)
    if pairs == 1:
        alone = _of_one_pair(first[0], second[0], bootstrap, metrics)
        return {name: cell | {"runs": 1, "includes_seeds": False, "note": ""} for name, cell in alone.items()}
    told: dict[str, dict[str, Any]] = {}
    for name in metrics:
        ones, twos = (np.stack([run[name] for run in half]) for half in (first, second))
        gaps = ones - twos  # (pairs, R + 1)
        mean = float(gaps[:, 0].mean())
        by_lesion = float(np.nanvar(gaps[:, 1:].mean(axis=0), ddof=1))
        by_seed, independent, note = _between_pairs(gaps[:, 0], keys)
        whole = by_lesion + by_seed
        cell = {"value": number(mean), "low": None, "high": None}
        p = None
        if np.isfinite(whole) and np.isfinite(mean):
            freed = max(bootstrap.lesions - 1, 1)
            if name == "balanced_accuracy":
                recalls = [np.stack([run["recall"] for run in half]).mean(axis=0) for half in (first, second)]
                freed = mean_freedom(recalls[0] - recalls[1], bootstrap)
            freedom = pooled_freedom(np.array([by_lesion, by_seed]), np.array([freed, independent - 1]))
            reach = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * np.sqrt(whole)
            cell |= {"low": number(max(mean - reach, -1.0)), "high": number(min(mean + reach, 1.0))}
            p = number(float(2 * t.sf(abs(mean) / np.sqrt(whole), freedom))) if whole > 0 else float(mean == 0)
        told[name] = {
            "first": number(float(ones[:, 0].mean())),
            "second": number(float(twos[:, 0].mean())),
            "difference": cell,
            "p": p,
            "runs": pairs,
            "includes_seeds": True,
            "note": note,
        }
    return told


def _between_pairs(gaps: Floats, keys: Sequence[Any]) -> tuple[float, int, str]:
    """The variance of the mean of (pairs,) differences from their spread, from how many independent ones it is, a note.

    keys: of each pair. Where (seed, subset seed) are crossed, nine pairs may share three subsets: their variance over
    nine would take what all runs of a subset share for chance that averages out. The means by subset seed, or by seed,
    are independent in what they do not share; the larger of both variances is taken, as neither part is known.
    """
    ways = [(float(gaps.var(ddof=1)) / gaps.size, gaps.size, "")]
    if all(isinstance(key, tuple) and len(key) == 2 for key in keys):
        crossed = []
        for place, what in ((1, "subset seeds"), (0, "seeds")):
            shared = np.array([key[place] for key in keys])
            groups = [gaps[shared == one] for one in np.unique(shared)]
            if len(groups) > 1:  # one group has no spread: what all runs share is then no part of the difference
                variance = float(np.var([group.mean() for group in groups], ddof=1)) / len(groups)
                note = (
                    f"{gaps.size} pairs of runs share {len(groups)} {what} and count as {len(groups)} independent ones"
                )
                crossed.append((variance, len(groups), note if len(groups) < gaps.size else ""))
        ways = crossed or ways
    return max(ways, key=lambda way: way[0])


def model_differences(
    runs: Mapping[str, Mapping[Any, Tested]],
    *,
    metrics: Sequence[str] = COMPARED,
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """`model_difference` for every two models that share a seed. Each run is measured once.

    runs: by model, then by (seed, subset seed), of which pairs may share one, or by anything else that pairs runs and
    is independent. Returns {"first", "second", "metrics"} for each two, in the order of `runs`. Raises DataError unless
    all were tested on the same images.
    """
    every = [run for by_seed in runs.values() for run in by_seed.values()]
    if not every:
        return []
    _same_test(every)
    bootstrap = LesionBootstrap(every[0].scores.labels, every[0].lesion_id, resamples=resamples, seed=seed)
    measured = iter(replicate([run.scores for run in every], bootstrap))
    found = {model: {key: next(measured) for key in by_seed} for model, by_seed in runs.items()}
    told = []
    for first, second in combinations(runs, 2):
        shared = [key for key in found[first] if key in found[second]]
        if shared:
            halves = [[found[model][key] for key in shared] for model in (first, second)]
            cells = _of_pairs(halves[0], halves[1], bootstrap, metrics, shared)
            told.append({"first": first, "second": second, "metrics": cells})
    return told


def learning_curve(runs: "pd.DataFrame", metric: str, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The learning curve of one model's runs as a dict for JSON.

    Keys: `curve` (LearningCurve.to_dict), `hold_out` (curves.hold_out_largest), `band` ([{"n", "value", "low", "high",
    "low_patients", "high_patients"}], empty where no curve is fitted), `points` ([{"n", "value", "seed"}]), `notes`.
    low to high is for the test lesions as they are; the `_patients` ends add their sampling, from the runs' own
    intervals, because all runs share one test set and err together; None where the table has no intervals.
    """
    rows = runs.dropna(subset=[metric, "n_train"])
    n, y = rows["n_train"].to_numpy(dtype=np.float64), rows[metric].to_numpy(dtype=np.float64)
    if n.size == 0:
        raise DataError(f"no run has a {metric}: a learning curve needs finished runs")
    curve = fit_curve(n, y, resamples=resamples, seed=seed)
    band: list[dict[str, Any]] = [dict(point) for point in curve.band()]
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
    seeds = rows["seed"].tolist() if "seed" in rows else [None] * n.size
    return {
        "metric": metric,
        "curve": curve.to_dict(),
        "hold_out": hold_out_largest(n, y, resamples=resamples, seed=seed),
        "band": band,
        "points": [{"n": float(a), "value": float(b), "seed": s} for a, b, s in zip(n, y, seeds, strict=True)],
        "notes": [*curve.reasons, *_other_shape(curve), *_shared_subsets(rows, curve, n, y)],
    }


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


def _other_shape(curve: LearningCurve) -> list[str]:
    """A note where the sizes' means lie farther from the curve than the spread of their runs explains."""
    p = curve.lack_of_fit_p
    if p is None or p >= 0.05:
        return []
    told = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return [
        f"the means of the sizes lie farther off the curve than chance explains ({told}): its form does not fit them"
    ]


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
