"""The numbers of a study's report: learning curves, differences, variance shares, pooled tables, mistakes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations, groupby, pairwise
from typing import Any, NamedTuple

import numpy as np

from shards.common.errors import DataError
from train.config import FORWARD_AND_BACKWARD, Config, pixel_share
from train.study.elsewhere import read_elsewhere
from train.study.folder import LEAKAGE, read_json
from train.study.leakage import RESULT
from train.study.runs import Run, Study

METRICS = ("balanced_accuracy", "macro_auc")
"""The metrics with learning curves, differences and variance shares; the first leads."""


class Score(NamedTuple):
    """A quantity of several runs: mean, lowest and highest."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Size:
    """One model's runs of one fraction."""

    model: str
    fraction: float
    runs: list[Run]

    @property
    def n(self) -> float:
        """Mean number of training images: subsets of one fraction differ by a few."""
        return float(np.mean([run.row["n_train"] for run in self.runs]))

    @property
    def training_flops(self) -> float:
        """Mean floating point operations of a run's training."""
        return float(np.mean([training_flops(run) for run in self.runs]))

    def score(self, column: str) -> Score | None:
        """A column of results.csv over the runs that have it; None if no run has it."""
        known = [run.row[column] for run in self.runs if run.row.get(column) is not None]
        return Score(float(np.mean(known)), min(known), max(known)) if known else None


@dataclass
class Analysis:
    """The numbers of a report. By metric, by model, or both; what could not be computed is missing and has a reason.

    sizes: by model and rising fraction. curves[metric][model]: `curves.learning_curve`. differences:
    `differences.model_differences` at the fraction `compared_at`, with `p_holm` beside each p. gaps[model][fraction]:
    the metrics of `model_differences` of a model minus the best one, both trained on that fraction. gains: those of
    that model minus itself on the next smaller fraction. variance[metric]:
    `variance.variance_shares`, or the reason for none as text. leakage: what `train.leakage` measured in the study's
    folder `leakage`. elsewhere: what `train.evaluate` found, in the folder `elsewhere` of the study or of a run.
    """

    study: Study
    sizes: dict[str, list[Size]]
    curves: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    differences: list[dict[str, Any]] = field(default_factory=list)
    compared_at: float | None = None
    gaps: dict[str, dict[float, dict[str, Any]]] = field(default_factory=dict)
    gains: dict[str, dict[float, dict[str, Any]]] = field(default_factory=dict)
    no_differences: str = ""
    variance: dict[str, dict[str, Any] | str] = field(default_factory=dict)
    leakage: dict[str, Any] | None = None
    elsewhere: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> Size:
        """The model with the highest mean at its largest fraction."""
        largest = [sizes[-1] for sizes in self.sizes.values()]
        return max(largest, key=lambda size: score.value if (score := size.score(METRICS[0])) else 0.0)

    def scores(self, model: str, column: str) -> list[tuple[Size, Score]]:
        """The sizes of a model that have a column of results.csv, with its mean, lowest and highest value."""
        return [(size, score) for size in self.sizes[model] if (score := size.score(column))]


def analyse(study: Study, *, resamples: int = 1000, at: Callable[[str, int, int], None] = lambda *_: None) -> Analysis:
    """Compute all of it. at: called with what is being computed, the steps done and the number of steps."""
    from train.study.curves import learning_curves
    from train.study.variance import variance_shares

    found = Analysis(study, {model: [] for model in study.models})
    for (model, fraction), runs in groupby(study.runs, key=lambda run: (run.row["model"], run.row["fraction"])):
        found.sizes[model].append(Size(model, fraction, list(runs)))
    steps = 2 * len(METRICS) + 1
    for number, metric in enumerate(METRICS):
        at("learning curves", 2 * number, steps)
        known = study.table.dropna(subset=[metric])
        found.curves[metric] = learning_curves(known, metric, resamples=resamples) if len(known) else {}
        at("variance shares", 2 * number + 1, steps)
        try:
            found.variance[metric] = variance_shares(study.table, metric, resamples=resamples)
        except DataError as error:
            found.variance[metric] = str(error)
    at("differences between models and between sizes", steps - 1, steps)
    _compare(found, resamples)
    leakage = study.folder / LEAKAGE / RESULT
    found.leakage = read_json(leakage) if leakage.exists() else None
    found.elsewhere = read_elsewhere([study.folder, *(run.folder for run in study.runs)])
    return found


