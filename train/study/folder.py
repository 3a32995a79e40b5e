"""The folder of a study: settings, a run folder per cell, a journal, and results.csv.

study.json    what all cells share                results.csv   one row per cell that finished or failed
cells/NAME/   one run folder per cell             grid.jsonl    the journal: one line each time a cell ended
logs/         everything that workers and libraries printed
"""

import json
import os
import shutil
from collections.abc import Collection
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from shards.common.cli import typed
from shards.common.errors import DataError, UsageError
from shards.common.files import encoded, full_disk_names, lock, write_durably
from train.config import completed
from train.study.cells import Cell

STUDY, JOURNAL, CELLS, LOGS = "study.json", "grid.jsonl", "cells", "logs"
LEAKAGE = "leakage"
"""Subfolder with the study of train.leakage, which may exist before the study of the folder itself."""
VERSION = 1
PACKED = "packed"
"""Key of the settings: normalisation and encoding of the shard set. Studies of older releases lack it."""
SHARING = "sharing"
"""Key of study.json: how many cells share a device (`train/study/sharing.py`). Studies of older releases lack it."""
UNWANTED = {"all": (), "weights": ("checkpoint.pt",), "results": ("checkpoint.pt", "model.safetensors")}
"""Files that are deleted from a finished cell, by the value of `--keep`. A checkpoint holds the optimizer's state too,
and is two to three times as large as the weights."""
_TRAINED = ("result.json", "checkpoint.pt")
"""Files that show that a cell was trained. While no cell has one, the settings of a study can still be changed."""


def read_study(folder: Path) -> dict[str, Any]:
    """The settings of a study. Raises DataError if they are missing or damaged."""
    path = folder / STUDY
    if not path.exists():
        raise DataError(f"{folder}: not a study (no {STUDY}); make one with `{typed('train.grid')} --out {folder}`")
    study = read_json(path, "start the study in another folder")
    if study.get("version") != VERSION:
        raise DataError(f"{path}: written by another release; start the study in another folder")
    return study


def read_json(path: Path, advice: str = "") -> dict[str, Any]:
    """A JSON object of a study. Raises DataError with what to do if it is missing or damaged."""
    advice = advice or f"delete the folder {path.parent} and run the grid again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: missing; {advice}") from None
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); {advice}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: damaged (not a JSON object); {advice}")
    return content


def read_journal(folder: Path) -> dict[str, dict[str, Any]]:
    """The last journal entry of each cell, by its name (see `StudyFolder.ended`). A truncated line is skipped."""
    path = folder / JOURNAL
    last: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return last
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            last[entry["cell"]] = entry
        except (ValueError, KeyError, TypeError):
            continue  # the machine stopped while it wrote this line
    return last


