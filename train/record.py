"""The run folder: all that is needed to understand and repeat a run. Only the first rank writes.

config.json        the settings, resolved           environment.json     machine, versions, data, decisions of `auto`
metrics.jsonl      a line per step and per epoch    events.out.*         the same for TensorBoard
checkpoint.pt      the state to continue from       log.txt              what was shown
model.safetensors  the reported weights             predictions.parquet  logits and probabilities, val and test
result.json        written last: a run without it is not finished
"""

import io
import itertools
import json
import os
import platform
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from shards.common.errors import DataError, UsageError, one_line
from shards.common.files import encoded, lock, write_durably
from shards.common.machine import available_cores
from shards.kernels import load as kernels
from train.config import COMPILE, ENGINES, PRECISIONS, Config, differences, read_config

if TYPE_CHECKING:
    from shards import Selection
    from shards.shardset import ShardSet
    from train.device import Decision

CONFIG, ENVIRONMENT, RESULT = "config.json", "environment.json", "result.json"
METRICS, PREDICTIONS, WEIGHTS, LOG = "metrics.jsonl", "predictions.parquet", "model.safetensors", "log.txt"
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless", "nvidia-dali-cuda120", "dermscale")
_DECIDED_FROM = ("device", "cuda", "capability", "memory_bytes", "cores", "versions", "kernels", "world_size")
"""What decisions depend on. If any of it differs from an earlier start's, they are made again."""
_RESULT = {"model": str, "steps": int, "test": dict, "seconds": dict, "decisions": dict, "shard_set_sha256": str}
"""Without these, result.json is not that of a finished run."""
_CHOICES = {"compile": COMPILE, "engine": ENGINES, "precision": PRECISIONS}


def to_json(content: dict[str, Any]) -> bytes:
    """JSON as this project writes it: two spaces, no NaN, one final newline."""
    return encoded(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a run, None if the run is not finished. Raises DataError if the file is damaged."""
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        wrong = [n for n, kind in _RESULT.items() if type(result) is not dict or type(result.get(n)) is not kind]
        if wrong:
            raise ValueError(f"it has no {wrong[0]}")
    except ValueError as error:
        raise DataError(
            f"{path}: damaged, or of another release ({one_line(error, 160)}); delete it, and continue the run with "
            "--resume or start its grid again"
        ) from None
    return result


class RunFolder:
    """One run's files. A context manager: it holds the folder's lock, so that two runs cannot share it."""

    def __init__(self, out: Path, config: Config, resume: bool) -> None:
        """Open a new folder for `config`; with `resume`, an old one of the same settings is allowed too.

        Raises DataError if the folder is in use or holds something else, UsageError if its settings differ.
        """
        self.path = out
        self._events: Events | None = None
        if out.exists() and not out.is_dir():
            raise DataError(f"{out}: is a file; choose a folder with --out")
        held = out.is_dir() and any(not p.name.startswith(".") for p in out.iterdir())
        if held and not (out / CONFIG).exists():
            raise DataError(f"{out}: holds other files and no run; choose an empty or a new folder with --out")
        if held and not resume:
            raise DataError(f"{out}: already holds a run; continue it with --resume, or choose another --out")
        if held and (changed := differences(read_config(out / CONFIG), config)):
            raise UsageError(
                f"{out}: was started with other settings ({'; '.join(changed)}); use the same, or choose another --out"
            )
        out.mkdir(parents=True, exist_ok=True)
        self._lock: IO[bytes] = (out / ".lock").open("wb")
        try:
            lock(self._lock, out, "another process is training in this folder; wait for it or choose another")
        except DataError:
            self._lock.close()
            raise
        self._unused = not held
        if self._unused:
            write_durably(out / CONFIG, to_json(config.to_dict()))
        self._metrics = (out / METRICS).open("ab")
        self._log = (out / LOG).open("a", encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> "RunFolder":
        """Enter the context."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close the files and unlock the folder, even if closing one of them fails. A new run that ends with an error
        before it records anything leaves no folder, so that it can be started again with other settings.
        """
        with ExitStack() as files:
            for file in (self._lock, self._log, self._metrics, self._events):  # the last one is closed first
                if file is not None:
                    files.callback(file.close)
            if self._unused and exc[0] is not None:
                for name in (CONFIG, METRICS, LOG, ".lock"):
                    (self.path / name).unlink()
                with suppress(OSError):  # something else is in it
                    self.path.rmdir()

    def rewind(self, metrics_bytes: int, step: int) -> None:
        """Start recording. Drop what a checkpoint does not know: metrics beyond `metrics_bytes`, events from `step`."""
        if (size := self._metrics.seek(0, os.SEEK_END)) < metrics_bytes:
            raise DataError(
                f"{self.path / METRICS}: has {size} bytes, and {metrics_bytes} when the checkpoint was written; "
                "delete checkpoint.pt to start the run from its beginning"
            )
        self._metrics.truncate(metrics_bytes)
        self._metrics.seek(0, os.SEEK_END)
        self._events = Events(self.path, step)
        self._unused = False

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
        """Write lines to metrics.jsonl, then points to TensorBoard's events."""
        for line in lines:
            self._metrics.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._metrics.flush()
        if self._events is None:
            raise ValueError("call `rewind` before recording")
        for numbers, step in points:
            self._events.scalars(numbers, step)
        self._events.flush()

    def log(self, text: str) -> None:
        """Add a line with the time to log.txt."""
        self._log.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n")
        self._log.flush()

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file of the folder."""
        write_durably(self.path / name, to_json(content))


class Events:
    """TensorBoard's file of events in a run folder. Points may be lost until `flush`; an OSError is raised at once.

    TensorBoard's own writer is a thread that opens the file again for every number, and a full disk ends it with a
    traceback.
    """

    _number = itertools.count()  # makes the names of files differ that one process opens within a second

    def __init__(self, folder: Path, step: int) -> None:
        """Open a new file. TensorBoard then ignores what older files in `folder` say about `step` and later steps."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event: Any = event_pb2
        self._summary: Any = summary_pb2
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(self._number)}"
        self._file = (folder / name).open("ab")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(step=step, session_log=self._event.SessionLog(status=self._event.SessionLog.START))

    def scalars(self, numbers: dict[str, float], step: int) -> None:
        """Add a point at `step` to the curve of each name."""
        values = [self._summary.Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._add(step=step, summary=self._summary.Summary(value=values))

    def flush(self) -> None:
        """Give the operating system what was added."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file; it is closed even if that fails."""
        self._file.close()

    def _add(self, **content: Any) -> None:
        self._records.write(self._event.Event(wall_time=time.time(), **content).SerializeToString())


def environment(
    data: "ShardSet", device: dict[str, Any], decisions: "Mapping[str, Decision]", world_size: int
) -> dict[str, Any]:
    """The content of environment.json: machine, device, versions, shard set and decisions of a run."""
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
            "path": data.address,
            "index_sha256": data.manifest.index_sha256,
            "mean": data.manifest.mean,
            "std": data.manifest.std,
            "encode": asdict(data.manifest.encode),
            "split": data.manifest.split,
            "source": data.manifest.source,
        },
        "world_size": world_size,
        "decisions": {name: asdict(taken) for name, taken in decisions.items()},
    }


