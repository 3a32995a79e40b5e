"""How often the 95 % intervals of the study hold the truth, on simulated results whose truth is known.

    python -m tests.support.simulate_coverage --repeats 2000

prints a table; the tests run the same functions with fewer repeats, and docstrings of train/ quote the table.
"""

from typing import Any

import click
import numpy as np
from scipy.stats import t

from shards.format import HAM10000
from train.metrics.bootstrap import LesionBootstrap, estimate, interval, mean_freedom, members
from train.metrics.differences import Tested, between_pairs, model_difference, student
from train.metrics.run_metrics import evaluate
from train.metrics.scores import Scores
from train.study.curves import fit_curve, hold_out_largest
from train.study.variance import SOURCES, variance_shares

LESIONS = np.array([46, 65, 145, 15, 123, 300, 20])
"""Lesions per class of the 20 % test split of HAM10000, except nv (1,081), which adds little to the variance."""

RECALLS = {
    "poor": np.array([0.2, 0.3, 0.3, 0.1, 0.4, 0.7, 0.3]),
    "middle": np.array([0.5, 0.6, 0.5, 0.4, 0.5, 0.8, 0.7]),
    "good": np.array([0.7, 0.8, 0.75, 0.7, 0.7, 0.93, 0.9]),
    "high": np.array([0.9, 0.95, 0.9, 0.9, 0.9, 0.97, 0.95]),
}
WITHIN_LESION = 0.6
"""Correlation of being right between two images of one lesion."""

SIZES_7 = np.round(5600 / 2.0 ** np.arange(6, -1, -1))
SIZES_4 = np.array([560.0, 1400.0, 2800.0, 5600.0])

CURVES = {
    # name: (a, b, c), sizes, runs a size, noise (standard deviation of a run with n training images)
    "slow, even noise": ((0.75, 1.6, 0.3), SIZES_7, 3, lambda n: 0.01 + 0 * n),
    "middle, noise falls": ((0.7, 2.5, 0.5), SIZES_7, 3, lambda n: 0.008 * (n / 5600) ** -0.3),
    "fast, little noise": ((0.65, 8.0, 0.8), SIZES_7, 3, lambda n: 0.005 + 0 * n),
    "four sizes": ((0.7, 2.5, 0.5), SIZES_4, 3, lambda n: 0.01 + 0 * n),
    "flat and noisy": ((0.6, 0.5, 0.4), SIZES_4, 3, lambda n: 0.03 + 0 * n),
}


def views(rng, lesions):
    """Labels of lesions, and labels and lesion ids of their one to three images."""
    label = np.repeat(np.arange(7), lesions)
    images = rng.choice([1, 2, 3], label.size, p=[0.74, 0.2, 0.06])
    return label, np.repeat(label, images), np.repeat(np.arange(label.size), images)


def difficulty(rng, recalls):
    """Chances of lesions of these recalls to be found."""
    spread = (1 - WITHIN_LESION) / WITHIN_LESION
    return rng.beta(recalls * spread, (1 - recalls) * spread)


def lesions_and_answers(rng, recalls, lesions, models=1, gain=1.0):
    """Labels and lesion ids of images, and whether each model gets each image right, (N, models).

    The models are equally good and find the same lesions hard. A gain below 1 makes the first one better.
    """
    label, labels, ids = views(rng, lesions)
    chance = difficulty(rng, recalls[label])[ids][:, None] ** np.array([gain] + [1.0] * (models - 1))
    return labels, ids, rng.random((labels.size, models)) < chance


def recalls_of(labels, right, bootstrap):
    """(R + 1, 7) recalls: of the images, and of each resample."""
    groups = members(2 * labels + right, 14)
    parts = [groups @ weights for weights in bootstrap.weights()]
    counts = np.concatenate(parts, axis=1).reshape(7, 2, -1)
    return (counts[:, 1] / counts.sum(axis=1)).T


