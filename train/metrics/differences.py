"""Runs compared: paired differences on the same test lesions.

Predictions are what a run saves of each image: predictions.parquet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shards.common.errors import DataError
from shards.format import CLASSES
from train.metrics.bootstrap import CONFIDENCE, LesionBootstrap, pooled_freedom, refuse_unfit, two_sided_p
from train.metrics.estimates import estimate, mean_freedom, number
from train.metrics.scores import Scores
from train.metrics.summary import prepare, replicate

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


def model_difference(
    first: Sequence[Tested],
    second: Sequence[Tested],
    *,
    metrics: Sequence[str] = COMPARED,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Mean of first − second over runs paired by seed, for each metric: {"first", "second", "difference": {"value",
    "low", "high"}, "p", "runs", "includes_seeds", "note"}; the note is empty where there is nothing to say.

    first, second: runs of the same seeds in the same order, all on one test set. Both sides are measured on the same
    resamples of lesions, so what the test set makes hard for both cancels out. The variance of the mean is that over
    resampled lesions plus that between the pairs over their number; the interval and p are Student's t with Welch and
    Satterthwaite's degrees of freedom. p is two-sided, and below 0.05 where the 95 % interval leaves out 0.

    Two single runs are `model_difference([one], [other])`: includes_seeds is then False, for interval and p speak of
    these two trained networks, and other seeds would give other ones. Raises DataError unless the runs come in pairs
    and were tested on the same images.
    """
    if len(first) != len(second) or not first:
        raise DataError(f"{len(first)} and {len(second)} runs: a difference between models needs pairs of equal seeds")
    sides = {"first": dict(enumerate(first)), "second": dict(enumerate(second))}
    return model_differences(sides, metrics=metrics, resamples=resamples, seed=seed)[0]["metrics"]


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
        by_seed, seed_freedom, note = between_pairs(gaps[:, 0], keys)
        whole = by_lesion + by_seed
        cell = {"value": number(mean), "low": None, "high": None}
        p = None
        if np.isfinite(whole) and np.isfinite(mean):
            freed = max(bootstrap.lesions - 1, 1)
            if name == "balanced_accuracy":
                recalls = [np.stack([run["recall"] for run in half]).mean(axis=0) for half in (first, second)]
                freed = mean_freedom(recalls[0] - recalls[1], bootstrap)
            freedom = pooled_freedom(np.array([by_lesion, by_seed]), np.array([freed, seed_freedom]))
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


def between_pairs(gaps: Floats, keys: Sequence[Any]) -> tuple[float, float, str]:
    """The variance of the mean of (pairs,) differences from their spread, its degrees of freedom, and a note.

    keys: of each pair. Where (seed, subset seed) are crossed, nine pairs may share three subsets and three seeds: their
    variance over nine would take what all runs of a subset share for chance that averages out. The means by subset seed
    are independent in what subsets do, those by seed in what seeds do, so the variances of both means add up. The sum
    holds what is left to each single pair twice, and errs on the wide side by that.
    """
    crossed: list[tuple[float, int, str]] = []
    if all(isinstance(key, tuple) and len(key) == 2 for key in keys):
        for place, what in ((1, "subset seeds"), (0, "seeds")):
            shared = np.array([key[place] for key in keys])
            means = np.array([gaps[shared == one].mean() for one in np.unique(shared)])
            if 1 < means.size < gaps.size:
                crossed.append((float(means.var(ddof=1)) / means.size, means.size - 1, f"{means.size} {what}"))
    if not crossed:
        return float(gaps.var(ddof=1)) / gaps.size, gaps.size - 1, ""
    parts, freedom, shared_by = zip(*crossed, strict=True)
    return (
        sum(parts),
        pooled_freedom(np.array(parts), np.array(freedom)),
        f"{gaps.size} pairs of runs share {' and '.join(shared_by)}, and the interval counts these, not the pairs",
    )


def _of_one_pair(
    one: dict[str, Floats], two: dict[str, Floats], bootstrap: LesionBootstrap, metrics: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The difference of two runs, from their replicates."""
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
