"""Paired differences between runs that were tested on the same lesions, from their predictions.parquet."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from shards.common.errors import DataError
from shards.format import Classes
from train.metrics.bootstrap import CONFIDENCE, Floats, LesionBootstrap, mean_freedom, number, pooled_freedom
from train.metrics.scores import Scores, check_test, replicate

if TYPE_CHECKING:
    import pandas as pd

Model = TypeVar("Model", bound=Hashable)

COMPARED = ("balanced_accuracy", "accuracy", "macro_auc", "macro_f1", "malignant_auc")
"""What is compared, where it is there: only a set that has malignant classes has their area."""


@dataclass(frozen=True)
class Tested:
    """One run's answers on the test split, by rising image id."""

    image_id: NDArray[Any]
    lesion_id: NDArray[Any] | None
    scores: Scores


def tested(table: "pd.DataFrame", *, classes: Classes, prior: str, logits_prior: str, training_prior: Any) -> Tested:
    """A run's answers from its predictions: columns image_id, lesion_id, split, label and logit_<class>.

    Rows of other splits are left out. classes, priors: as in `run_metrics.evaluate`.
    Raises DataError for a missing column, no row of the test split, or an image that comes twice (padding).
    """
    columns = [f"logit_{name}" for name in classes.names]
    missing = [name for name in ("image_id", "lesion_id", "split", "label", *columns) if name not in table]
    if missing:
        raise DataError(f"predictions have no column {', '.join(missing)}")
    rows = table.loc[table["split"] == "test"].sort_values(by="image_id")
    check_test(rows["split"].to_numpy(dtype=object), rows["image_id"].to_numpy(dtype=object))
    lesions = rows["lesion_id"].to_numpy(dtype=object)
    return Tested(
        image_id=rows["image_id"].to_numpy(dtype=object).astype(str),
        lesion_id=None if bool(np.all(rows["lesion_id"].isna())) else lesions,
        scores=Scores(
            rows[columns].to_numpy(dtype=np.float64),
            rows["label"].to_numpy(dtype=np.int64),
            classes=classes,
            prior=prior,
            logits_prior=logits_prior,
            training_prior=training_prior,
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

    Two single runs are `model_difference([one], [other])`. includes_seeds is then False: interval and p are valid for
    these two trained networks, and other seeds would give other networks. Raises DataError unless the runs come in
    pairs and were tested on the same images.
    """
    if len(first) != len(second) or not first:
        raise DataError(f"{len(first)} and {len(second)} runs: a difference between models needs pairs of equal seeds")
    sides = {"first": dict(enumerate(first)), "second": dict(enumerate(second))}
    return model_differences(sides, metrics=metrics, resamples=resamples, seed=seed)[0]["metrics"]


def model_differences(
    runs: Mapping[Model, Mapping[Any, Tested]],
    *,
    pairs: Iterable[tuple[Model, Model]] | None = None,
    metrics: Sequence[str] = COMPARED,
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """`model_difference` for pairs of models that share a seed. Each run is measured once.

    runs: by model, then by (seed, subset seed), where pairs may share one of the two, or by any other key that pairs
    runs and is independent. pairs: which models to compare, all by default. Returns {"first", "second", "metrics"} for
    each two, in the order of `pairs` or `runs`. Raises DataError unless all were tested on the same images.
    """
    every = [run for by_seed in runs.values() for run in by_seed.values()]
    if not every:
        return []
    _same_test(every)
    bootstrap = LesionBootstrap(every[0].scores.labels, every[0].lesion_id, resamples=resamples, seed=seed)
    measured = iter(replicate([run.scores for run in every], bootstrap))
    found = {model: {key: next(measured) for key in by_seed} for model, by_seed in runs.items()}
    differences = []
    for first, second in combinations(runs, 2) if pairs is None else pairs:
        shared = [key for key in found[first] if key in found[second]]
        if shared:
            halves = [[found[model][key] for key in shared] for model in (first, second)]
            cells = _of_pairs(halves[0], halves[1], bootstrap, metrics, shared)
            differences.append({"first": first, "second": second, "metrics": cells})
    return differences


def _of_pairs(
    first: Sequence[dict[str, Floats]],
    second: Sequence[dict[str, Floats]],
    bootstrap: LesionBootstrap,
    metrics: Sequence[str],
    keys: Sequence[Any],
) -> dict[str, dict[str, Any]]:
    """`model_difference` from the replicates of the runs."""
    pairs = len(first)
    cells: dict[str, dict[str, Any]] = {}
    for name in metrics:
        if not all(name in run for run in (*first, *second)):
            continue
        ones, twos = (np.stack([run[name] for run in half]) for half in (first, second))
        gaps = ones - twos  # (pairs, R + 1)
        mean, low, high, p, note = float(gaps[:, 0].mean()), np.nan, np.nan, None, ""
        if np.isfinite(mean):
            by_lesion = float(np.nanvar(gaps[:, 1:].mean(axis=0), ddof=1))
            by_seed, seed_freedom, note = between_pairs(gaps[:, 0], keys)
            freedom = float(max(bootstrap.lesions - 1, 1)) if pairs > 1 else np.inf
            if name == "balanced_accuracy":
                recalls = [np.stack([run["recall"] for run in half]).mean(axis=0) for half in (first, second)]
                freedom = mean_freedom(recalls[0] - recalls[1], bootstrap)
            freedom = pooled_freedom(np.array([by_lesion, by_seed]), np.array([freedom, seed_freedom]))
            low, high, p = student(mean, by_lesion + by_seed, freedom)
        cells[name] = {
            "first": number(float(ones[:, 0].mean())),
            "second": number(float(twos[:, 0].mean())),
            "difference": {"value": number(mean), "low": number(max(low, -1.0)), "high": number(min(high, 1.0))},
            "p": p,
            "runs": pairs,
            "includes_seeds": pairs > 1,
            "note": note,
        }
    return cells


def student(value: float, variance: float, freedom: float) -> tuple[float, float, float | None]:
    """Low and high end of the 95 % interval of a difference by Student's t, and the two-sided p that it is 0.

    variance: of the difference; freedom: its degrees of freedom. p is below 0.05 exactly where the interval leaves out
    0. It is None for a difference that is not 0 and has no variance. Differences are close to symmetric, and in rare
    classes they depend on so few images that quantiles of replicates would be less certain than their variance.
    """
    from scipy.stats import t

    error = math.sqrt(variance)
    if error < 1e-12:
        return value, value, 1.0 if abs(value) < 1e-12 else None
    reach = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return value - reach, value + reach, 2 * float(t.sf(abs(value) / error, freedom))


def between_pairs(gaps: Floats, keys: Sequence[Any]) -> tuple[float, float, str]:
    """The variance of the mean of (pairs,) differences from their spread, its degrees of freedom, and a note.

    keys: of each pair. One pair has no spread: 0. Where (seed, subset seed) are crossed, nine pairs may share three
    subsets and three seeds. Their variance over nine would count what all runs of a subset share as chance that
    averages out. The means by subset seed are independent in what subsets do, those by seed in what seeds do, so the
    variances of both means add up. The sum counts what is left to each single pair twice, which makes the interval
    somewhat too wide.
    """
    if gaps.size == 1:
        return 0.0, np.inf, ""
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
