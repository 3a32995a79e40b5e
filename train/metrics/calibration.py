"""Probabilities under a named prior, temperature scaling, and the calibration error: accuracy against confidence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.common.errors import DataError, UsageError
from train.metrics.bootstrap import CONFIDENCE, Floats, Ints, LesionBootstrap, estimate, members, number, ratio

PRIORS = ("balanced", "training")
"""`balanced`: every class equally likely. `training`: as likely as among the training images of the run."""

BINS = 15
"""Equal-width bins of confidence, as in Guo et al. 2017, "On calibration of modern neural networks" (ICML)."""

TEMPERATURE_LIMITS = (0.05, 20.0)


def check_prior(name: str) -> None:
    """Raise UsageError for a prior that is not one of PRIORS."""
    if name not in PRIORS:
        raise UsageError(f"prior '{name}' is unknown: use one of {', '.join(PRIORS)}")


def class_prior(name: str, training_prior: Sequence[float] | Floats) -> Floats:
    """(C,) probabilities of the classes under the named prior. A class never trained on has 0 under both.

    training_prior: (C,) counts or shares of the training images. Raises DataError when it is negative or all zero.
    """
    check_prior(name)
    shares = np.asarray(training_prior, dtype=np.float64)
    if shares.ndim != 1 or not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
        raise DataError(f"training prior {shares.tolist()} is not a distribution over classes")
    if name == "balanced":
        shares = (shares > 0).astype(np.float64)
    return shares / shares.sum()


def at_prior(logits: Any, *, estimated: str, wanted: str, training_prior: Sequence[float] | Floats) -> Floats:
    """Logits whose softmax is the posterior under the wanted prior: (N, C) float64.

    estimated: the prior that the raw logits stand for. A model trained with logit adjustment (Menon et al. 2021,
    "Long-tail learning via logit adjustment", ICLR) or with class weights estimates the `balanced` posterior; one
    trained with plain cross-entropy the `training` one. By Bayes' rule they differ by the log of the training prior.
    A class without training images gets −inf (probability 0).
    """
    check_prior(estimated)
    check_prior(wanted)
    shares = class_prior("training", training_prior)
    moved = np.array(logits, dtype=np.float64)
    if moved.ndim != 2 or moved.shape[1] != shares.size:
        raise DataError(f"logits have shape {moved.shape}, and the training prior has {shares.size} classes")
    trained = shares > 0
    if estimated != wanted:
        sign = 1.0 if wanted == "training" else -1.0
        moved[:, trained] += sign * np.log(shares[trained])
    moved[:, ~trained] = -np.inf
    return moved


def softmax(logits: Floats) -> Floats:
    """(N, C) probabilities of (N, C) logits."""
    from scipy.special import softmax as scipy_softmax

    return scipy_softmax(logits, axis=1)


def probabilities(
    logits: Any, temperature: float, *, estimated: str, wanted: str, training_prior: Sequence[float] | Floats
) -> Floats:
    """(N, C) probabilities of raw logits: first the temperature, then the change of prior (`at_prior`).

    In this order, because the temperature was fitted at the prior that the logits stand for.
    """
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    return softmax(at_prior(scaled, estimated=estimated, wanted=wanted, training_prior=training_prior))


def prior_weights(labels: Ints, weights: Floats, prior: Floats) -> Floats:
    """(N, R) weights scaled so that each class has its share of the prior in every column; columns sum to 1.

    labels: (N,); weights: (N, R); prior: (C,). Probabilities under a prior can only be right in a population with that
    prior, so calibration is measured on images weighted to it. Classes without images leave their share to the others.
    Columns are all 0 when no labelled class has a share.
    """
    totals = members(labels, prior.size) @ weights
    share = np.where(totals > 0, prior[:, None], 0.0)
    share = np.nan_to_num(ratio(share, share.sum(axis=0)))
    return weights * np.nan_to_num(ratio(share, totals))[labels]


class ConfidenceBins:
    """The top probability of each image in its bin, ready for many weightings."""

    def __init__(self, probabilities: Floats, labels: Ints):
        """probabilities: (N, C); labels: (N,)."""
        confidence = probabilities.max(axis=1)
        bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
        self.images = np.bincount(bins, minlength=BINS)
        self.confidence = confidence[:, None]
        self.correct = (probabilities.argmax(axis=1) == labels).astype(np.float64)[:, None]
        self._bins = members(bins, BINS)

    def measure(self, weights: Floats) -> dict[str, Floats]:
        """The calibration of (N, R) weightings of the images.

        `reliability_mass` (R, BINS): weight of each bin. `reliability_confidence`, `reliability_accuracy` (R, BINS):
        its means, NaN where it is empty. `expected_calibration_error` (R,): mean |accuracy − confidence| of the bins,
        weighted by mass; NaN without mass.
        """
        mass = self._bins @ weights
        confidence, accuracy = (ratio(self._bins @ (weights * of), mass) for of in (self.confidence, self.correct))
        gaps = np.where(mass > 0, np.abs(accuracy - confidence), 0.0)
        return {
            "reliability_mass": mass.T,
            "reliability_confidence": confidence.T,
            "reliability_accuracy": accuracy.T,
            "expected_calibration_error": ratio((gaps * mass).sum(axis=0), mass.sum(axis=0)),
        }

    def of_chance(self, weights: Floats, lesions: Ints, *, draws: int, seed: int) -> Floats:
        """(draws,) calibration errors that these confidences would show if each were the true chance of being right.

        Bröcker & Smith 2007, "Increasing the reliability of reliability diagrams", Weather Forecast. 22:651–661.
        weights: (N, 1), summing to 1; lesions: (N,) numbers; images of one lesion are right or wrong together.
        """
        luck = np.random.default_rng(seed).random((int(lesions.max(initial=-1)) + 1, draws))[lesions]
        gaps = self._bins @ (weights * ((luck < self.confidence) - self.confidence))
        return np.abs(gaps).sum(axis=0)


@dataclass(frozen=True)
class Temperature:
    """A fitted temperature: logits are divided by it. Losses are mean negative log-likelihoods on val, in nats."""

    temperature: float
    loss_before: float
    loss_after: float
    at_limit: bool  # the best temperature lies outside TEMPERATURE_LIMITS: val does not determine it


def fit_temperature(logits: Floats, labels: Ints, prior: Floats) -> Temperature:
    """The temperature that minimises the log loss of val images weighted to the prior (Guo et al. 2017).

    logits: (N, C) under that prior (`at_prior`); labels: (N,); prior: (C,) (`class_prior`). Raises DataError when no
    val image has a class of the prior.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    weights = prior_weights(labels, np.ones((labels.size, 1)), prior)[:, 0]
    use = weights > 0
    if not use.any():
        raise DataError("temperature scaling needs val images of the trained classes, and there are none")
    rows, chosen, share = logits[use], labels[use], weights[use]

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(rows / np.exp(log_temperature), axis=1)
        return float(-(share * scaled[np.arange(chosen.size), chosen]).sum())

    low, high = np.log(TEMPERATURE_LIMITS)
    best = float(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6}).x)  # pyright: ignore
    return Temperature(
        temperature=float(np.exp(best)),
        loss_before=loss(0.0),
        loss_after=loss(best),
        at_limit=bool(min(best - low, high - best) < 1e-3),
    )