def _settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the study in a folder, None if it is empty. Raises DataError if it holds anything else."""
    held = folder.is_dir() and any(e.name != LEAKAGE and not e.name.startswith(".") for e in folder.iterdir())
    return read_study(folder)["settings"] if held else None


def _holds_training(folder: Path) -> bool:
    """Whether any cell of a study has finished or has a checkpoint."""
    return any(True for name in _TRAINED for _ in folder.glob(f"{CELLS}/*/{name}"))


class StudyFolder:
    """A study that is running. A context manager that holds the lock of the folder."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Create the folder, or open one that has the same settings.

        If nothing was trained yet, the new settings replace the old ones and the failed cells are deleted. So a
        mistyped option that made them all fail can be corrected. Raises UsageError with the difference if cells were
        trained with other settings, DataError if the folder is in use or holds something else.
        """
        self.path = path
        if path.exists() and not path.is_dir():
            raise DataError(f"{path}: is a file; choose a folder with --out")
        _settings_of(path)  # before anything is written into a folder that holds something else
        path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as undone:
            self._lock: IO[bytes] = undone.enter_context((path / ".lock").open("wb"))
            lock(self._lock, path, "another grid is running here; wait for it or choose another --out")
            self._apply(settings)
            self._journal = (path / JOURNAL).open("ab")
            undone.pop_all()
        if self._journal.tell() and (path / JOURNAL).read_bytes()[-1:] != b"\n":
            self._journal.write(b"\n")  # after a truncated line

    def _apply(self, settings: dict[str, Any]) -> None:
        """Write the settings, unless training with other settings would be lost.

        Needs the lock: otherwise another grid may write its settings at the same time, or train the deleted cells.
        """
        before = _settings_of(self.path)
        old = settings if before is None else before
        # what studies of older releases lack; they normalised by the data also if a file of weights was given
        had = {name: value for name, value in completed(old).items() if settings.get(name) is not None}
        normalize = "data" if old.get("weights") else "auto"
        old = {PACKED: settings.get(PACKED)} | had | {"normalize": normalize} | old
        changed = [f"{k}: {old.get(k)}, now {v}" for k, v in settings.items() if old.get(k) != v]
        if changed and _holds_training(self.path):
            raise UsageError(
                f"{self.path}: this study was started with other settings ({'; '.join(changed)}); keep them, or choose "
                "another --out"
            )
        if changed:
            self._delete_cells()
        if changed or before is None:
            self._write({"version": VERSION, "settings": settings})

    def _write(self, study: dict[str, Any]) -> None:
        write_durably(self.path / STUDY, encoded(json.dumps(study, indent=2, ensure_ascii=False)) + b"\n")

    def __enter__(self) -> "StudyFolder":
        """Enter the context."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Release the folder."""
        self._journal.close()
        self._lock.close()

    def _delete_cells(self) -> None:
        """Delete the journal and the folders of failed cells, which hold the old settings.

        The workers of a grid that was killed train until their next step. If one writes a checkpoint now, it is deleted
        with its folder, or fails because the folder is gone. If a new file of theirs makes the deletion fail, this
        raises OSError, and the next start deletes the rest. The lock of a run folder protects a cell that is trained
        again with the same settings.
        """
        if (self.path / CELLS).is_dir():
            shutil.rmtree(self.path / CELLS)
        (self.path / JOURNAL).unlink(missing_ok=True)

    def sharing(self) -> dict[str, Any] | None:
        """What `record_sharing` wrote, empty if an older release trained the study; None if nothing was trained yet."""
        return read_study(self.path).get(SHARING, {}) if _holds_training(self.path) else None

    def record_sharing(self, sharing: dict[str, Any]) -> None:
        """Write how the cells share devices into study.json."""
        self._write(read_study(self.path) | {SHARING: sharing})

    def cell(self, name: str) -> Path:
        """The run folder of a cell."""
        return self.path / CELLS / name

    def log(self, worker: str) -> Path:
        """The log of a worker: everything that it and its libraries print."""
        return self.path / LOGS / f"{worker}.log"

    def ended(
        self, cell: Cell, outcome: str, error: str, wall_s: float, unwanted: Collection[str] = ()
    ) -> dict[str, Any]:
        """Write how a cell ended to the journal; returns the entry. wall_s: seconds since it was given to a worker.

        unwanted: files of a finished cell, which are deleted first: a cell without an entry is looked at again.
        """
        config = cell.config
        for name in unwanted if outcome == "finished" else ():
            (self.cell(cell.name) / name).unlink(missing_ok=True)
        entry = {
            "cell": cell.name,
            "outcome": outcome,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": config.model,
            "fraction": config.fraction,
            "seed": config.seed,
            "subset_seed": config.subset_seed,
            "batch_size": config.batch_size,
            "n_train": cell.n_train,
            "wall_s": wall_s,
            "note": cell.note,
            "error": error,
        }
        with full_disk_names(self.path / JOURNAL):
            self._journal.write(encoded(json.dumps(entry, ensure_ascii=False)) + b"\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())
        return entry
