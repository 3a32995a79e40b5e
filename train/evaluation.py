"""Evaluation: the logits of a whole split, and the end of a run: metrics, predictions and result.json."""

import functools
import json
import time
from collections.abc import Callable, Collection, Generator
from contextlib import closing
from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards import Loader, Selection
from shards.loader import Batch
from train import device as devices
from train import models
from train.checkpoint import Progress
from train.distributed import World
from train.graphed import Graphs
from train.loss import LOGITS_PRIOR
from train.metrics.calibration import probabilities
from train.metrics.run_metrics import evaluate
from train.metrics.scores import balanced_accuracy
from train.models import Classifier
from train.prepare import Run
from train.record import RESULT, WEIGHTS, RunFolder, write_predictions
from train.weights import write_weights


def logits_of(
    net: Classifier,
    loader: Loader,
    precision: str,
    world: World,
    between: Callable[[int], None],
    graphs: Graphs | None = None,
    tta: str = "none",
) -> np.ndarray | None:
    """The (N, classes) float32 logits of a whole split, in the order of its selection; None on ranks after the first.

    net: holds the weights to evaluate. It is not compiled, because an evaluation is too short for that. loader: of a
    whole split. between: called after each batch with the number of batches done. graphs: of the run, if they are on.
    tta: a key of `config.TTA`. Padded samples are dropped. Raises ValueError if a sample is missing or counted twice.
    """

    def forward(batch: Batch) -> tuple[Tensor, ...]:
        with torch.inference_mode(), devices.autocast(world.device, precision):
            return batch.samples, net.tested(batch.images, batch.colour, tta), batch.mask

    def of_batches() -> Generator[tuple[Tensor, ...], None, None]:
        with closing(iter(loader)) as batches:
            yield from map(forward, batches)

    world.same_buffers(net)
    was_training = net.training
    net.eval()
    parts = []
    try:
        with closing(of_batches() if graphs is None else graphs.outputs(loader, forward, f"{precision} {tta}")) as each:
            for number, part in enumerate(each, 1):
                parts.append(part)
                between(number)
    finally:
        net.train(was_training)
    # fetched once, at the end, so that the device never waits for the host before
    samples, logits, mask = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    ranks = world.gather((samples[mask], logits[mask]))
    if not ranks:
        return None
    samples, logits = (np.concatenate(parts) for parts in zip(*ranks, strict=True))
    order = np.argsort(samples, kind="stable")
    if not np.array_equal(samples[order], loader.selection.samples):
        raise ValueError(f"an evaluation of {len(loader.selection)} samples gave {len(samples)} answers or wrong ones")
    return logits[order]


# ------------------------------------------------------------------ the end of a run


def finish(
    run: Run,
    folder: RunFolder,
    progress: Progress,
    logits: dict[str, np.ndarray],
    unwanted: Collection[str],
) -> dict[str, Any]:
    """Write predictions.parquet, model.safetensors (if it is wanted) and, last, result.json; return its content.

    logits: `logits_of` test, and of val where there is one, in float32 whatever the training precision, so that anyone
    can repeat them.
    """
    began = time.perf_counter()
    config, classes = run.config, run.data.manifest.classes
    prior = "balanced" if config.sampler == "balanced" else LOGITS_PRIOR[config.loss]
    evaluated = [run.selections[split] for split in logits]
    val, test = run.selections.get("val"), run.selections["test"]
    lesions = {"val": 0} | {split: _lesions(selection) for split, selection in run.selections.items()}
    measured = functools.partial(
        evaluate,
        logits["test"],
        test.labels,
        None if lesions["test"] is None else test.lesion_ids,
        classes=classes,
        split=run.data.column("split")[test.samples],
        image_id=test.image_ids,
        logits_prior=prior,
        training_prior=run.class_counts,
        val_logits=logits.get("val"),
        val_labels=None if val is None else val.labels,
    )
    metrics = measured(prior=prior)
    at_training_prior = metrics if prior == "training" else measured(prior="training")
    progress.seconds["eval"] += time.perf_counter() - began
    began = time.perf_counter()
    temperature = used_temperature(metrics)
    priors = {"estimated": prior, "wanted": prior, "training_prior": run.class_counts}
    about = {"prior": prior, "temperature": repr(temperature)}
    shares = [probabilities(one, temperature, **priors) for one in logits.values()]
    write_predictions(folder.path, evaluated, list(logits.values()), shares, about)
    if WEIGHTS not in unwanted:
        write_weights(folder.path / WEIGHTS, run.step.reported.body, _metadata(run, prior, temperature))
    parameters, flops = models.cost(config.model, config.resolution, len(classes))
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
        "images": {"val": 0} | {split: len(selection) for split, selection in run.selections.items()},
        "lesions": lesions,
        "classes": asdict(classes),
        "training_images_per_class": dict(zip(classes.names, run.class_counts, strict=True)),
        "epochs": len(run.sizes),
        "steps": progress.step,
        "test": metrics,
        "test_training_prior": at_training_prior,
        "val": {"balanced_accuracy": None if val is None else balanced_accuracy(logits["val"], val.labels)},
        "train_loss": progress.loss,
        "weights": f"average with decay {config.ema}" if config.ema else "of the last step",
        "parameters": parameters,
        "flops_per_image": flops,
        "img_per_s": progress.images / progress.train_s,
        "data_wait_fraction": progress.wait_s / progress.train_s,
        **({"gpu_busy": fmean(run.busy)} if run.busy else {}),
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
    """Number of lesions that the images of a split show; None if the source does not name lesions."""
    if all(lesion is None for lesion in selection.data.column("group")[selection.samples]):
        return None
    return len(np.unique(selection.lesion_ids))


def used_temperature(metrics: dict[str, Any]) -> float:
    """What the logits are divided by before they become probabilities: the temperature that fits val best.

    It is 1 if the fit ends at its limit, and without a validation split. metrics: of `run_metrics.evaluate`.
    """
    fitted = metrics["temperature_scaling"]
    return 1.0 if fitted is None or fitted["at_limit"] else float(fitted["temperature"])


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _metadata(run: Run, prior: str, temperature: float) -> dict[str, str]:
    """What is needed to use model.safetensors alone, as text: safetensors keeps nothing else."""
    return {
        "model": run.config.model,
        "resolution": str(run.config.resolution),
        "classes": json.dumps(asdict(run.data.manifest.classes)),
        "mean": json.dumps(run.step.reported.head.mean.tolist()),
        "std": json.dumps(run.step.reported.head.std.tolist()),
        "encode": json.dumps(asdict(run.data.manifest.encode)),
        "eval_crop": repr(run.config.eval_crop),
        "tta": run.config.tta,
        "interpolation": run.loaders["test"].augment.interpolation,
        "logits_prior": prior,
        "temperature": repr(temperature),
        "training_images_per_class": json.dumps(run.class_counts),
    }
