"""TensorBoard's file of events, written where it is called.

TensorBoard's own writer is a thread that opens the file anew for every number, and on a full disk ends in a traceback.
"""

import itertools
import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

_events: Any = event_pb2
_summaries: Any = summary_pb2
_number = itertools.count()
"""Tells the files apart that one process opens in one second."""


class Board:
    """One events file in the folder of a run. What is not flushed may be lost; an OSError of writing comes at once."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open a new file. TensorBoard forgets what older files in `folder` say of `step` and what comes after it."""
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_number)}"
        self._file = (folder / name).open("ab")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self._add(step=step, session_log=_events.SessionLog(status=_events.SessionLog.START))

    def scalars(self, numbers: dict[str, float], step: int) -> None:
        """Add a point at `step` to the curve of each name."""
        values = [_summaries.Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._add(step=step, summary=_summaries.Summary(value=values))

    def flush(self) -> None:
        """Hand to the system what was added."""
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file; it is closed even where that fails."""
        self._file.close()

    def _add(self, **content: Any) -> None:
        self._records.write(_events.Event(wall_time=time.time(), **content).SerializeToString())