def read_decisions(folder: Path, here: dict[str, Any]) -> "dict[str, Decision]":
    """What an earlier start of the run in `folder` decided, by name.

    here: `environment` of this start. Empty if there was no earlier start, if the file is damaged, or if it is of
    another machine or of other versions: then everything is decided again.
    """
    from train.device import Decision

    try:
        before = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
        if any(before.get(name) != here.get(name) for name in _DECIDED_FROM) or _chip(before) != _chip(here):
            return {}
        found = {name: Decision(**before["decisions"][name]) for name in (*_CHOICES, "threads")}
        known = all(found[name].value in choices and found[name].value != "auto" for name, choices in _CHOICES.items())
        return found if known and int(found["threads"].value) >= 1 else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _chip(environment: dict[str, Any]) -> str:
    """The device's name. A CPU's ends with its threads, which are left out: they are a decision of their own."""
    return environment["device_name"].partition(",")[0]


def write_predictions(
    folder: Path,
    selections: "list[Selection]",
    logits: list[np.ndarray],
    probabilities: list[np.ndarray],
    about: dict[str, str],
) -> None:
    """predictions.parquet: image_id, lesion_id, split, label, `logit_<dx>` and `prob_<dx>`, one row an image.

    lesion_id: the set's `group`. selections: the splits. logits, probabilities: (N, classes) float of each. about: the
    prior and temperature of the probabilities, which become the file's metadata.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    data, samples = selections[0].data, np.concatenate([one.samples for one in selections])
    names = {"image_id": "image_id", "lesion_id": "group", "split": "split", "label": "label"}
    columns = {name: data.column(column)[samples] for name, column in names.items()}
    for kind, parts in (("logit", logits), ("prob", probabilities)):
        values = np.concatenate(parts).astype(np.float32)
        columns |= {f"{kind}_{dx}": values[:, c] for c, dx in enumerate(data.manifest.classes.names)}
    content = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(about), content)
    write_durably(folder / PREDICTIONS, content.getvalue())
