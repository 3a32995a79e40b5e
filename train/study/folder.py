"""The folder of a study: its settings, the run folder of each cell, what happened to them, and results.csv.

study.json    settings that all cells share       results.csv   one row a cell that finished or failed
cells/NAME/   one run folder a cell               grid.jsonl    one line each time a cell ended
logs/         what workers and libraries printed
"""

import json
import os
import shutil
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from shards.common.errors import DataError, UsageError
from shards.common.files import lock, write_durably
from train.study.cells import Cell

STUDY, JOURNAL, CELLS, LOGS = "study.json", "grid.jsonl", "cells", "logs"
LEAKAGE = "leakage"
"""A study of its own inside (see train.leakage), which may be there before the folder's own."""
VERSION = 1
_WORTH_KEEPING = ("result.json", "checkpoint.pt")
"""Files of a cell that hold training: where no cell has one, a study has nothing that other settings would spoil."""


def read_study(folder: Path) -> dict[str, Any]:
    """The settings of a study. Raises DataError where the folder holds none, or a damaged file."""
    path = folder / STUDY
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; make a study with `python -m train.grid --out {folder}`")
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{folder}: not a study (no {STUDY}); make one with `python -m train.grid --out {folder}`"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); start the study in another folder") from None
    if not isinstance(study, dict) or study.get("version") != VERSION:
        raise DataError(f"{path}: of another release; start the study in another folder")
    return study


def read_journal(folder: Path) -> dict[str, dict[str, Any]]:
    """How each cell ended last, by its name (see `StudyFolder.ended`). A line cut short is left out."""
    path = folder / JOURNAL
    last: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return last
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            last[entry["cell"]] = entry
        except (ValueError, KeyError, TypeError):
            continue  # the machine stopped while this line was written
    return last


def _settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the study in a folder, None where it holds nothing. Raises DataError where it is no study."""
    held = folder.is_dir() and any(e.name != LEAKAGE and not e.name.startswith(".") for e in folder.iterdir())
    return read_study(folder)["settings"] if held else None


def _holds_training(folder: Path) -> bool:
    """Whether any cell of a study has finished or left a checkpoint."""
    return any(True for name in _WORTH_KEEPING for _ in folder.glob(f"{CELLS}/*/{name}"))


class StudyFolder:
    """A study that is being run. A context manager: it holds the folder's lock."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Make the folder for `settings`, or open one that was made with the same.

        A folder in which nothing was trained yet takes other settings and forgets its failed cells: else a mistyped
        option, which fails them all, could not be corrected. Raises UsageError with the difference where the settings
        of a study that holds training changed, DataError where the folder is in use or holds something else.
        """
        self.path = path
        if path.exists() and not path.is_dir():
            raise DataError(f"{path}: is a file; choose a folder with --out")
        _settings_of(path)  # so that nothing is left in a folder that holds something else
        path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as undone:
            self._lock: IO[bytes] = undone.enter_context((path / ".lock").open("wb"))
            lock(self._lock, path, "another grid is running here; wait for it or choose another --out")
            self._take(settings)
            self._journal = (path / JOURNAL).open("ab")
            undone.pop_all()
        if self._journal.tell() and (path / JOURNAL).read_bytes()[-1:] != b"\n":
            self._journal.write(b"\n")  # a line that was cut short

    def _take(self, settings: dict[str, Any]) -> None:
        """Make the folder that of a study with these settings, where no training is lost by it.

        Needs the lock: else another grid may make its study at the same time, or train the cells that are forgotten.
        """
        before = _settings_of(self.path)
        old = settings if before is None else before
        changed = [f"{k}: {old.get(k)}, now {v}" for k, v in settings.items() if old.get(k) != v]
        if changed and _holds_training(self.path):
            raise UsageError(
                f"{self.path}: this study was started with other settings ({'; '.join(changed)}); keep them, or choose "
                "another --out"
            )
        if changed:
            self._forget_cells()
        if changed or before is None:
            text = json.dumps({"version": VERSION, "settings": settings}, indent=2, ensure_ascii=False)
            write_durably(self.path / STUDY, text.encode() + b"\n")

    def __enter__(self) -> "StudyFolder":
        """Enter the context."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Give the folder back."""
        self._journal.close()
        self._lock.close()

    def _forget_cells(self) -> None:
        """Delete the folders of cells that came to nothing, which hold the old settings, and what became of them.

        The workers of a grid that was killed go on until their next step. A checkpoint that they write then comes too
        late to be seen: it goes with its folder, or fails because that has gone. Where this meets a file of theirs
        that was not there a moment ago it fails with an OSError, and the next start forgets the rest. The lock of a
        run folder keeps them apart from a cell that is trained again with the same settings.
        """
        if (self.path / CELLS).is_dir():
            shutil.rmtree(self.path / CELLS)
        (self.path / JOURNAL).unlink(missing_ok=True)

    def cell(self, name: str) -> Path:
        """The run folder of a cell."""
        return self.path / CELLS / name

    def log(self, worker: str) -> Path:
        """What a worker and its libraries print."""
        return self.path / LOGS / f"{worker}.log"

    def ended(self, cell: Cell, outcome: str, error: str, wall_s: float) -> dict[str, Any]:
        """Record how a cell ended; the journal's entry. wall_s: since a worker was given it, seconds."""
        config = cell.config
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
        self._journal.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        return entry
