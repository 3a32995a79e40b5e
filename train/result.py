"""The end of a run: the metrics of its last weights, its predictions, and result.json."""

import functools
import json
import time
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import numpy as np

from shards import Selection
from shards.format import CLASSES
from train import device as devices
from train import models
from train.checkpoint import Progress
from train.evaluation import Answers
from train.loss import LOGITS_PRIOR
from train.metrics.calibration import at_prior, softmax
from train.metrics.summary import balanced_accuracy, evaluate
from train.prepare import Run
from train.record import RESULT, WEIGHTS, RunFolder, write_predictions
from train.weights import write_weights


def finish(
    run: Run, folder: RunFolder, progress: Progress, found: dict[str, Answers | None], unwanted: Collection[str]
) -> dict[str, Any]:
    """Write model.safetensors (unless it is unwanted), predictions.parquet and, last, result.json; return its content.

    found: answers on `val` and `test`, in float32 whatever the training precision, so that anyone can repeat them.
    """
    began = time.perf_counter()
    config, prior = run.config, LOGITS_PRIOR[run.config.loss]
    parts = {split: one for split, one in found.items() if one is not None}
    labels = {split: run.selections[split].labels for split in parts}
    test, rows = run.selections["test"], parts["test"].samples
    lesions = {split: _lesions(selection) for split, selection in run.selections.items()}
    measured = functools.partial(
        evaluate,
        parts["test"].logits,
        labels["test"],
        None if lesions["test"] is None else test.lesion_ids,
        split=run.data.column("split")[rows],
        image_id=test.image_ids,
        logits_prior=prior,
        training_prior=run.class_counts,
        val_logits=parts["val"].logits,
        val_labels=labels["val"],
    )
    metrics = measured(prior=prior)
    at_training_prior = metrics if prior == "training" else measured(prior="training")
    progress.seconds["eval"] += time.perf_counter() - began
    began = time.perf_counter()
    temperature = used_temperature(metrics)
    shares = {
        split: softmax(
            at_prior(one.logits, estimated=prior, wanted=prior, training_prior=run.class_counts) / temperature
        )
        for split, one in parts.items()
    }
    about = {"prior": prior, "temperature": repr(temperature)}
    write_predictions(folder.path, run.data, {s: (one.samples, one.logits) for s, one in parts.items()}, shares, about)
    if WEIGHTS not in unwanted:
        write_weights(folder.path / WEIGHTS, run.step.reported.body, _metadata(run, prior, temperature))
    parameters, flops = models.cost(config.model, config.resolution, len(CLASSES))
    score = metrics["balanced_accuracy"]
    seconds = {"train": progress.train_s, **progress.seconds, "write": time.perf_counter() - began}
    result = {
        "summary": (
            f"test: balanced accuracy {_number(score['value'])} "
            f"(95 % interval {_number(score['low'])} to {_number(score['high'])}), "
            f"macro AUC {_number(metrics['macro_auc']['value'])}, {len(test)} images; "
            f"{sum(seconds.values()):.0f} s in all; {folder.path}"
        ),
        "model": config.model,
        "fraction": config.fraction,
        "seed": config.seed,
        "subset_seed": config.subset_seed,
        "images": {split: len(selection) for split, selection in run.selections.items()},
        "lesions": lesions,
        "training_images_per_class": dict(zip(CLASSES, run.class_counts, strict=True)),
        "epochs": len(run.sizes),
        "steps": progress.step,
        "test": metrics,
        "test_training_prior": at_training_prior,
        "val": {"balanced_accuracy": balanced_accuracy(parts["val"].logits, labels["val"])},
        "train_loss": progress.loss,
        "weights": f"average with decay {config.ema}" if config.ema else "of the last step",
        "parameters": parameters,
        "flops_per_image": flops,
        "img_per_s": progress.images / progress.train_s,
        "data_wait_fraction": progress.wait_s / progress.train_s,
        "seconds": seconds,
        "peak_memory_bytes": devices.peak_memory_bytes(run.world.device),
        "device": devices.describe(run.world.device),
        "world_size": run.world.size,
        "decisions": {name: asdict(taken) for name, taken in run.decisions.items()},
        "shard_set_sha256": run.data.manifest.index_sha256,
    }
    folder.write(RESULT, result)
    return result


def _lesions(selection: Selection) -> int | None:
    """How many lesions the images of a split are of; None where the source names none."""
    if all(lesion is None for lesion in selection.data.column("lesion_id")[selection.samples]):
        return None
    return len(np.unique(selection.lesion_ids))


def used_temperature(metrics: dict[str, Any]) -> float:
    """What the logits of predictions are divided by: the temperature that fits val best; 1 where val cannot tell one.

    metrics: of `metrics.evaluate` with val logits.
    """
    fitted = metrics["temperature_scaling"]
    return 1.0 if fitted["at_limit"] else float(fitted["temperature"])


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _metadata(run: Run, prior: str, temperature: float) -> dict[str, str]:
    """What someone who has model.safetensors alone needs to use it; safetensors keeps text only."""
    return {
        "model": run.config.model,
        "resolution": str(run.config.resolution),
        "classes": json.dumps(CLASSES),
        "mean": json.dumps(run.step.reported.head.mean.tolist()),
        "std": json.dumps(run.step.reported.head.std.tolist()),
        "encode": json.dumps(asdict(run.data.manifest.encode)),
        "eval_crop": repr(run.loaders["test"].augment.eval_crop),
        "logits_prior": prior,
        "temperature": repr(temperature),
        "training_images_per_class": json.dumps(run.class_counts),
    }
