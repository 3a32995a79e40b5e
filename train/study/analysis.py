"""The numbers of a study's report: learning curves, differences, variance shares, pooled tables, mistakes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shards.common.errors import DataError
from train.config import FORWARD_AND_BACKWARD, Config, pixel_share
from train.study.folder import LEAKAGE
from train.study.leakage import RESULT
from train.study.runs import Run, Study
from train.study.table import read_json

METRICS = ("balanced_accuracy", "macro_auc")
"""The metrics with learning curves, differences and variance shares; the first leads."""


@dataclass(frozen=True)
class Size:
    """One model's runs of one fraction: their number, and the mean, lowest and highest of their scores."""

    model: str
    fraction: float
    n: float
    runs: int
    mean: dict[str, float | None]
    low: dict[str, float | None]
    high: dict[str, float | None]
    train_s: float
    training_flops: float


@dataclass
class Analysis:
    """The numbers of a report. By metric, by model, or both; what could not be computed is missing and has a reason.

    curves[metric][model]: `curves.learning_curve`. differences: `differences.model_differences` at `compared_at`, with
    `p_holm` beside each p. variance[metric]: `variance.variance_shares`, or the reason for none as text. sizes: by
    model and rising fraction. leakage: what `train.leakage` measured in the study's folder `leakage`.
    """

    study: Study
    curves: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    differences: list[dict[str, Any]] = field(default_factory=list)
    compared_at: float | None = None
    no_differences: str = ""
    variance: dict[str, dict[str, Any] | str] = field(default_factory=dict)
    sizes: dict[str, list[Size]] = field(default_factory=dict)
    leakage: dict[str, Any] | None = None


def analyse(study: Study, *, resamples: int = 1000, at: Callable[[str, int, int], None] = lambda *_: None) -> Analysis:
    """Compute all of it. at: called with what is being computed, the steps done and the number of steps."""
    from train.study.curves import learning_curves
    from train.study.variance import variance_shares

    found = Analysis(study)
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
    at("differences between models", steps - 1, steps)
    _compare(found, resamples)
    found.sizes = {model: _sizes(study, model) for model in study.models}
    leakage = study.folder / LEAKAGE / RESULT
    found.leakage = read_json(leakage) if leakage.exists() else None
    return found


def _compare(found: Analysis, resamples: int) -> None:
    """Add the differences between models at the largest of the fractions that most models have."""
    from statsmodels.stats.multitest import multipletests

    from train.metrics.differences import model_differences

    study = found.study
    by_fraction: dict[float, dict[str, dict[tuple[int, int], Run]]] = {}
    for run in study.runs:
        by_fraction.setdefault(run.row["fraction"], {}).setdefault(run.row["model"], {})[run.key] = run
    if len(study.models) < 2:
        found.no_differences = "the study has one model"
        return
    fraction = max(by_fraction, key=lambda f: (len(by_fraction[f]), f))
    chosen = by_fraction[fraction]
    tested = {m: {k: r.tested() for k, r in chosen[m].items()} for m in study.models if m in chosen}
    found.differences = model_differences(tested, metrics=METRICS, resamples=resamples)
    found.compared_at = fraction
    if not found.differences:
        found.no_differences = "no two models were trained with the same seed on the same fraction"
    for metric in METRICS:
        cells = [pair["metrics"][metric] for pair in found.differences if pair["metrics"][metric]["p"] is not None]
        if cells:
            adjusted = multipletests([cell["p"] for cell in cells], method="holm")[1]
            for cell, p in zip(cells, np.asarray(adjusted).tolist(), strict=True):
                cell["p_holm"] = p


def _sizes(study: Study, model: str) -> list[Size]:
    sizes = []
    for fraction in sorted({run.row["fraction"] for run in study.of(model)}):
        runs = study.of(model, fraction)
        rows = [run.row for run in runs]
        known = {m: [row[m] for row in rows if row[m] is not None] for m in METRICS}
        sizes.append(
            Size(
                model=model,
                fraction=fraction,
                n=float(np.mean([row["n_train"] for row in rows])),
                runs=len(rows),
                mean={m: float(np.mean(v)) if v else None for m, v in known.items()},
                low={m: min(v) if v else None for m, v in known.items()},
                high={m: max(v) if v else None for m, v in known.items()},
                train_s=float(np.mean([row["train_s"] for row in rows])),
                training_flops=float(np.mean([training_flops(run) for run in runs])),
            )
        )
    return sizes


