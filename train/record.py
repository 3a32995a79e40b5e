"""The run folder: everything that explains a run without its author. Only the first rank writes.

config.json          the settings, resolved        environment.json  machine, versions, data, and what `auto` chose
metrics.jsonl        one line a step and an epoch  events.out.*      the same for TensorBoard
checkpoint.pt        to go on from                 log.txt           what was shown
model.safetensors    the reported weights          predictions.parquet  logits and probabilities, val and test
result.json          written last: a run without it is not finished
"""

import io
import json
import os
import platform
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from shards.common.errors import DataError, UsageError
from shards.common.files import lock, write_durably
from shards.common.machine import available_cores
from shards.format import CLASSES
from shards.kernels import load as kernels
from train.config import COMPILE, ENGINES, PRECISIONS, Config, differences, read_config

if TYPE_CHECKING:
    from shards.shardset import ShardSet
    from train.board import Board
    from train.device import Decision

CONFIG, ENVIRONMENT, RESULT = "config.json", "environment.json", "result.json"
METRICS, PREDICTIONS, WEIGHTS, LOG = "metrics.jsonl", "predictions.parquet", "model.safetensors", "log.txt"
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless", "nvidia-dali-cuda120", "dermscale")
_OF_DECISIONS = ("device", "cuda", "capability", "memory_bytes", "cores", "versions", "kernels", "world_size")
"""What decisions are taken from: where it has changed since an earlier start, they are taken anew."""
_CHOICES = {"compile": COMPILE, "engine": ENGINES, "precision": PRECISIONS}


def to_json(content: dict[str, Any]) -> bytes:
    """JSON as this project writes it: two spaces, no NaN, one final newline."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, None where it is not finished. Raises DataError where the file is damaged."""
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); delete it and start again with --resume") from None


class RunFolder:
    """One run's files. A context manager: it holds the folder's lock, so that two runs cannot share it."""

    def __init__(self, out: Path, config: Config, resume: bool) -> None:
        """Open a new folder for `config`, or, to `resume`, an old one that was made with the same settings.

        Raises DataError where the folder is in use or holds something else, UsageError where its settings differ.
        """
        self.path = out
        self._board: Board | None = None
        if out.exists() and not out.is_dir():
            raise DataError(f"{out}: is a file; choose a folder with --out")
        held = out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir())
        if held and not (out / CONFIG).exists():
            raise DataError(f"{out}: holds other files and no run; choose an empty or a new folder with --out")
        if held and not resume:
            raise DataError(f"{out}: already holds a run; go on with it with --resume, or choose another --out")
        if held and (changed := differences(read_config(out / CONFIG), config)):
            raise UsageError(
                f"{out}: was started with other settings ({'; '.join(changed)}); keep them, or another --out"
            )
        out.mkdir(parents=True, exist_ok=True)
        self._lock: IO[bytes] = (out / ".lock").open("wb")
        try:
            lock(self._lock, out, "another process is training in this folder; wait for it or choose another")
        except DataError:
            self._lock.close()
            raise
        if not held:
            write_durably(out / CONFIG, to_json(config.to_dict()))
        self._metrics = (out / METRICS).open("ab")
        self._log = (out / LOG).open("a", encoding="utf-8")

    def __enter__(self) -> "RunFolder":
        """Enter the context."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the files and give the folder back, whatever closing one of them comes to."""
        with ExitStack() as files:
            for file in (self._lock, self._log, self._metrics, self._board):  # the last one is closed first
                if file is not None:
                    files.callback(file.close)

    def rewind(self, metrics_bytes: int, step: int) -> None:
        """Start recording; forget what came after a checkpoint: metrics beyond `metrics_bytes`, events from `step`."""
        self._metrics.truncate(metrics_bytes)
        self._metrics.seek(0, os.SEEK_END)
        from train.board import Board

        self._board = Board(self.path, step)

    def metrics_bytes(self) -> int:
        """Flush metrics.jsonl to the disk; its size, which a checkpoint keeps."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        return self._metrics.tell()

    def steps(self, first: int, epoch: int, losses: list[float], rates: list[float]) -> None:
        """Record optimizer steps: number `first` (0 the first of all) and those after it."""
        rows = list(enumerate(zip(losses, rates, strict=True), first))
        lines = [{"kind": "step", "step": step, "epoch": epoch, "loss": loss, "lr": lr} for step, (loss, lr) in rows]
        self._record(lines, [({"loss/step": loss, "lr": lr}, step) for step, (loss, lr) in rows])

    def epoch(self, step: int, numbers: dict[str, Any]) -> None:
        """Record one epoch; `step` is the number of steps done by its end."""
        scalars = {f"epoch/{name}": value for name, value in numbers.items() if isinstance(value, float)}
        self._record([{"kind": "epoch", "step": step, **numbers}], [(scalars, step)])

    def _record(self, lines: list[dict[str, Any]], points: list[tuple[dict[str, float], int]]) -> None:
        """Write lines to metrics.jsonl, and once they are there, points to TensorBoard's events."""
        for line in lines:
            self._metrics.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._metrics.flush()
        if self._board is None:
            raise ValueError("`rewind` comes before anything is recorded")
        for numbers, step in points:
            self._board.scalars(numbers, step)
        self._board.flush()

    def log(self, text: str) -> None:
        """Add a line with the time to log.txt."""
        self._log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n")
        self._log.flush()

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file of the folder."""
        write_durably(self.path / name, to_json(content))


def environment(
    data: "ShardSet", device: dict[str, Any], decisions: "Mapping[str, Decision]", world_size: int
) -> dict[str, Any]:
    """Where and on what a run took place."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": available_cores(),
        **device,
        "versions": versions,
        "kernels": kernels.in_use(),
        "shard_set": {
            "path": str(data.path),
            "index_sha256": data.manifest.index_sha256,
            "split": data.manifest.split,
            "source": data.manifest.source,
        },
        "world_size": world_size,
        "decisions": {name: asdict(taken) for name, taken in decisions.items()},
    }