def balanced_accuracy(recalls, repeats, resamples=1000, seed=0, lesions=LESIONS):
    """Share of repeats whose interval holds the true balanced accuracy."""
    rng = np.random.default_rng(seed)
    held = 0
    for i in range(repeats):
        labels, ids, right = lesions_and_answers(rng, recalls, lesions)
        bootstrap = LesionBootstrap(labels, ids, resamples=resamples, seed=i)
        found = recalls_of(labels, right[:, 0], bootstrap)
        mean = found.mean(axis=1)
        low, high = interval(mean[1:], float(mean[0]), freedom=mean_freedom(found, bootstrap))
        held += bool(low <= recalls.mean() <= high)
    return held / repeats


def recall_of_few(recall, lesions, repeats, resamples=200, seed=0):
    """Share of repeats whose interval of one class's recall holds the true one, for a class of so few lesions."""
    rng = np.random.default_rng(seed)
    counts, recalls = np.array([lesions, 40, 0, 0, 0, 0, 0]), np.array([recall, 0.5, 0, 0, 0, 0, 0])
    held = 0
    for i in range(repeats):
        labels, ids, right = lesions_and_answers(rng, recalls.clip(1e-6), counts)
        bootstrap = LesionBootstrap(labels, ids, resamples=resamples, seed=i)
        groups = members(2 * labels + right[:, 0], 4)
        missed, found = np.concatenate([groups @ weights for weights in bootstrap.weights()], axis=1)[:2]
        held += holds(estimate(found / (missed + found), freedom=lesions - 1, lesions=lesions), recall)
    return held / repeats


def crossed_pairs(repeats, seed_sd=1.0, subset_sd=1.0, own_sd=1.0, seeds=3, subsets=3, seed=0):
    """Share of repeats whose interval of a mean difference, 0, of crossed seeds and subset seeds holds it."""
    rng = np.random.default_rng(seed)
    keys = [(s, u) for s in range(seeds) for u in range(subsets)]
    held = 0
    for _ in range(repeats):
        gaps = (
            np.repeat(seed_sd * rng.normal(size=seeds), subsets)
            + np.tile(subset_sd * rng.normal(size=subsets), seeds)
            + own_sd * rng.normal(size=len(keys))
        )
        variance, freedom, _ = between_pairs(gaps, keys)
        held += abs(gaps.mean()) <= t.ppf(0.975, freedom) * variance**0.5
    return held / repeats


def two_models(recalls, repeats, resamples=1000, seed=0, lesions=LESIONS, gain=1.0):
    """Share of repeats whose interval of the difference holds the true one (0 for gain 1), and of p below 0.05."""
    rng = np.random.default_rng(seed)
    chances = [difficulty(rng, np.full(400_000, recall)) for recall in recalls]
    truth = float(np.mean([(chance**gain - chance).mean() for chance in chances]))
    held = small = 0
    for i in range(repeats):
        labels, ids, right = lesions_and_answers(rng, recalls, lesions, models=2, gain=gain)
        bootstrap = LesionBootstrap(labels, ids, resamples=resamples, seed=i)
        gaps = recalls_of(labels, right[:, 0], bootstrap) - recalls_of(labels, right[:, 1], bootstrap)
        gap = gaps.mean(axis=1)
        low, high, p = student(float(gap[0]), float(gap[1:].var(ddof=1)), mean_freedom(gaps, bootstrap))
        held += bool(low <= truth <= high)
        small += p is not None and p < 0.05
    return held / repeats, small / repeats