def _compare(found: Analysis, resamples: int) -> None:
    """Add the differences between models and between sizes, all measured on the same resampled lesions.

    Every two models are compared at the largest of the fractions that most models have, and corrected for each other.
    """
    from statsmodels.stats.multitest import multipletests

    from train.metrics.differences import model_differences

    sizes = {(size.model, size.fraction): size for of_model in found.sizes.values() for size in of_model}
    shared = Counter(fraction for _, fraction in sizes)
    found.compared_at = at = max(shared, key=lambda fraction: (shared[fraction], fraction))
    best = found.best.model
    models = [((a, at), (b, at)) for a, b in combinations(found.sizes, 2) if (a, at) in sizes and (b, at) in sizes]
    gaps = [((model, of), (best, of)) for model, of in sizes if model != best and (best, of) in sizes]
    gains = [((a.model, b.fraction), (a.model, a.fraction)) for two in found.sizes.values() for a, b in pairwise(two)]
    tested = {size: {run.key: run.tested() for run in of.runs} for size, of in sizes.items()}
    pairs = dict.fromkeys([*models, *gaps, *gains])
    measured = {
        (pair["first"], pair["second"]): pair["metrics"]
        for pair in model_differences(tested, pairs=pairs, metrics=METRICS, resamples=resamples)
    }
    for kept, those in ((found.gaps, gaps), (found.gains, gains)):
        for (model, fraction), other in those:
            if cells := measured.get(((model, fraction), other)):
                kept.setdefault(model, {})[fraction] = cells
    found.differences = [
        {"first": a[0], "second": b[0], "metrics": measured[a, b]} for a, b in models if (a, b) in measured
    ]
    if len(found.sizes) < 2:
        found.no_differences = "the study has one model"
    elif not found.differences:
        found.no_differences = "no two models were trained with the same seed on the same fraction"
    for metric in METRICS:
        cells = [pair["metrics"][metric] for pair in found.differences if pair["metrics"][metric]["p"] is not None]
        if cells:
            adjusted = multipletests([cell["p"] for cell in cells], method="holm")[1]
            for cell, p in zip(cells, np.asarray(adjusted).tolist(), strict=True):
                cell["p_holm"] = p


def significant(cell: dict[str, Any]) -> bool:
    """Whether a difference is clear among all that were tested: p under 0.05 after Holm's correction."""
    p = cell.get("p_holm")
    return p is not None and p < 0.05


def training_flops(run: Run) -> float:
    """Floating point operations of a run's training: three forward passes per image, at the resolution of its epoch.

    The cost of a pass is proportional to its pixels: with a ramp of resolutions, the epochs' mean share of them counts.
    """
    row, full = run.row, run.config["resolution"]
    ramp = Config(row["model"], resolution=full, start_resolution=run.config.get("start_resolution"))
    images = row["steps"] * row["batch_size"]
    passes = 1 if run.config.get("freeze") else FORWARD_AND_BACKWARD
    return passes * row["flops_per_image"] * images * pixel_share(ramp, row["epochs"])


# ------------------------------------------------------------------ tables pooled over the seeds


def confusion(runs: list[Run]) -> tuple[list[str], np.ndarray]:
    """Classes, and counts (C, C) by true and called class, summed over the runs of one test set."""
    matrices = [run.result["test"]["confusion_matrix"] for run in runs]
    classes = list(matrices[0]["classes"])
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for matrix in matrices:
        if "counts" in matrix:
            counts += matrix["counts"]
        else:  # of many classes
            true, called, images = np.array(matrix["pairs"], dtype=np.int64).T
            np.add.at(counts, (true, called), images)
    return classes, counts


_POOLED = {"confidence": "confidence", "accuracy": "value", "low": "low", "high": "high"}
"""What is averaged of a bin, and where its numbers are."""


def reliability(runs: list[Run], *, scaled: bool) -> list[dict[str, float]]:
    """Bins of confidence averaged over runs by their share: {"confidence", "accuracy", "low", "high", "share"}.

    scaled: after temperature scaling. low, high: the 95 % ends of the bin's accuracy, averaged in the same way. Empty
    bins are left out; the list is empty where no run has bins.
    """
    tables = [run.result["test"]["temperature_scaling"] if scaled else run.result["test"] for run in runs]
    bins = [table["reliability"] for table in tables if table is not None]
    found = []
    for same in zip(*bins, strict=True):
        full = [{**b, **b["accuracy"]} for b in same if b["share"] and b["accuracy"]["low"] is not None]
        if full:
            shares = [b["share"] for b in full]
            means = {name: np.average([b[key] for b in full], weights=shares) for name, key in _POOLED.items()}
            found.append({name: float(mean) for name, mean in means.items()} | {"share": sum(shares) / len(bins)})
    return found


def mistakes(run: Run, count: int) -> list[dict[str, Any]]:
    """The wrong answers of a run on test images, most certain first: {"image_id", "true", "called", "probability"}."""
    import pandas as pd

    table = run.predictions()
    test = table.loc[table["split"] == "test"]
    classes = np.array(list(run.result["training_images_per_class"]))
    shares = test[[f"prob_{name}" for name in classes]].to_numpy(dtype=np.float64)
    found = pd.DataFrame(
        {
            "image_id": test["image_id"].to_numpy(),
            "true": classes[test["label"].to_numpy(dtype=np.int64)],
            "called": classes[shares.argmax(axis=1)],
            "probability": shares.max(axis=1),
        }
    )
    wrong = found.loc[found["true"] != found["called"]].sort_values(by="probability", ascending=False, kind="stable")
    return [{str(name): value for name, value in row.items()} for row in wrong.head(count).to_dict("records")]