def training_flops(run: Run) -> float:
    """Floating point operations of a run's training: three forward passes per image, at the resolution of its epoch.

    The cost of a pass is proportional to its pixels: with a ramp of resolutions, the epochs' mean share of them counts.
    """
    row, full = run.row, run.config["resolution"]
    ramp = Config(row["model"], resolution=full, start_resolution=run.config.get("start_resolution"))
    images = row["steps"] * row["batch_size"]
    return FORWARD_AND_BACKWARD * row["flops_per_image"] * images * pixel_share(ramp, row["epochs"])


# ------------------------------------------------------------------ tables pooled over the seeds


def confusion(runs: list[Run]) -> tuple[list[str], np.ndarray]:
    """Classes, and counts (C, C) by true and called class, summed over the runs of one test set."""
    matrices = [run.result["test"]["confusion_matrix"] for run in runs]
    return list(matrices[0]["classes"]), np.sum([m["counts"] for m in matrices], axis=0)


def reliability(runs: list[Run], *, scaled: bool) -> list[dict[str, float]]:
    """Bins of confidence averaged over runs by their share: {"confidence", "accuracy", "low", "high", "share"}.

    scaled: after temperature scaling. low, high: the 95 % ends of the bin's accuracy, averaged in the same way. Empty
    bins are left out; the list is empty where no run has bins.
    """
    tables = [(run.result["test"]["temperature_scaling"] if scaled else run.result["test"]) for run in runs]
    bins = [table["reliability"] for table in tables if table is not None]
    found = []
    for same in zip(*bins, strict=True):
        full = [
            b for b in same if b["share"] and b["accuracy"]["value"] is not None and b["accuracy"]["low"] is not None
        ]
        if not full:
            continue
        weights = np.array([b["share"] for b in full])
        cell = {key: float(np.average([b["accuracy"][key] for b in full], weights=weights)) for key in ("low", "high")}
        cell["accuracy"] = float(np.average([b["accuracy"]["value"] for b in full], weights=weights))
        cell["confidence"] = float(np.average([b["confidence"] for b in full], weights=weights))
        cell["share"] = float(weights.sum() / len(bins))
        found.append(cell)
    return found


def recalls(study: Study, model: str, name: str) -> list[tuple[float, float, float, float]]:
    """(training images, mean, lowest, highest recall of a class over the seeds) for each fraction of a model."""
    found = []
    for fraction in sorted({run.row["fraction"] for run in study.of(model)}):
        runs = study.of(model, fraction)
        values = [run.result["test"]["per_class"][name]["recall"]["value"] for run in runs]
        values = [value for value in values if value is not None]
        if values:
            n = float(np.mean([run.row["n_train"] for run in runs]))
            found.append((n, float(np.mean(values)), min(values), max(values)))
    return found


def best_model(found: Analysis, metric: str = METRICS[0]) -> str:
    """The model with the highest mean at its largest fraction."""
    return max(found.study.models, key=lambda model: found.sizes[model][-1].mean[metric] or 0.0)


def mistakes(run: Run, count: int) -> list[dict[str, Any]]:
    """The wrong answers of a run on test images, most certain first: {"image_id", "true", "called", "probability"}."""
    table = run.predictions()
    test = table.loc[table["split"] == "test"]
    classes = list(run.result["training_images_per_class"])
    shares = test[[f"prob_{name}" for name in classes]].to_numpy(dtype=np.float64)
    labels = test["label"].to_numpy(dtype=np.int64)
    called = shares.argmax(axis=1)
    certainty = np.where(called == labels, -1.0, shares.max(axis=1))
    order = np.argsort(-certainty, kind="stable")[:count]
    ids = test["image_id"].tolist()
    return [
        {
            "image_id": ids[i],
            "true": classes[labels[i]],
            "called": classes[called[i]],
            "probability": float(certainty[i]),
        }
        for i in order
        if certainty[i] >= 0
    ]
