"""results.csv: the table of a study, one row per cell that finished or failed."""

import csv
import io
from pathlib import Path
from typing import Any

from shards.common.files import encoded, write_durably
from train.record import CONFIG, read_result
from train.study.folder import CELLS, read_journal, read_json

RESULTS = "results.csv"
FIRST = ("cell", "status", "model", "fraction", "seed", "subset_seed", "n_train")
"""The first columns, which identify a cell. The others follow in the order of their first appearance."""

AT_TRAINING_PRIOR = ("accuracy", "macro_f1", "expected_calibration_error")
"""Metrics that the table also has at the training prior, which is that of plain cross-entropy."""


def finished_row(
    result: dict[str, Any], config: dict[str, Any], name: str, entry: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The row of a finished cell from its result.json and config.json, and its journal entry where a grid trained it.

    Every metric as `name`, `name_low`, `name_high` (95 %), per class as `recall_mel` …; `_s` seconds, `_bytes` bytes.
    `accuracy_training_prior` …: at the class frequencies of the training set, if the run's own prior is another one.
    """
    from train.metrics.run_metrics import flatten

    decisions = {key: taken["value"] for key, taken in result["decisions"].items()}
    scaling = result["test"]["temperature_scaling"]
    other = result.get("test_training_prior")
    other = flatten(other) if other and result["test"]["prior"] != "training" else {}
    return {
        "cell": name,
        "status": "finished",
        "model": result["model"],
        "fraction": result["fraction"],
        "seed": result["seed"],
        "subset_seed": result["subset_seed"],
        "n_train": result["images"]["train"],
        "lesions_train": result["lesions"]["train"],
        "n_val": result["images"]["val"],
        "n_test": result["images"]["test"],
        "resolution_px": config["resolution"],
        "batch_size": config["batch_size"],
        "epochs": result["epochs"],
        "steps": result["steps"],
        "parameters": result["parameters"],
        "flops_per_image": result["flops_per_image"],
        **flatten(result["test"]),
        **{
            f"{name}_training_prior{end}": other[f"{name}{end}"]
            for name in AT_TRAINING_PRIOR
            for end in ("", "_low", "_high")
            if other
        },
        "prior": result["test"]["prior"],
        "temperature": scaling["temperature"] if scaling else None,
        "val_balanced_accuracy": result["val"]["balanced_accuracy"],
        "train_loss": result["train_loss"],
        **{f"{phase}_s": seconds for phase, seconds in result["seconds"].items()},
        "img_per_s": result["img_per_s"],
        "data_wait_fraction": result["data_wait_fraction"],
        "gpu_busy": result.get("gpu_busy"),
        "peak_memory_bytes": result["peak_memory_bytes"],
        "device": result["device"],
        **{key: decisions.get(key) for key in ("compile", "engine", "precision", "threads")},
        "per_device": decisions.get("per_device", "1"),
        "wall_s": entry.get("wall_s") if entry else None,
        "note": entry.get("note", "") if entry else "",
        "error": "",
    }


def failed_row(entry: dict[str, Any]) -> dict[str, Any]:
    """The row of a failed cell from its journal entry."""
    known = ("model", "fraction", "seed", "subset_seed", "n_train", "batch_size", "wall_s", "note", "error")
    return {"cell": entry["cell"], "status": "failed", **{key: entry.get(key) for key in known}}


def read_row(folder: Path, name: str, entry: dict[str, Any] | None) -> dict[str, Any] | None:
    """The row of one cell of the study in `folder`; None if it neither finished nor failed.

    entry: its last journal entry. Raises DataError for a damaged file.
    """
    run = folder / CELLS / name
    result = read_result(run)
    if result is not None:
        return finished_row(result, read_json(run / CONFIG), name, entry)
    if entry is not None and entry.get("outcome") == "failed":
        return failed_row(entry)
    return None


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of a study by the name of the cell, sorted. Raises DataError for a damaged run folder."""
    journal = read_journal(folder)
    names = {path.name for path in (folder / CELLS).iterdir() if path.is_dir()} if (folder / CELLS).is_dir() else set()
    found = {name: read_row(folder, name, journal.get(name)) for name in sorted(names | set(journal))}
    return {name: row for name, row in found.items() if row is not None}


def write_table(folder: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Write results.csv, sorted by model, descending fraction, seed and subset seed. Unknown values are empty."""
    columns = list(FIRST)
    for row in sorted(rows.values(), key=lambda row: row["status"] != "finished"):
        columns += [key for key in row if key not in columns]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    keys = {
        name: (str(row["model"]), -(row["fraction"] or 0.0), row["seed"] or 0, row["subset_seed"] or 0, name)
        for name, row in rows.items()
    }
    table.writerows(rows[name] for name in sorted(rows, key=lambda name: keys[name]))
    write_durably(folder / RESULTS, encoded(text.getvalue()))