def every_metric(repeats, prior="training", sharpness=1.0, resamples=1000, seed=0):
    """Share of repeats whose interval holds the truth, for each scalar metric of `evaluate`.

    A Gaussian world whose exact posterior is known; a sharpness above 1 makes the model overconfident. The truth
    is what the model gets on 400 times as many lesions.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(7, 6))

    def draw(lesions):
        label, labels, ids = views(rng, lesions)
        of_lesion = centres[label] + 0.8 * rng.normal(size=(label.size, 6))
        x = of_lesion[ids] + 0.6 * rng.normal(size=(labels.size, 6))
        return sharpness * -((x[:, None] - centres) ** 2).sum(axis=2) / 2, labels, ids

    options: dict[str, Any] = {
        "classes": HAM10000,
        "prior": prior,
        "logits_prior": "balanced",
        "training_prior": LESIONS,
    }
    logits, labels, _ = draw(400 * LESIONS)
    whole = Scores(logits, labels, **options).measure(np.ones((labels.size, 1)))
    truth = {name: float(values[0]) for name, values in whole.items() if values.ndim == 1}
    held = dict.fromkeys(truth, 0.0)
    for i in range(repeats):
        logits, labels, ids = draw(LESIONS)
        found = evaluate(logits, labels, ids, split=["test"] * labels.size, resamples=resamples, seed=i, **options)
        for name in truth:
            held[name] += holds(found[name], truth[name]) / repeats
    return held


class Answers:
    """Takes the place of `Scores` in `model_difference`: balanced accuracy alone, from which images are right."""

    def __init__(self, labels, right):
        self.labels, self.groups = labels, members(2 * labels + right, 14)

    def measure(self, weights):
        counts = (self.groups @ weights).reshape(7, 2, -1)
        recall = (counts[:, 1] / counts.sum(axis=1)).T
        return {"balanced_accuracy": recall.mean(axis=1), "recall": recall}

    def values(self):
        return {}


def models_with_seeds(repeats, runs=3, seed_sd=0.03, resamples=300, seed=0):
    """Two models of runs that differ by seed: share of intervals of the mean difference that hold the true one, 0."""
    rng = np.random.default_rng(seed)
    held = 0
    for i in range(repeats):
        labels, ids, _ = lesions_and_answers(rng, RECALLS["middle"], LESIONS)
        hard = rng.normal(size=ids[-1] + 1)[ids]  # how hard a lesion is for every model
        ability = rng.normal(size=2 * runs) * seed_sd * 3
        right = hard[:, None] + 0.7 * rng.normal(size=(labels.size, 2 * runs)) < ability + 0.2
        tested = [Tested(np.arange(labels.size), ids, Answers(labels, right[:, r])) for r in range(2 * runs)]
        cells = model_difference(
            tested[:runs], tested[runs:], metrics=["balanced_accuracy"], resamples=resamples, seed=i
        )
        held += holds(cells["balanced_accuracy"]["difference"], 0)
    return held / repeats


def holds(cell, truth):
    """Whether an interval, open where an end is None, holds the truth."""
    return (cell["low"] is None or cell["low"] <= truth) and (cell["high"] is None or truth <= cell["high"])


def curve(setting, repeats, resamples=1000, seed=0):
    """Shares of repeats: called identifiable, and whose intervals hold a, b, c, the curve at the smallest, a middle,
    the largest and twice the largest size, and the held-out mean of the largest size."""
    (a, b, c), sizes, runs, noise = CURVES[setting]
    n = np.repeat(sizes, runs)
    at = {"smallest": n.min(), "middle": np.sqrt(n.min() * n.max()), "largest": n.max(), "twice": 2 * n.max()}
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(repeats):
        y = a - b * n**-c + noise(n) * rng.normal(size=n.size)
        fitted = fit_curve(n, y, resamples=resamples, seed=i)
        row = {"identifiable": fitted.identifiable}
        row |= {"a": holds(fitted.a, a), "b": holds(fitted.b, b), "c": holds(fitted.c, c)}
        for name, size in at.items():
            _, low, high = fitted.fit.value_at(size)
            row[name] = low <= a - b * size**-c <= high
        row["held out"] = hold_out_largest(n, y, resamples=resamples, seed=i)["inside"]
        rows.append(row)
    return {
        name: float(np.mean([row[name] for row in rows])) if rows[0][name] is not None else None for name in rows[0]
    }


def variance(repeats, shares=(0.3, 0.5, 0.1, 0.1), resamples=1000, seed=0):
    """Mean estimated share of each source, and share of repeats whose interval holds the true one."""
    import pandas as pd

    rng = np.random.default_rng(seed)
    models, sizes, runs = 4, 7, 3

    def effect(*shape):
        values = rng.normal(size=shape)
        for axis in range(len(shape)):
            values = values - values.mean(axis=axis, keepdims=True)
        return values / values.std()

    sd = 0.05 * np.sqrt(shares)
    cells = sd[0] * effect(models)[:, None] + sd[1] * effect(sizes) + sd[2] * effect(models, sizes)
    index = np.array([(m, s) for m in range(models) for s in range(sizes) for _ in range(runs)])
    table = pd.DataFrame({"model": [f"m{m}" for m, _ in index], "fraction": index[:, 1]})
    held, mean = np.zeros(4), np.zeros(4)
    for i in range(repeats):
        table["score"] = 0.5 + cells[index[:, 0], index[:, 1]] + sd[3] * rng.normal(size=len(index))
        found = variance_shares(table, "score", resamples=resamples, seed=i)["shares"]
        held += [holds(found[name], share) for name, share in zip(SOURCES, shares, strict=True)]
        mean += [found[name]["value"] for name in SOURCES]
    return dict(zip(SOURCES, mean / repeats, strict=True)), dict(zip(SOURCES, held / repeats, strict=True))


@click.command()
@click.option("--repeats", default=2000, show_default=True)
@click.option("--resamples", default=1000, show_default=True)
@click.option("--only", type=click.Choice(["balanced-accuracy", "metrics", "differences", "curves", "variance"]))
def main(repeats: int, resamples: int, only: str | None) -> None:
    """Print the coverage of every kind of interval."""
    if only in (None, "balanced-accuracy"):
        for name, recalls in RECALLS.items():
            for lesions, label in ((LESIONS, "all"), (LESIONS // 2, "half")):
                share = balanced_accuracy(recalls, repeats, resamples, lesions=lesions)
                click.echo(f"balanced accuracy, {name} recalls, {label} lesions: {share:.3f}")
    if only in (None, "metrics"):
        for recall in (0.02, 0.1, 0.5, 0.9, 0.98):
            for lesions in (12, 20):
                share = recall_of_few(recall, lesions, repeats, resamples)
                click.echo(f"recall {recall} of a class of {lesions} lesions: {share:.3f}")
        for prior in ("balanced", "training"):
            for sharpness in (1.0, 1.6):
                for name, share in every_metric(repeats, prior, sharpness, resamples).items():
                    click.echo(f"{name}, {prior} prior, sharpness {sharpness}: {share:.3f}")
    if only in (None, "differences"):
        for name, recalls in RECALLS.items():
            for gain, label in ((1.0, "equal"), (0.7, "unequal")):
                held, small = two_models(recalls, repeats, resamples, gain=gain)
                click.echo(f"difference of {label} models, {name} recalls: {held:.3f}; p < 0.05 in {small:.3f}")
        for seed_sd in (0.0, 0.03, 0.1):
            share = models_with_seeds(repeats, seed_sd=seed_sd)
            click.echo(f"difference over 3 seeds, seed spread {seed_sd:.2f}: {share:.3f}")
        for seed_sd, subset_sd, own_sd in ((1, 1, 0.3), (1, 1, 1), (0.3, 1, 1), (0, 0, 1)):
            share = crossed_pairs(repeats, seed_sd, subset_sd, own_sd)
            click.echo(f"3 seeds × 3 subset seeds, spreads {seed_sd}, {subset_sd} and {own_sd}: {share:.3f}")
    if only in (None, "curves"):
        for name in CURVES:
            shares = curve(name, repeats, resamples)
            click.echo(
                f"curve, {name}: " + ", ".join(f"{k} {v if v is None else f'{v:.3f}'}" for k, v in shares.items())
            )
    if only in (None, "variance"):
        mean, held = variance(repeats, resamples=resamples)
        click.echo("variance shares: " + ", ".join(f"{k} {held[k]:.3f} (mean {mean[k]:.3f})" for k in mean))


if __name__ == "__main__":
    main()
