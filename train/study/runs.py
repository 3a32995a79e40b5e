"""Reading a study: the finished runs of a folder, with a check that they can be compared."""

import io
from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.common.cli import typed
from shards.common.errors import DataError, one_line
from shards.common.files import encoded
from shards.format import Classes, read_classes
from train.config import Config, completed
from train.record import CONFIG, ENVIRONMENT, PREDICTIONS, RESULT, read_result
from train.study.cells import EIGHT
from train.study.folder import CELLS, STUDY, read_journal, read_json, read_study
from train.study.table import failed_row, finished_row

if TYPE_CHECKING:
    import pandas as pd

    from train.metrics.differences import Tested


EQUAL = ("epochs", "steps", "resolution", "start_resolution", "loss", "sampler", "ema", "eval_crop", "tta")
"""Settings that must be equal in all runs of a report. What else a recipe sets depends on the model."""

MAY_DIFFER = {
    *("model", "fraction", "seed", "subset_seed", "batch_size", "lr"),
    *("data", "device", "precision", "memory_format", "compile", "engine", "sync_batch_norm", "threads"),
    *("checkpoint_s", "eval_epochs"),
}
"""Settings in which runs of one model that start alike, from random weights, given or frozen ones, may differ: what a
study varies, batch sizes and learning rates, which depend on the size of the training set, and what changes no result.
The data are compared by the hash of their index."""


@dataclass(frozen=True)
class Run:
    """One finished run: its folder, the content of its JSON files, and its row of results.csv."""

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]
    environment: dict[str, Any]
    row: dict[str, Any]

    @property
    def key(self) -> tuple[int, int]:
        """Its seed and subset seed: runs of two models with the same key are compared as a pair."""
        return self.row["seed"], self.row["subset_seed"]

    @property
    def classes(self) -> Classes:
        """The classes of its shard set."""
        return read_classes(self.result.get("classes", list(self.result["training_images_per_class"])))

    def predictions(self) -> "pd.DataFrame":
        """The table in predictions.parquet. Raises DataError if it cannot be read."""
        import pandas as pd

        path = self.folder / PREDICTIONS
        try:
            return pd.read_parquet(io.BytesIO(path.read_bytes()), use_threads=False)  # as in shards/shardset.py
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({one_line(error, 160)}); train this run again") from None

    def tested(self, images: Collection[str] | None = None) -> "Tested":
        """Its predictions on the test split, ready for a comparison. images: names of those to use; None: all."""
        from train.metrics.differences import tested

        test, table = self.result["test"], self.predictions()
        return tested(
            table if images is None else table.loc[table["image_id"].isin(list(images))],
            classes=self.classes,
            prior=test["prior"],
            logits_prior=test["logits_prior"],
            training_prior=list(self.result["training_images_per_class"].values()),
        )


@dataclass(frozen=True)
class Study:
    """The runs of one folder or several. folder: the first. settings: of its study.json, None for plain run folders and
    several folders. failed: rows of failed cells."""

    folder: Path
    settings: dict[str, Any] | None
    runs: list[Run]
    failed: list[dict[str, Any]]

    @cached_property
    def table(self) -> "pd.DataFrame":
        """One row per finished run, columns as in results.csv; sorted by model, fraction, seed and subset seed."""
        import pandas as pd

        return pd.DataFrame([run.row for run in self.runs])

    @cached_property
    def models(self) -> list[str]:
        """The models of the runs: the eight in their order, then others by name."""
        there = {run.row["model"] for run in self.runs}
        return [name for name in EIGHT if name in there] + sorted(there - set(EIGHT))

    def series(self, model: str) -> int:
        """The number of a model's marker, dashes and colour: the same in every report for each of the eight."""
        others = [name for name in self.models if name not in EIGHT]
        return EIGHT.index(model) if model in EIGHT else len(EIGHT) + others.index(model)


