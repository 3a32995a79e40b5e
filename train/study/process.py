"""A worker process as the grid sees it: started, given jobs, listened to, stopped."""

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from train.study.cells import Cell
from train.study.worker import Ended, Job, Message, Status, work

GRACE_S = 30.0
"""Seconds that a worker may take to write its checkpoint when it is stopped. Then it is killed."""


class Process:
    """A worker process of this machine, which `start` replaces by a new one."""

    def __init__(
        self, gpu: str | None = None, worker: Callable[[Connection, str | None, Path, float], None] = work
    ) -> None:
        """gpu: its name for CUDA_VISIBLE_DEVICES; None: no restriction. worker: what the process runs."""
        self._gpu, self._worker = gpu, worker
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None
        self._log = Path()

    @property
    def ready(self) -> bool:
        """Whether it can be given work now."""
        return True

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.is_alive()

    def start(self, name: str, log: Path) -> None:
        """Start a process. Spawned, not forked: a fork of a process with threads or a CUDA context is not safe."""
        self.end(idle=True)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=self._worker, args=(theirs, self._gpu, log, time.perf_counter()), name=name, daemon=True
        )
        process.start()
        theirs.close()
        self._process, self._pipe, self._log = process, ours, log

    def send(self, job: Job) -> None:
        """Give it a cell."""
        if self._pipe is not None:
            with contextlib.suppress(OSError):  # it has just died: `receive` reports it
                self._pipe.send(job)

    def receive(self) -> list[Message]:
        """The messages since the last call. One Ended is the last: `died`, if the process has ended without its own."""
        found: list[Message] = []
        if self._pipe is None or self._process is None:
            return [Ended("died", error="the worker was not started")]
        try:
            while self._pipe.poll():
                found.append(self._pipe.recv())
                if isinstance(found[-1], Ended):
                    return found
        except (EOFError, OSError):
            self._process.join(GRACE_S)
        return found if self._process.is_alive() else [*found, Ended("died", error=self._exit_reason())]

    @staticmethod
    def wait(processes: Sequence["Process"], timeout_s: float) -> None:
        """Wait until one of them has a message or has died."""
        pipes = [one._pipe for one in processes if one._pipe is not None]
        wait([*pipes, *(one._process.sentinel for one in processes if one._process is not None)], timeout_s)

    def _exit_reason(self) -> str:
        """Why the process ended, in one line."""
        code = self._process.exitcode if self._process is not None else None
        if code is None or code >= 0:
            return f"the worker ended with exit code {code}; see {self._log}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "unknown"
        memory = " (the system does so if memory is full)" if -code == signal.SIGKILL else ""
        return f"the worker was killed by signal {-code} ({name}){memory}; see {self._log}"

    def stop(self, kill: bool) -> None:
        """Send SIGTERM, upon which it writes a checkpoint and ends; or SIGKILL."""
        if self._process is not None:
            (self._process.kill if kill else self._process.terminate)()

    def end(self, idle: bool) -> None:
        """End the process, if there is one, and wait for its end: the next one needs its memory.

        idle: it has no cell, and ends when it is told so; otherwise it is killed.
        """
        if self._process is None or self._pipe is None:
            return
        if idle and self._process.is_alive():
            with contextlib.suppress(OSError):  # it has just died
                self._pipe.send(None)
        else:
            self._process.kill()
        self._pipe.close()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process, self._pipe = None, None


@dataclass
class Slot:
    """One device or a share of it: its worker, the model of that worker, and the cell that it trains."""

    number: int
    worker: Process
    model: str = ""
    cell: Cell | None = None
    started: float = 0.0
    status: Status = field(default_factory=lambda: Status("start", 0, 1))
    stopped_at: float | None = None
