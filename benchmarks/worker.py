"""The process that one system lives in, so that systems share no threads, locks or crashes, and can still take turns.

All come from one fork server that has imported torch already. The parent asks for rounds over a pipe; between rounds a
system waits, and does nothing.
"""

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path

from benchmarks.machine import tree_cpu_s
from benchmarks.measure import Sample, reason
from benchmarks.work import Epoch, Work, check_batch


class SystemFailedError(Exception):
    """A system could not be set up or run; the text is the reason."""


def start_server(preload: Sequence[str] = ("torch", "numpy")) -> BaseContext:
    """The context whose processes start with `preload` imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


class Worker:
    """One system in a process of its own. A context manager: leaving it ends the process and its children."""

    def __init__(self, context: BaseContext, name: str, work: Work, limit_s: float) -> None:
        """Start the process. limit_s: how long it may take to get ready, or for one round, before it is given up."""
        self.name, self.limit_s = name, limit_s
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, name, work, multiprocessing.get_start_method()), name=name
        )  # type: ignore[attr-defined]
        self._process.start()
        other.close()

    def __enter__(self) -> "Worker":
        """Enter the context."""
        return self

    def __exit__(self, *exc: object) -> None:
        """End the process."""
        self.close()

    def _answer(self) -> object:
        try:
            if not self._pipe.poll(self.limit_s):
                self.close()
                raise SystemFailedError(f"no answer within {self.limit_s:.0f} s")
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(5)
            raise SystemFailedError(f"its process died with exit code {self._process.exitcode}") from None
        if kind == "failed":
            raise SystemFailedError(str(value))
        return value

    def ready(self) -> float:
        """Wait until the system is set up and its first batch was checked; returns the seconds that took."""
        return self._answer()  # type: ignore[return-value]

    def run(self, seconds: float) -> Sample:
        """Whole epochs until at least `seconds` have passed. Raises SystemFailedError with the reason."""
        try:
            self._pipe.send(seconds)
        except (BrokenPipeError, OSError):
            raise SystemFailedError(f"its process died with exit code {self._process.exitcode}") from None
        return Sample(*self._answer())  # type: ignore[misc]

    def close(self) -> None:
        """End the process, kindly at first, then with all its children."""
        self._pipe.close()
        self._process.join(5)
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # the group is gone when nobody is left in it
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join(5)


def log_file(name: str, work: Work) -> Path:
    """Where a system's process writes what its libraries print."""
    return work.cache / "logs" / f"{name.replace(' ', '-').replace(':', '')}.log"


def _serve(pipe: Connection, name: str, work: Work, start_method: str) -> None:
    """The process: set up, say so, and run a round for every number of seconds that comes."""
    multiprocessing.set_start_method(start_method, force=True)  # for the system's own workers: Python's default
    os.setsid()  # a group of its own, so that its workers can be ended with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    log = os.open(log_file(name, work), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)  # what libraries print would land in the middle of the progress display
    os.dup2(log, 2)
    try:
        begin = time.perf_counter()
        epoch = _set_up(name, work)
        pipe.send(("ready", time.perf_counter() - begin))
        while True:
            seconds = pipe.recv()
            cpu_s, begin, count = tree_cpu_s(os.getpid()), time.perf_counter(), 0
            while (passed := time.perf_counter() - begin) < seconds or not count:
                for images, _ in epoch():
                    count += len(images)
                passed = time.perf_counter() - begin
            pipe.send(("done", (count, passed, tree_cpu_s(os.getpid()) - cpu_s)))
    except EOFError:
        pass  # the parent closed the pipe: all rounds are done
    except Exception as error:  # noqa: BLE001 - whatever the system raises is its row's reason
        traceback.print_exc()  # into the log
        with contextlib.suppress(BrokenPipeError):
            pipe.send(("failed", reason(error)))


def _set_up(name: str, work: Work) -> Epoch:
    """Make the system's data, open it, and check what comes out."""
    from benchmarks.forms import prepared, stats
    from benchmarks.peers import SYSTEMS, missing

    system = SYSTEMS[name]
    if absent := missing(system):
        raise SystemFailedError(absent)
    mean, _ = stats(work)
    epoch = system.open(work, prepared(system.form, work))
    checked = 0
    for batch in epoch():
        if not system.ceiling and not checked:
            check_batch(batch, work, mean)
        checked += len(batch[0])
    if not checked:
        raise SystemFailedError("gave no batch")
    return epoch
