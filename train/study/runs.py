"""A study as it is read back: the finished runs of a folder, checked to belong together."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.common.errors import DataError, one_line
from train.record import CONFIG, ENVIRONMENT, PREDICTIONS, RESULT
from train.study.cells import EIGHT
from train.study.folder import CELLS, STUDY, read_journal, read_study
from train.study.table import failed, finished, read_json

if TYPE_CHECKING:
    import pandas as pd

    from train.metrics.differences import Tested


ALIKE = ("epochs", "steps", "resolution", "start_resolution", "loss", "pretrained", "ema")
"""Settings that change what is learnt, by which runs that a report pools may not differ. Learning rates and batch sizes
are not among them: they follow the model and the size of the training set."""


@dataclass(frozen=True)
class Run:
    """One finished run: its folder, what its JSON files hold, and its row of results.csv."""

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]
    environment: dict[str, Any]
    row: dict[str, Any]

    @property
    def key(self) -> tuple[int, int]:
        """What pairs it with a run of another model: its seed and subset seed."""
        return self.row["seed"], self.row["subset_seed"]

    def predictions(self) -> "pd.DataFrame":
        """The table of its predictions.parquet. Raises DataError where it cannot be read."""
        import pandas as pd

        path = self.folder / PREDICTIONS
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({one_line(error, 160)}); train this run again") from None

    def tested(self) -> "Tested":
        """Its answers on the test split, ready to be compared."""
        from train.metrics.differences import tested

        test = self.result["test"]
        counts = self.result["training_images_per_class"]
        return tested(
            self.predictions(),
            prior=test["prior"],
            logits_prior=test["logits_prior"],
            training_prior=list(counts.values()),
        )


@dataclass(frozen=True)
class Study:
    """The runs of a folder. settings: of study.json, None for plain run folders. failed: rows of failed cells."""

    folder: Path
    settings: dict[str, Any] | None
    runs: list[Run]
    failed: list[dict[str, Any]]

    @cached_property
    def table(self) -> "pd.DataFrame":
        """One row a finished run, the columns of results.csv; sorted by model, fraction, seed and subset seed."""
        import pandas as pd

        return pd.DataFrame([run.row for run in self.runs])

    @cached_property
    def models(self) -> list[str]:
        """The models of the runs: the eight in their order, then others by name."""
        there = {run.row["model"] for run in self.runs}
        return [name for name in EIGHT if name in there] + sorted(there - set(EIGHT))

    def series(self, model: str) -> int:
        """Which marker, dashes and colour stand for a model: the same for each of the eight in every report."""
        others = [name for name in self.models if name not in EIGHT]
        return EIGHT.index(model) if model in EIGHT else len(EIGHT) + others.index(model)

    def of(self, model: str, fraction: float | None = None) -> list[Run]:
        """The runs of a model, of one fraction where it is named."""
        return [r for r in self.runs if r.row["model"] == model and fraction in (None, r.row["fraction"])]

    def largest(self, model: str) -> float:
        """The largest fraction that a model was trained on."""
        return max(run.row["fraction"] for run in self.of(model))


def read(folder: Path) -> Study:
    """The study, the folder of run folders, or the single run in `folder`.

    Raises DataError where there is none, where nothing is finished, where a file is damaged, or where the runs cannot
    stand beside each other: tested on different shard sets, or, without a grid, trained with different settings.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; make a study with `python -m train.grid --out {folder}`")
    settings, journal = None, {}
    if (folder / STUDY).exists():
        settings, journal = read_study(folder)["settings"], read_journal(folder)
        parent = folder / CELLS
        paths = sorted(p for p in parent.iterdir() if (p / RESULT).exists()) if parent.is_dir() else []
    elif (folder / RESULT).exists():
        paths = [folder]
    else:
        paths = sorted(p.parent for p in folder.glob(f"*/{RESULT}"))
    runs = [_run(path, journal.get(path.name)) for path in paths]
    done = {run.row["cell"] for run in runs}
    lost = [failed(entry) for entry in journal.values() if entry["outcome"] == "failed" and entry["cell"] not in done]
    if not runs:
        what = f"all {len(lost)} cells failed, first with: {lost[0]['error']}" if lost else "no run is finished yet"
        raise DataError(f"{folder}: {what}; a report needs at least one finished run (result.json)")
    sets = {run.result["shard_set_sha256"] for run in runs}
    if len(sets) > 1:
        raise DataError(
            f"{folder}: its runs come from {len(sets)} different shard sets, so their test images differ; "
            "report the runs of each set apart"
        )
    if settings is None:  # a grid's settings differ only where its options say so
        _refuse_mixed(folder, runs)
    order = {name: i for i, name in enumerate(EIGHT)}
    runs.sort(key=lambda r: (order.get(r.row["model"], len(order)), r.row["model"], r.row["fraction"], r.key))
    return Study(folder, settings, runs, lost)


def _refuse_mixed(folder: Path, runs: list[Run]) -> None:
    """Raise DataError unless plain run folders differ only in what a report compares: no two may be the same cell."""
    cells: dict[tuple[Any, ...], Run] = {}
    of_model: dict[str, Run] = {}
    for run in runs:
        model, name = run.row["model"], run.folder.name
        for other in (runs[0], of_model.setdefault(model, run)):
            apart = _apart(other, run)
            if apart:
                raise DataError(
                    f"{folder}: {other.folder.name} and {name} were trained with different settings "
                    f"({'; '.join(apart)}), so they are no repeats of each other; report them apart, from two folders"
                )
        twin = cells.setdefault((model, run.row["fraction"], *run.key), run)
        if twin is not run:
            raise DataError(
                f"{folder}: {twin.folder.name} and {name} are both {model} on fraction {run.row['fraction']:g} with "
                f"seed {run.key[0]} and subset seed {run.key[1]}; a report takes one, so move the other elsewhere"
            )


def _apart(one: Run, other: Run) -> list[str]:
    """The settings by which two runs learn differently, model, fraction and seeds aside: `epochs: 10, and 30`."""
    settings = [{key: run.config.get(key) for key in (*ALIKE, "weights")} for run in (one, other)]
    if one.row["model"] != other.row["model"]:  # each model has a file of its own
        settings = [known | {"weights": "of a file" if known["weights"] else None} for known in settings]
    mine, theirs = settings
    return [f"{key}: {mine[key]}, and {theirs[key]}" for key in mine if mine[key] != theirs[key]]


def _run(path: Path, entry: dict[str, Any] | None) -> Run:
    config, result = read_json(path / CONFIG), read_json(path / RESULT)
    try:
        row = finished(result, config, path.name)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path / RESULT}: of another release (no {error}); train this run again") from None
    if entry is not None:
        row |= {"wall_s": entry.get("wall_s"), "note": entry.get("note", "")}
    return Run(path, config, result, read_json(path / ENVIRONMENT), row)
