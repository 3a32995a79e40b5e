"""A made-up study folder: run folders in the format of `train.record`, from simulated answers of known skill."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from shards.format import HAM10000
from train.config import Config
from train.metrics.calibration import softmax
from train.metrics.differences import COMPARED
from train.metrics.run_metrics import evaluate
from train.study.cells import cell_name, seed_pairs
from train.study.folder import LEAKAGE
from train.study.leakage import RESULT

SHARES = np.array([0.033, 0.051, 0.11, 0.011, 0.111, 0.67, 0.014])
WHOLE = 5600
COST = {"alexnet": (57_032_519, 188e6), "resnet18": (11_180_103, 296e6), "resnet50": (23_522_375, 676e6)}
SKILL = {"alexnet": 1.4, "resnet18": 2.0, "resnet50": 2.6, "vit_b16": 1.1}


def skill(model: str, n: int) -> float:
    """How far the right logit stands above the others: grows with the size of the training set."""
    return SKILL.get(model, 1.8) * (1.6 - 3.0 * n**-0.25) + 0.4


def test_set(rng: np.random.Generator, lesions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, lesion names and image names; one or two images a lesion, at least four lesions a class."""
    counts = np.maximum((SHARES * lesions).round().astype(int), 4)
    of_lesion = np.repeat(np.arange(7), counts)
    views = rng.integers(1, 3, of_lesion.size)
    labels = np.repeat(of_lesion, views)
    names = np.repeat([f"LES_{i:04d}" for i in range(of_lesion.size)], views)
    return labels, names, np.array([f"IMG_{i:05d}" for i in range(labels.size)])


def answers(rng: np.random.Generator, labels: np.ndarray, ease: np.ndarray, strength: float) -> np.ndarray:
    """(N, 7) logits of a model; `ease` (N,) is shared by all models, so that they err on the same images."""
    logits = rng.normal(size=(labels.size, 7))
    logits[np.arange(labels.size), labels] += strength + ease
    return logits