def read_decisions(folder: Path, here: dict[str, Any]) -> dict[str, tuple[str, str]] | None:
    """What `auto` chose when the run in `folder` was started before: by name, the value and its reason.

    here: `environment` of this start. None where nothing was decided, where the file is damaged, and where it tells of
    another machine or of other versions: all of it is then to be decided anew.
    """
    try:
        before = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
        if any(before.get(name) != here.get(name) for name in _OF_DECISIONS) or _chip(before) != _chip(here):
            return None
        taken = before["decisions"]
        found = {name: (str(taken[name]["value"]), str(taken[name]["reason"])) for name in (*_CHOICES, "threads")}
        known = all(found[name][0] in choices and found[name][0] != "auto" for name, choices in _CHOICES.items())
        return found if known and int(found["threads"][0]) >= 1 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _chip(environment: dict[str, Any]) -> str:
    """The device's name, without the threads that a CPU's ends in: they are a decision themselves."""
    return environment["device_name"].partition(",")[0]


def write_predictions(
    folder: Path,
    data: "ShardSet",
    parts: dict[str, tuple[np.ndarray, np.ndarray]],
    probabilities: dict[str, np.ndarray],
    about: dict[str, str],
) -> None:
    """predictions.parquet: image_id, lesion_id, split, label, `logit_<dx>` and `prob_<dx>`, one row an image.

    parts[split]: sample numbers (N,) int64 and logits (N, 7) float32; probabilities[split]: (N, 7) float64; about: what
    the probabilities are (prior and temperature), kept as the file's metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    samples = np.concatenate([rows for rows, _ in parts.values()])
    logits = np.concatenate([values for _, values in parts.values()]).astype(np.float32)
    shares = np.concatenate([probabilities[split] for split in parts]).astype(np.float32)
    columns = {name: data.column(name)[samples] for name in ("image_id", "lesion_id", "split", "label")}
    columns |= {f"logit_{dx}": logits[:, c] for c, dx in enumerate(CLASSES)}
    columns |= {f"prob_{dx}": shares[:, c] for c, dx in enumerate(CLASSES)}
    content = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(about), content)
    write_durably(folder / PREDICTIONS, content.getvalue())
