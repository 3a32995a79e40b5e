"""Scores of a classifier: scikit-learn's on the test set itself, and own code for many resamples of it at once.

A resample is a weighting of the images, and scikit-learn's metrics take one weighting a call. For 2,000 images and
1,000 resamples, `Scores.measure` took 0.24 s on one core and 1,000 calls of `Scores.values` took 40 s, which is 160
times as long. tests/train/metrics/test_run_metrics.py compares both, their numbers and their times.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.common.errors import DataError
from shards.format import Classes
from train.metrics.bootstrap import Floats, Ints, LesionBootstrap, members, ratio
from train.metrics.calibration import ConfidenceBins, at_prior, class_prior, prior_weights, softmax

SPECIFICITY = 0.90
MOST_CONFUSED = 50
"""Classes whose confusion matrix is resampled: for 1,000 classes and 1,000 resamples it would take 8 GB."""
_FEW = 16
"""Positives up to which `Ranking.area` sums for each alone: for two of 1,200 images that takes a tenth of the time."""
SENSITIVITY = 0.80
"""From which on the partial area counts, as in the challenge ISIC 2024."""
SET_SCALARS = (
    "auc",
    "sensitivity",
    "specificity",
    "sensitivity_at_90_specificity",
    "average_precision",
    "partial_auc_above_80_sensitivity",
)
"""What is measured of each set of interest, or of the last of two classes, against the other classes. An image is
called a member of the set if its classes together have a probability of at least 0.5. The partial area is 0 to 0.2."""


def check_test(split: Sequence[str] | NDArray[Any], image_id: Sequence[str] | NDArray[Any] | None = None) -> None:
    """Raise DataError unless there are samples, all of them are of the test split, and each is counted once.

    split: (N,) names of splits. image_id: (N,) ids; one that comes twice is a padded sample or a double count.
    """
    names = np.asarray(split, dtype=object)
    if names.size == 0:
        raise DataError("no sample to compute statistics on: the 'test' split is empty")
    foreign = np.flatnonzero(names != "test")
    if foreign.size:
        where = f"first at row {foreign[0]}" if image_id is None else f"first {np.asarray(image_id)[foreign[0]]}"
        raise DataError(
            f"{foreign.size} of {names.size} samples are not of the 'test' split ('{names[foreign[0]]}', {where}): "
            "statistics are computed on images that the model has not seen"
        )
    if image_id is not None:
        ids, counts = np.unique(np.asarray(image_id).astype(str), return_counts=True)
        if counts.sum() != names.size:
            raise DataError(f"{counts.sum()} image ids for {names.size} samples")
        if (counts > 1).any():
            twice = ids[counts > 1]
            raise DataError(f"{twice.size} images come more than once, first {twice[0]}: each may be counted only once")


def checked(logits: Any, labels: Any, classes: int) -> tuple[Floats, Ints]:
    """(N, C) float64 logits, (N,) int64 labels. Raises DataError for wrong shapes, no rows, NaN or unknown labels."""
    scores, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if truth.ndim != 1 or truth.size == 0:
        raise DataError(f"labels have shape {truth.shape}: one is needed for each of at least one sample")
    if scores.shape != (truth.size, classes):
        raise DataError(f"logits have shape {scores.shape}, and {(truth.size, classes)} is needed")
    bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if bad.size:
        raise DataError(
            f"logits of {bad.size} samples are not finite, first row {bad[0]}: the model has diverged; "
            "train it with a lower --lr"
        )
    if not np.issubdtype(truth.dtype, np.integer) or truth.min() < 0 or truth.max() >= classes:
        raise DataError(f"labels run from {truth.min()} to {truth.max()}, and classes from 0 to {classes - 1}")
    return scores, truth.astype(np.int64)


def balanced_accuracy(logits: Any, labels: Any) -> float:
    """Mean recall of the classes among the labels, for the line of an epoch. logits (N, C), labels (N,); 0 to 1.

    Raises DataError without any sample.
    """
    from sklearn.metrics import recall_score

    truth = np.asarray(labels, dtype=np.int64)
    if truth.size == 0:
        raise DataError("balanced accuracy of no samples: the split is empty")
    called = np.asarray(logits).argmax(axis=1)
    return float(recall_score(truth, called, labels=np.unique(truth), average="macro"))


def _cumulated(weights: Floats) -> Floats:
    """(K + 1, R): the sums of the first 0 to K rows."""
    return np.concatenate([np.zeros((1, weights.shape[1])), np.cumsum(weights, axis=0)])


class Ranking:
    """A score that should be higher for positives, sorted once for many weightings."""

    def __init__(self, score: Floats, truth: NDArray[np.bool_]):
        """score, truth: (N,)."""
        falling = np.argsort(-score, kind="stable")
        self._positive, self._negative = falling[truth[falling]], falling[~truth[falling]]
        positive, negative = -score[self._positive], -score[self._negative]
        self._over = np.searchsorted(negative, positive, side="left")  # how many negatives score higher
        self._not_under = np.searchsorted(negative, positive, side="right")  # and how many do not score lower
        # the places of the first positive that scores as much, and of the first that scores less
        self._tied = tuple(np.searchsorted(positive, positive, side=side) for side in ("left", "right"))
        # how many positives score above the k-th negative, k from 0; all of them at the end
        self._beaten = np.append(np.searchsorted(positive, negative, side="left"), positive.size)

    def area(self, weights: Floats) -> Floats:
        """(R,) areas under the ROC curve for (N, R) weights; NaN where a column has no positive or no negative.

        The weight of (positive, negative) pairs in the right order, half for ties (Mann–Whitney).
        """
        mine = weights[self._positive]
        if len(mine) <= _FEW:  # sums for each positive alone, because there may be 1,000 such classes
            *lost, all_others = self._of_each() @ weights
            return 1 - ratio(
                np.einsum("ij,ij->j", mine, np.array(lost).reshape(mine.shape)), mine.sum(axis=0) * all_others
            )
        others = _cumulated(weights[self._negative])
        lost = others[self._over]
        if not np.array_equal(self._over, self._not_under):
            lost = (lost + others[self._not_under]) / 2
        return 1 - ratio(np.einsum("ij,ij->j", mine, lost), mine.sum(axis=0) * others[-1])

    def _of_each(self) -> Floats:
        """(positives + 1, N): for each positive 1 at the negatives that score higher and 0.5 at ties; all negatives."""
        places = np.arange(self._negative.size)
        over, not_under = self._over[:, None], self._not_under[:, None]
        found = np.zeros((self._positive.size + 1, self._positive.size + self._negative.size))
        found[:-1, self._negative] = ((places < over) + (places < not_under).astype(np.float64)) / 2
        found[-1, self._negative] = 1
        return found

    def sensitivity(self, weights: Floats) -> Floats:
        """(R,) highest sensitivities of any threshold whose specificity is at least SPECIFICITY; NaN as for `area`."""
        found, others = _cumulated(weights[self._positive]), _cumulated(weights[self._negative])
        # others[k] is the weight of the k highest negatives: as many as the specificity allows may be called positive.
        allowed = (others <= others[-1] * (1 - SPECIFICITY + 1e-9)).sum(axis=0) - 1
        caught = found[self._beaten[allowed], np.arange(weights.shape[1])]
        return np.where(others[-1] > 0, ratio(caught, found[-1]), np.nan)

    def precision(self, weights: Floats) -> Floats:
        """(R,) average precisions: the precision at the score of each positive, averaged; NaN as for `area`.

        It depends on how frequent positives are: a score without any skill has their share.
        """
        mine = weights[self._positive]
        found, others = _cumulated(mine)[self._tied[1]], _cumulated(weights[self._negative])
        alarms = others[self._not_under]
        caught = np.einsum("ij,ij->j", mine, np.nan_to_num(ratio(found, found + alarms)))
        return np.where(others[-1] > 0, ratio(caught, mine.sum(axis=0)), np.nan)

    def partial_area(self, weights: Floats) -> Floats:
        """(R,) areas between the ROC curve and a sensitivity of SENSITIVITY, 0 to 1 − SENSITIVITY; NaN as for `area`.

        The primary score of ISIC 2024 (github.com/ISIC-Research/Challenge-2024-Metrics). It is the integral of the
        specificity over the missed share of positives, from none to 1 − SENSITIVITY. Of positives and negatives that
        score alike, the curve is a straight line.
        """
        found, others = _cumulated(weights[self._positive]), _cumulated(weights[self._negative])
        missed = np.minimum(ratio(found[-1] - found, found[-1]), 1 - SENSITIVITY)  # from all to none
        start, end = missed[1:], missed[:-1]
        clear = others[-1] - others[self._not_under]  # negatives that score less
        if not np.array_equal(self._over, self._not_under):
            first, last = (found[-1] - found[place] for place in self._tied)  # the ends of those that score alike
            along = ratio((start + end) / 2 * found[-1] - last, first - last)
            clear = clear + np.nan_to_num(along) * (others[self._not_under] - others[self._over])
        area = np.einsum("ij,ij->j", end - start, clear)
        return np.where(found[-1] > 0, ratio(area, others[-1]), np.nan)


class Scores:
    """The answers of one model under one prior, sorted and counted once, for any number of weightings.

    Everything about a class that has no image in the labels is NaN, and means are over the classes that have one.
    """

    def __init__(
        self, logits: Any, labels: Any, *, classes: Classes, prior: str, logits_prior: str, training_prior: Any
    ):
        """logits: (N, C); labels: (N,) 0 to C − 1. classes: the C of them. Priors as for `run_metrics.evaluate`.

        Raises DataError for logits, labels or a training prior that cannot be used, UsageError for an unknown prior.
        """
        raw, self.labels = checked(logits, labels, len(classes))
        self.logits = at_prior(raw, estimated=logits_prior, wanted=prior, training_prior=training_prior)
        self.prior = class_prior(prior, training_prior)
        self.classes = raw.shape[1]
        self.probabilities = softmax(self.logits)
        self.called = self.logits.argmax(axis=1)
        self.present = np.bincount(self.labels, minlength=self.classes) > 0
        self.sets = {name: self._of_set(classes.members(name)) for name in classes.measured}
        self.bins = ConfidenceBins(self.probabilities, self.labels)
        self._cells = members(self.labels * self.classes + self.called, self.classes**2)
        self._rankings = [Ranking(self.probabilities[:, c], self.labels == c) for c in range(self.classes)]
        self._of_sets = {
            name: (members(2 * truth + (score >= 0.5), 4), Ranking(score, truth))
            for name, (truth, score) in self.sets.items()
        }

    def _of_set(self, labels: list[int]) -> tuple[NDArray[np.bool_], Floats]:
        """(N,) whether an image belongs to a set of classes, and (N,) the probability that it does."""
        return np.isin(self.labels, labels), self.probabilities[:, labels].sum(axis=1)

    def confusion(self) -> Ints:
        """(C, C) images by true and called class."""
        counts = np.bincount(self.labels * self.classes + self.called, minlength=self.classes**2)
        return counts.reshape(self.classes, self.classes)

    def values(self, weights: Floats | None = None) -> dict[str, Any]:
        """The scores of `measure` that scikit-learn has, on the test set itself or for one (N,) weighting.

        It has no calibration error: `sklearn.calibration.calibration_curve` knows neither weights nor how many images a
        bin holds.
        """
        from sklearn import metrics

        def area(truth: NDArray[np.bool_], score: Floats) -> float:
            one_kind = truth.all() or not truth.any()
            return np.nan if one_kind else float(metrics.roc_auc_score(truth, score, sample_weight=weights))

        def sensitivity(truth: NDArray[np.bool_], score: Floats) -> float:
            if truth.all() or not truth.any():
                return np.nan
            alarms, caught, _ = metrics.roc_curve(truth, score, sample_weight=weights, drop_intermediate=False)
            return float(caught[alarms <= 1 - SPECIFICITY + 1e-9].max())

        def precision_of(truth: NDArray[np.bool_], score: Floats) -> float:
            one_kind = truth.all() or not truth.any()
            return np.nan if one_kind else float(metrics.average_precision_score(truth, score, sample_weight=weights))

        def partial_area(truth: NDArray[np.bool_], score: Floats) -> float:
            if truth.all() or not truth.any():
                return np.nan
            most = 1 - SENSITIVITY
            scaled = metrics.roc_auc_score(~truth, -score, max_fpr=most, sample_weight=weights)
            return float((2 * scaled - 1) * (most - most**2 / 2) + most**2 / 2)  # McClish's scale taken back

        names, options = np.arange(self.classes), {"sample_weight": weights, "zero_division": np.nan}
        of_class: Any = metrics.precision_recall_fscore_support(self.labels, self.called, labels=names, **options)
        precision, recall, f1 = of_class[0], of_class[1], np.where(self.present, of_class[2], np.nan)
        auc = np.array([area(self.labels == c, self.probabilities[:, c]) for c in names])
        of_sets: dict[str, float] = {}
        for name, (truth, score) in self.sets.items():
            both: Any = metrics.precision_recall_fscore_support(truth, score >= 0.5, labels=[False, True], **options)
            specificity, at_half = both[1]
            ranked = area(truth, score), at_half, specificity, sensitivity(truth, score)
            figures = *ranked, precision_of(truth, score), partial_area(truth, score)
            of_sets |= {f"{name}_{key}": figure for key, figure in zip(SET_SCALARS, figures, strict=True)}
        confusion = metrics.confusion_matrix(self.labels, self.called, labels=names, sample_weight=weights)
        return {
            **({"confusion": confusion} if self.classes <= MOST_CONFUSED else {}),
            "recall": recall,
            "precision": precision,
            "f1": f1,
            "auc": auc,
            "accuracy": metrics.accuracy_score(self.labels, self.called, sample_weight=weights),
            "balanced_accuracy": recall[self.present].mean(),
            "macro_f1": f1[self.present].mean(),
            "macro_auc": np.nan if np.isnan(auc).all() else np.nanmean(auc),
            **of_sets,
        }

    def measure(self, weights: Floats) -> dict[str, Floats]:
        """Every score for (N, R) weights: arrays whose first axis is R.

        `confusion` (R, C, C) weights by true and called class (up to MOST_CONFUSED classes), `recall`, `precision`,
        `f1`, `auc` (R, C), `reliability_mass`, `reliability_confidence`, `reliability_accuracy` (R, BINS), and (R,)
        each: `accuracy`, `balanced_accuracy`, `macro_f1`, `macro_auc`, `expected_calibration_error`, and SET_SCALARS of
        each set of interest, as in `malignant_auc`.
        """
        size, right_here = weights.shape[1], self.labels == self.called
        true, called = ((members(of, self.classes) @ weights).T for of in (self.labels, self.called))
        right = (members(self.labels[right_here], self.classes) @ weights[right_here]).T
        confusion = {}
        if self.classes <= MOST_CONFUSED:
            confusion["confusion"] = (self._cells @ weights).T.reshape(size, self.classes, self.classes)
        recall, precision = ratio(right, true), ratio(right, called)
        f1 = np.where(true > 0, ratio(2 * right, true + called), np.nan)
        auc = np.stack([ranking.area(weights) for ranking in self._rankings], axis=1)
        of_sets: dict[str, Floats] = {}
        for name, (cells, ranking) in self._of_sets.items():
            cleared, alarmed, missed, caught = cells @ weights
            at_half = ratio(caught, missed + caught), ratio(cleared, cleared + alarmed)
            ranked = ranking.area(weights), *at_half, ranking.sensitivity(weights)
            figures = *ranked, ranking.precision(weights), ranking.partial_area(weights)
            of_sets |= {f"{name}_{key}": figure for key, figure in zip(SET_SCALARS, figures, strict=True)}
        # A class in the test set keeps at least one lesion in every resample. One that only patients with a rarer class
        # have may lack images in a resample, whose means are then NaN: intervals leave it out.
        rankable = self.present & (np.bincount(self.labels, minlength=self.classes) < self.labels.size)
        return {
            **confusion,
            "recall": recall,
            "precision": precision,
            "f1": f1,
            "auc": auc,
            "accuracy": ratio(right.sum(axis=1), true.sum(axis=1)),
            "balanced_accuracy": recall[:, self.present].mean(axis=1),
            "macro_f1": f1[:, self.present].mean(axis=1),
            "macro_auc": auc[:, rankable].mean(axis=1) if rankable.any() else np.full(size, np.nan),
            **of_sets,
            **self.bins.measure(prior_weights(self.labels, weights, self.prior)),
        }


def replicate(scores: Sequence[Scores], bootstrap: LesionBootstrap) -> list[dict[str, Floats]]:
    """Each model's scores (see `Scores.measure`) on the test set itself (row 0) and on every resample (rows 1 up).

    All models are measured on the same resamples.
    """
    parts: list[list[dict[str, Floats]]] = [[] for _ in scores]
    for weights in bootstrap.weights():
        for mine, one in zip(parts, scores, strict=True):
            mine.append(one.measure(weights))
    found = [{key: np.concatenate([part[key] for part in mine]) for key in mine[0]} for mine in parts]
    for replicates, one in zip(found, scores, strict=True):
        for key, value in one.values().items():
            replicates[key][0] = value
    return found