def write_run(
    folder: Path,
    config: Config,
    n_train: int,
    test: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    resamples: int = 200,
    unit: str = "lesion",
    with_lesions: bool = True,
) -> dict[str, Any]:
    """Write one run folder; its result."""
    labels, lesions, images = test
    rng = np.random.default_rng(abs(hash_of(cell_name(config))))
    ease = np.random.default_rng(5).normal(size=labels.size) * 0.8
    logits = answers(rng, labels, ease, skill(config.model, n_train) + 0.1 * rng.normal())
    val = answers(rng, labels, ease, skill(config.model, n_train))
    counts = np.maximum((SHARES * n_train).round().astype(int), 1)
    metrics = evaluate(
        logits,
        labels,
        lesions if with_lesions else None,
        classes=HAM10000,
        split=np.full(labels.size, "test"),
        prior="balanced",
        logits_prior="balanced",
        training_prior=counts,
        val_logits=val,
        val_labels=labels,
        resamples=resamples,
    )
    parameters, flops = COST.get(config.model, (86_000_000, 2.8e9))
    steps = config.steps or config.epochs * (n_train // config.batch_size)
    train_s = steps * config.batch_size * flops / 2e11
    taken = {"engine": "native", "precision": "fp32", "threads": "2", "compile": "off"}
    decisions = {name: {"value": value, "reason": "made up"} for name, value in taken.items()}
    result = {
        "model": config.model,
        "fraction": config.fraction,
        "seed": config.seed,
        "subset_seed": config.subset_seed,
        "images": {"train": n_train, "val": int(labels.size), "test": int(labels.size)},
        "lesions": {"train": n_train, "val": len(set(lesions)), "test": len(set(lesions))},
        "training_images_per_class": dict(zip(HAM10000.names, counts.tolist(), strict=True)),
        "epochs": config.epochs,
        "steps": steps,
        "test": metrics,
        "val": {"balanced_accuracy": 0.5},
        "train_loss": 0.7,
        "parameters": parameters,
        "flops_per_image": int(flops),
        "img_per_s": 2e11 / flops * float(rng.uniform(0.9, 1.1)),
        "data_wait_fraction": float(rng.uniform(0.0, 0.03)),
        "seconds": {"train": train_s, "start": 2.0, "compile": 0.0, "eval": 3.0, "save": 0.2, "write": 0.3},
        "peak_memory_bytes": 1_200_000_000,
        "device": "made-up device",
        "decisions": decisions,
        "shard_set_sha256": "ab" * 32,
    }
    environment = {
        "platform": "Linux",
        "python": "3.11",
        "cores": 2,
        "device_name": "made-up device",
        "cuda": None,
        "versions": {"torch": "2.14.1", "dermscale": "0.1.0"},
        "shard_set": {
            "index_sha256": "ab" * 32,
            "split": {"ratio": [70, 10, 20], "seed": 0, "unit": unit},
            "source": {"dataset": "made-up"},
        },
        "world_size": 1,
        "decisions": decisions,
    }
    folder.mkdir(parents=True)
    for name, content in (("config", config.to_dict()), ("result", result), ("environment", environment)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    table = pd.DataFrame({"image_id": images, "lesion_id": lesions, "split": "test", "label": labels})
    if not with_lesions:
        table["lesion_id"] = None
    shares = softmax(logits)
    for c, name in enumerate(HAM10000.names):
        table[f"logit_{name}"], table[f"prob_{name}"] = logits[:, c], shares[:, c]
    table.to_parquet(folder / "predictions.parquet")
    return result


def hash_of(text: str) -> int:
    """A number that a name stands for, the same in every process."""
    return int.from_bytes(text.encode()[-8:], "little") + sum(text.encode())


def write_study(
    folder: Path,
    *,
    models: tuple[str, ...] = ("resnet18", "alexnet"),
    fractions: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0),
    seeds: tuple[int, ...] = (0, 1, 2),
    subset_seeds: tuple[int, ...] | None = None,
    lesions: int = 300,
    budget: str = "epochs",
    fail: tuple[str, ...] = (),
    **more: Any,
) -> Path:
    """Write a study of every combination. fail: names of cells that have failed instead."""
    test = test_set(np.random.default_rng(1), lesions)
    base = Config(model=models[0], epochs=12, resolution=64)
    settings = {"epochs": 12, "budget": budget, "shard_set": "ab" * 32, "split_unit": "lesion"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps({"version": 1, "settings": settings}))
    journal = []
    for model in models:
        for fraction in fractions:
            for seed, subset in seed_pairs(fraction, seeds, subset_seeds):
                config = replace(base, model=model, fraction=fraction, seed=seed, subset_seed=subset)
                name, n = cell_name(config), round(WHOLE * fraction) + subset
                entry = {"cell": name, "outcome": "finished", "wall_s": 20.0, "note": "", "error": ""}
                entry |= {"model": model, "fraction": fraction, "seed": seed, "subset_seed": subset, "n_train": n}
                if name in fail:
                    entry |= {"outcome": "failed", "error": "the loss is nan at step 3"}
                else:
                    write_run(folder / "cells" / name, config, n, test, **more)
                journal.append(json.dumps(entry))
    (folder / "grid.jsonl").write_text("\n".join(journal) + "\n")
    return folder


def made_leakage(*, every: float = 0.05, seen: float = 0.12, unseen: float = -0.01) -> dict[str, Any]:
    """What `train.leakage` would have measured: gains of all test images and of both kinds, −0.03 to +0.04 about."""

    def gain(value: float) -> dict[str, dict[str, Any]]:
        ends = {"value": value, "low": value - 0.03, "high": value + 0.04}
        cell = {"first": 0.6 + value, "second": 0.6, "difference": ends, "p": 0.01, "runs": 2}
        cell |= {"includes_seeds": True, "note": ""}
        return {metric: dict(cell) for metric in COMPARED}

    return {
        "model": "resnet18",
        "seeds": [0, 1],
        "training_images": 5000,
        "training_lesions": {"leaky": 4200, "apart": 3900},
        "test_images": {"all": 2000, "seen": 800, "unseen": 1200},
        "epochs": 12,
        "resolution_px": 64,
        "all": gain(every),
        "seen": gain(seen),
        "unseen": gain(unseen),
    }


def edit_results(out: Path, cells: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the results of a study's cells whose names match a pattern, in place."""
    for path in out.glob(f"cells/{cells}/result.json"):
        result = json.loads(path.read_text())
        change(result)
        path.write_text(json.dumps(result))


def write_leakage(study: Path) -> dict[str, Any]:
    """Write `made_leakage` into a study's folder; its content."""
    result = made_leakage()
    (study / LEAKAGE).mkdir()
    (study / LEAKAGE / RESULT).write_text(json.dumps(result))
    return result