def calibration_error(
    replicates: Floats, bins: ConfidenceBins, labels: Ints, prior: Floats, bootstrap: LesionBootstrap
) -> tuple[dict[str, float | None], float | None]:
    """The expected calibration error with its interval, and the mean error that chance alone would show.

    replicates: (R + 1,) errors, of the test set first. labels: (N,); prior: (C,).

    The error is an average of absolute gaps, so noise in each bin makes it larger: where confidences are the true
    chances it should be 0, and a test set of 900 images shows 0.03 to 0.06. Resamples add that once more, hence the
    `basic` interval. Its low end is 0 where chance alone explains the value (97.5 % of draws). The intervals then hold
    the truth of a calibrated model in 97 to 99 % of 400 simulated test sets, and of an overconfident one in 88 to 89 %
    (`python -m tests.support.simulate_coverage --only metrics`), less than those of the other metrics (92 to 97 %).
    They are intervals of the error without its bias and may lie below the value that is shown. Such an interval is
    widened to the value.
    """
    cell = estimate(replicates, kind="basic")
    if cell["value"] is None:
        return cell, None
    weights = prior_weights(labels, np.ones((labels.size, 1)), prior)
    chance = bins.of_chance(weights, bootstrap.codes, draws=1000, seed=bootstrap.seed)
    if cell["value"] <= np.quantile(chance, (1 + CONFIDENCE) / 2) and cell["low"] is not None:
        cell["low"] = 0.0
    if cell["low"] is not None and cell["high"] is not None:
        # An interval without its own estimate reads as a mistake, and a wider one holds the truth no less often.
        cell["low"], cell["high"] = min(cell["low"], cell["value"]), max(cell["high"], cell["value"])
    return cell, float(chance.mean())


def reliability(replicates: dict[str, Floats], images: Ints) -> list[dict[str, Any]]:
    """One dict a bin of confidence: its edges, images, share of the (prior-weighted) images, confidence, accuracy.

    replicates: of `ConfidenceBins.measure`, (R + 1, BINS); images: (BINS,).
    """
    return [
        {
            "from": b / BINS,
            "to": (b + 1) / BINS,
            "images": int(images[b]),
            "share": number(replicates["reliability_mass"][0, b]),
            "confidence": number(replicates["reliability_confidence"][0, b]),
            "accuracy": estimate(replicates["reliability_accuracy"][:, b]),
        }
        for b in range(BINS)
    ]
