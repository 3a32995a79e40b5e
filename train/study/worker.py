"""A process that trains cell after cell of one model on one device. A function of its arguments and of its orders.

Interpreter, imports, shard set, network and compiled code are paid for by the first cell; `Workspace` keeps them.
"""

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from shards.common.errors import one_line
from train.config import Config


@dataclass(frozen=True)
class Order:
    """A cell to train, and the run folder to write: it goes on with what that holds already.

    images_ahead: those that later cells of this model will be trained on; they share the cost of compiling. unwanted:
    files that the grid deletes from a finished cell.
    """

    config: Config
    out: Path
    images_ahead: int = 0
    unwanted: tuple[str, ...] = ()


@dataclass(frozen=True)
class At:
    """A worker's news: how far the phase in hand (`epoch 3/12`, `test`) has come."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class Warned:
    """A worker's news: a line that asks for attention."""

    text: str


@dataclass(frozen=True)
class Ended:
    """A worker's last word on a cell. outcome: `finished`, `stopped` or `failed`; result: the run's; error: a line."""

    outcome: str
    result: dict[str, Any] | None = None
    error: str = ""


class _Voice:
    """The console of a run in a worker: progress and warnings go to the grid, lines only into the run's own log."""

    INTERVAL_S = 0.25

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._phase, self._sent = "", 0.0

    def say(self, text: str) -> None:
        """Keep it for the worker's log file."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Send it to the grid."""
        self._send(Warned(text))

    def at(self, phase: str, done: int, total: int) -> None:
        """Send it, four times a second at most."""
        now = time.monotonic()
        if phase != self._phase or now - self._sent >= self.INTERVAL_S:
            self._phase, self._sent = phase, now
            self._send(At(phase, done, total))

    def _send(self, news: At | Warned) -> None:
        # where the grid has died the run must get as far as asking whether to stop, which writes its checkpoint
        with contextlib.suppress(OSError):
            self._pipe.send(news)


def work(pipe: Connection, gpu: str | None, log: Path, started: float) -> None:
    """Train what comes through `pipe` until it is closed; answer each Order with At, Warned and one Ended.

    gpu: the only device that this process sees, None for the CPU or whatever there is. log: takes all that libraries
    print. started: `time.perf_counter()` of the parent when it started this process (one clock for the machine).
    SIGTERM, and the end of the parent, stop the cell in hand at its next step, with a checkpoint.
    """
    parent = os.getppid()
    stopping: list[int] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    _speak_into(log)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before torch is imported
    voice = _Voice(pipe)
    voice.at("start", 0, 1)
    try:
        _serve(pipe, voice, started, lambda: bool(stopping) or os.getppid() != parent)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is done, or gone


def _serve(pipe: Connection, voice: _Voice, started: float, stop: Any) -> None:
    import traceback

    from shards.common.cli import importing
    from shards.common.errors import DermscaleError

    with importing():
        from train.distributed import World
        from train.loop import Stopped, train_once
        from train.workspace import Workspace

    world, workspace, begin = World(), Workspace(), started
    prepared = False
    while True:
        order: Order | None = pipe.recv()
        if order is None:
            workspace.close()
            return
        begin = started if not prepared else time.perf_counter()
        try:
            if not prepared:
                world, prepared = _world(order.config.device), True
            workspace.compilation.images_ahead = order.images_ahead
            result = train_once(
                order.config,
                order.out,
                resume=True,
                world=world,
                workspace=workspace,
                stop=stop,
                console=voice,
                started=begin,
                unwanted=order.unwanted,
            )
            ended = Ended("finished", result)
        except Stopped as error:
            ended = Ended("stopped", error=one_line(error))
        except DermscaleError as error:
            ended = Ended("failed", error=one_line(error))
        except OSError as error:
            traceback.print_exc()
            ended = Ended(
                "failed", error=f"{error.strerror or type(error).__name__}: {error.filename or one_line(error)}"
            )
        except Exception as error:  # noqa: BLE001 (whatever it is, it ends this cell and not the study; the log has all of it)
            traceback.print_exc()
            ended = Ended("failed", error=f"{type(error).__name__}: {one_line(error, 300)}")
        sys.stderr.flush()
        pipe.send(ended)


def _world(device_name: str) -> Any:
    """This process alone on its device, its settings made."""
    from train import device as devices
    from train.distributed import World

    device = devices.choose(device_name)
    devices.prepare(device, keep_memory=True)
    return World(device=device)


def _speak_into(log: Path) -> None:
    """Send standard output and error, C libraries' too, into a file: on the terminal is a live table."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
