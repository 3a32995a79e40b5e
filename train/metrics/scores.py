"""Scores of a classifier for many weightings of its images at once: weighted counts and ranks."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.metrics.bootstrap import Groups
from train.metrics.calibration import ConfidenceBins, prior_weights, softmax

SPECIFICITY = 0.90

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def _ratio(above: Floats, below: Floats) -> Floats:
    """above / below, NaN where below is 0."""
    below = np.broadcast_to(below, above.shape)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


@dataclass(frozen=True)
class Ranking:
    """A score that should be higher for positives, sorted once.

    positive, negative: row numbers, by falling score. over, not_under: for each positive, how many negatives score
    higher, and how many not lower. beaten: (negatives + 1,) how many positives score above the k-th negative (k from
    0); all of them at the end.
    """

    positive: Ints
    negative: Ints
    over: Ints
    not_under: Ints
    beaten: Ints

    @classmethod
    def of(cls, score: Floats, truth: NDArray[np.bool_]) -> "Ranking":
        """Sort (N,) scores of (N,) truths."""
        positive, negative = np.flatnonzero(truth), np.flatnonzero(~truth)
        positive = positive[np.argsort(-score[positive], kind="stable")]
        negative = negative[np.argsort(-score[negative], kind="stable")]
        falling_p, falling_n = -score[positive], -score[negative]
        return cls(
            positive=positive,
            negative=negative,
            over=np.searchsorted(falling_n, falling_p, side="left"),
            not_under=np.searchsorted(falling_n, falling_p, side="right"),
            beaten=np.append(np.searchsorted(falling_p, falling_n, side="left"), positive.size),
        )

    def measure(self, weights: Floats, *, specificity: float | None = None) -> tuple[Floats, Floats | None]:
        """(R,) areas under the ROC curve for (N, R) weights; where a specificity is named, (R,) sensitivities at it.

        The area is the weight of (positive, negative) pairs in the right order, half for ties (Mann–Whitney). The
        sensitivity is the highest of any threshold whose specificity is at least the named one. NaN where a column has
        no positive or no negative.
        """
        mine = weights[self.positive]
        others = np.zeros((self.negative.size + 1, weights.shape[1]))
        np.cumsum(weights[self.negative], axis=0, out=others[1:])
        wholes, mass = others[-1], mine.sum(axis=0)
        lost = others[self.over]
        if not np.array_equal(self.over, self.not_under):
            lost = (lost + others[self.not_under]) / 2
        area = 1 - _ratio(np.einsum("ij,ij->j", mine, lost), mass * wholes)
        if specificity is None:
            return area, None
        # others[k] is the weight of the k highest negatives: as many as the specificity allows may be called positive.
        allowed = (others <= wholes * (1 - specificity + 1e-9)).sum(axis=0) - 1
        found = np.zeros((self.positive.size + 1, weights.shape[1]))
        np.cumsum(mine, axis=0, out=found[1:])
        caught = found[self.beaten[allowed], np.arange(weights.shape[1])]
        return area, np.where(wholes > 0, _ratio(caught, mass), np.nan)


class Scores:
    """The answers of one model under one prior, sorted and counted once, for any number of weightings.

    Everything about a class that has no image in the labels is NaN, and means are over the classes that have one.
    """

    def __init__(self, logits: Floats, labels: Ints, *, prior: Floats, malignant: Ints, melanoma: int | None):
        """logits: (N, C) under the prior (`calibration.at_prior`); labels: (N,) 0 to C − 1; prior: (C,).

        malignant: numbers of the malignant classes; melanoma: its number, or None where there is no such class.
        """
        self.labels, self.prior, self.melanoma = labels, prior, melanoma
        self.classes = logits.shape[1]
        self.probabilities = softmax(logits)
        self.predicted = logits.argmax(axis=1)
        self.present = np.bincount(labels, minlength=self.classes) > 0
        self.cells = Groups(labels * self.classes + self.predicted, self.classes**2)
        self.bins = ConfidenceBins(self.probabilities, labels)
        self.rankings = {
            c: Ranking.of(self.probabilities[:, c], labels == c) for c in range(self.classes) if self.present[c]
        }
        is_malignant = np.isin(labels, malignant)
        danger = self.probabilities[:, malignant].sum(axis=1)
        self.danger = Ranking.of(danger, is_malignant)
        self.danger_cells = Groups(2 * is_malignant + (danger >= 0.5), 4)

    def measure(self, weights: Floats) -> dict[str, Floats]:
        """Every score for (N, R) weights: arrays whose first axis is R.

        `confusion` (R, C, C) weights by true and called class, `recall`, `precision`, `f1`, `auc` (R, C),
        `reliability_mass`, `reliability_confidence`, `reliability_accuracy` (R, BINS), and (R,) each: `accuracy`,
        `balanced_accuracy`, `macro_f1`, `macro_auc`, `expected_calibration_error`, `malignant_auc`,
        `malignant_sensitivity`, `malignant_specificity` (called malignant where the malignant classes together have a
        probability of at least 0.5), `malignant_sensitivity_at_90_specificity` and, of melanoma against the rest,
        `melanoma_sensitivity_at_90_specificity`.
        """
        size = weights.shape[1]
        confusion = self.cells.sums(weights).T.reshape(size, self.classes, self.classes)
        right, true, called = np.einsum("rcc->rc", confusion), confusion.sum(axis=2), confusion.sum(axis=1)
        recall, precision = _ratio(right, true), _ratio(right, called)
        f1 = np.where(true > 0, _ratio(2 * right, true + called), np.nan)
        auc = np.full((size, self.classes), np.nan)
        at_specificity = np.full(size, np.nan)
        for c, ranking in self.rankings.items():
            auc[:, c], sensitivity = ranking.measure(weights, specificity=SPECIFICITY if c == self.melanoma else None)
            if sensitivity is not None:
                at_specificity = sensitivity
        danger_auc, danger_sensitivity = self.danger.measure(weights, specificity=SPECIFICITY)
        assert danger_sensitivity is not None
        reliability = self.bins.measure(prior_weights(self.labels, weights, self.prior))
        cleared, alarmed, missed, caught = self.danger_cells.sums(weights)
        # A class in the test set keeps at least one lesion in every resample, so these means need no NaN care.
        rankable = [c for c in self.rankings if self.rankings[c].negative.size]
        return {
            "confusion": confusion,
            "recall": recall,
            "precision": precision,
            "f1": f1,
            "auc": auc,
            "accuracy": _ratio(right.sum(axis=1), true.sum(axis=1)),
            "balanced_accuracy": recall[:, self.present].mean(axis=1),
            "macro_f1": f1[:, self.present].mean(axis=1),
            "macro_auc": auc[:, rankable].mean(axis=1) if rankable else np.full(size, np.nan),
            "expected_calibration_error": reliability.error,
            "reliability_mass": reliability.mass.T,
            "reliability_confidence": reliability.confidence.T,
            "reliability_accuracy": reliability.accuracy.T,
            "melanoma_sensitivity_at_90_specificity": at_specificity,
            "malignant_auc": danger_auc,
            "malignant_sensitivity": _ratio(caught, missed + caught),
            "malignant_specificity": _ratio(cleared, cleared + alarmed),
            "malignant_sensitivity_at_90_specificity": danger_sensitivity,
        }