def read(folder: Path, *others: Path) -> Study:
    """The study, the folder of run folders, or the single run in each of the folders, as one study.

    Runs of one model that start from random weights, from given ones and with a frozen network are different models of
    the study: `resnet18`, `resnet18, fine-tuned` and `resnet18, frozen`. Raises DataError if a folder has none, if
    nothing is finished, if a file is damaged, or if the runs cannot be compared: they were tested on different shard
    sets or, without a grid, trained with different settings.
    """
    runs, lost, settings = [], [], None
    for one in (folder, *others):
        settings, found, failed = _read_folder(one)
        runs += found
        lost += failed
    sets = {run.result["shard_set_sha256"] for run in runs}
    if len(sets) > 1:
        raise DataError(
            f"{', '.join(map(str, (folder, *others)))}: the runs come from {len(sets)} different shard sets, so their "
            "test images differ; make one report per shard set"
        )
    if len({_start(run.config) for run in runs}) > 1:
        for run in runs:
            run.row["model"] += _start(run.config)
    if settings is None or others:  # the settings of a grid's cells are the same by construction
        settings = None
        _refuse_mixed(runs)
    order = {name: i for i, name in enumerate(EIGHT)}
    runs.sort(key=lambda r: (order.get(r.row["model"], len(order)), r.row["model"], r.row["fraction"], r.key))
    return Study(folder, settings, runs, lost)


def _start(config: dict[str, Any]) -> str:
    """What a model's name in a study gains if not all its runs start from random weights."""
    if config.get("freeze"):
        return ", frozen"
    return ", fine-tuned" if config.get("pretrained") or config.get("weights") else ""


def _read_folder(folder: Path) -> tuple[dict[str, Any] | None, list[Run], list[dict[str, Any]]]:
    """The settings of a folder's study, its finished runs, and the rows of its failed cells."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; make a study with `{typed('train.grid')} --out {folder}`")
    settings, journal = None, {}
    if (folder / STUDY).exists():
        settings, journal = read_study(folder)["settings"], read_journal(folder)
        parent = folder / CELLS
        paths = sorted(p for p in parent.iterdir() if (p / RESULT).exists()) if parent.is_dir() else []
    elif (folder / RESULT).exists():
        paths = [folder]
    else:
        paths = sorted(p.parent for p in folder.glob(f"*/{RESULT}"))
    runs = [read_run(path, journal.get(path.name)) for path in paths]
    done = {run.row["cell"] for run in runs}
    lost = [
        failed_row(entry) for entry in journal.values() if entry["outcome"] == "failed" and entry["cell"] not in done
    ]
    if not runs:
        what = f"all {len(lost)} cells failed, first with: {lost[0]['error']}" if lost else "no run is finished yet"
        raise DataError(f"{folder}: {what}; a report needs at least one finished run (result.json)")
    return settings, runs, lost


def _refuse_mixed(runs: list[Run]) -> None:
    """Raise DataError if run folders without a grid differ in other settings, or if two are the same cell."""
    cells: dict[tuple[Any, ...], Run] = {}
    of_model: dict[str, Run] = {}
    for run in runs:
        model = run.row["model"]
        for other in (runs[0], of_model.setdefault(model, run)):
            changed = _differences(other, run)
            if changed:
                raise DataError(
                    f"{other.folder} and {run.folder} were trained with different settings ({'; '.join(changed)}), so "
                    "they cannot be compared; report each on its own"
                )
        twin = cells.setdefault((model, run.row["fraction"], *run.key), run)
        if twin is not run:
            raise DataError(
                f"{twin.folder} and {run.folder} are both {model} on fraction {run.row['fraction']:g} with seed "
                f"{run.key[0]} and subset seed {run.key[1]}; a report takes only one, so move the other elsewhere"
            )


def _differences(one: Run, other: Run) -> list[str]:
    """The settings in which two runs must not differ but do: `epochs: 10, and 30`."""
    alike = one.row["model"] == other.row["model"]
    keys = [field.name for field in fields(Config) if field.name not in MAY_DIFFER] if alike else EQUAL
    first, second = ({key: completed(run.config).get(key) for key in keys} for run in (one, other))
    return [f"{key}: {first[key]}, and {second[key]}" for key in first if first[key] != second[key]]


def read_run(path: Path, entry: dict[str, Any] | None = None) -> Run:
    """A finished run. entry: the cell's last line of the journal. Raises DataError for a missing or damaged file."""
    config, result = read_json(path / CONFIG), read_result(path)
    if result is None:
        raise DataError(f"{path / RESULT}: missing; the run is not finished")
    try:
        row = finished_row(result, config, encoded(path.name).decode(), entry)  # tables hold UTF-8 alone
    except (KeyError, TypeError) as error:
        raise DataError(f"{path / RESULT}: written by another release (no {error}); train this run again") from None
    return Run(path, config, result, read_json(path / ENVIRONMENT), row)
