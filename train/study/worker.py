"""A worker: a process that trains one cell after the other, all of one model on one device.

The interpreter, imports, shard set, network and compiled code are loaded for the first cell; `Workspace` keeps them.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from shards.common.errors import one_line
from train.config import Config


@dataclass(frozen=True)
class Job:
    """A cell to train. out: its run folder, which is continued if it holds a checkpoint.

    images_ahead: training images of the later cells of this model, which share the cost of compiling. unwanted: files
    that the grid deletes from a finished cell. per_device: cells that are trained at the same time on the device.
    """

    config: Config
    out: Path
    images_ahead: int = 0
    unwanted: tuple[str, ...] = ()
    per_device: int = 1


@dataclass(frozen=True)
class Status:
    """A message of a worker: how much of the current phase (`epoch 3/12`, `test`) is done."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class Warned:
    """A message of a worker: a warning."""

    text: str


@dataclass(frozen=True)
class Ended:
    """A worker's last message about a cell. outcome: `finished`, `stopped` or `failed`. error: one line.

    Where the worker cannot say it itself: `died`, or `lost` with its machine.
    """

    outcome: str
    result: dict[str, Any] | None = None
    error: str = ""


Message = Status | Warned | Ended


class PipeConsole:
    """The console of a run in a worker: progress and warnings go to the grid, lines to the worker's log."""

    INTERVAL_S = 0.25

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._phase, self._sent = "", 0.0

    def say(self, text: str) -> None:
        """Print one line into the worker's log."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Send a warning to the grid."""
        self._send(Warned(text))

    def at(self, what: str, done: int, total: int) -> None:
        """Send the status of a phase, at most four times a second."""
        now = time.monotonic()
        if what != self._phase or now - self._sent >= self.INTERVAL_S:
            self._phase, self._sent = what, now
            self._send(Status(what, done, total))

    def _send(self, message: Status | Warned) -> None:
        # if the grid has died, the run goes on to its next step, where it stops and writes its checkpoint
        with contextlib.suppress(OSError):
            self._pipe.send(message)


def work(pipe: Connection, gpu: str | None, log: Path, started: float) -> None:
    """Train the jobs that come through `pipe` until it is closed. Send Status, Warned, and one Ended for each.

    gpu: the only GPU that this process sees; None: no restriction. log: the file for everything that libraries print.
    started: `time.perf_counter()` of the parent when it started this process (one clock for the machine). SIGTERM, or
    the end of the parent, stops the current cell at its next step, with a checkpoint.
    """
    parent = os.getppid()
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    set_up(gpu, log)
    console = PipeConsole(pipe)
    console.at("start", 0, 1)
    try:
        train_jobs(pipe, console, started, lambda: bool(stopping) or os.getppid() != parent)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has closed the pipe or ended


def set_up(gpu: str | None, log: Path) -> None:
    """Set up a process of a grid: signals of a terminal are left to the parent. gpu, log: as for `work`."""
    for number in (
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGUSR1,
    ):  # of a terminal or a job: they reach all its processes
        signal.signal(number, signal.SIG_IGN)
    _redirect_output(log)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before torch is imported


def train_jobs(pipe: Connection, console: PipeConsole, started: float, stop: Callable[[], bool]) -> None:
    """Train each Job from `pipe` until None comes. Raises EOFError or OSError if the pipe breaks."""
    import traceback

    from shards.common.cli import importing, system_error
    from shards.common.errors import DermscaleError

    with importing():
        from train.loop import Stopped, train_once
        from train.workspace import Workspace

    workspace, world = Workspace(), None
    while (job := pipe.recv()) is not None:
        begin = started if world is None else time.perf_counter()
        try:
            world = world or world_on(job.config.device, job.per_device)
            workspace.compilation.images_ahead = job.images_ahead
            result = train_once(
                job.config,
                job.out,
                resume=True,
                world=world,
                workspace=workspace,
                stop=stop,
                console=console,
                started=begin,
                unwanted=job.unwanted,
            )
            ended = Ended("finished", result)
        except Stopped:
            ended = Ended("stopped", error="stopped")
        except DermscaleError as error:
            ended = Ended("failed", error=one_line(error))
        except Exception as error:  # noqa: BLE001 (it fails this cell and not the study; the log has the traceback)
            traceback.print_exc()
            line = system_error(error) if isinstance(error, OSError) else ""
            ended = Ended("failed", error=line or f"{type(error).__name__}: {one_line(error, 300)}")
        sys.stderr.flush()
        pipe.send(ended)
    workspace.close()


def world_on(device_name: str, per_device: int = 1) -> Any:
    """The world of one process on one device. per_device: processes of the grid that share the device."""
    from train import device as devices
    from train.distributed import World

    device = devices.choose(device_name)
    devices.prepare(device, keep_memory=True, processes=per_device)
    return World(device=device, per_device=per_device)


def _redirect_output(log: Path) -> None:
    """Send standard output and error, also of C libraries, to a file: the terminal shows the live table."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
