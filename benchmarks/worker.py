"""The process that one system runs in, so that systems share no threads, locks or crashes, and can still take turns.

All processes come from one fork server that has already imported torch. The parent asks for rounds through a pipe.
Between its rounds a system waits; its threads may go on reading ahead then, unless it is frozen.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from benchmarks.machine import Meter, tree_cpu_s
from benchmarks.measure import Measurement, Sample, Series, interleave, reason
from shards.common.errors import DataError, last_line

SET_UP_LIMIT_S = 900.0
"""Packing, compiling and starting workers take minutes; a longer set-up counts as a hang."""


class SystemFailedError(DataError):
    """A system could not be set up or run; the text is the reason."""


def run_module(module: str, options: Mapping[str, object], *, limit_s: float | None = None) -> None:
    """Run a command of this project, and wait for its end. options: name → value; `""` is the name of an argument.

    Raises SystemFailedError with the last line of a command that fails, or takes more than `limit_s` seconds.
    """
    words = [str(word) for pair in options.items() for word in pair if word != ""]
    command = [sys.executable, "-m", module, *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise SystemFailedError(f"{module}: not done after {limit_s:.0f} s") from None
    if done.returncode:
        raise SystemFailedError(f"{module} failed: {last_line(done.stderr)}")


@dataclass(frozen=True)
class Running:
    """A system that is set up.

    once: makes one whole pass and returns its number of images, 0 where the round has no more. before: called before
    each round, not timed. about: numbers found during set-up, by metric. waited: seconds that all passes so far have
    waited for data. beside: what a thread or a server beside the system has counted so far.
    """

    once: Callable[[], float]
    before: Callable[[], None] = lambda: None
    about: dict[str, float] = field(default_factory=dict)
    waited: Callable[[], float] = lambda: math.nan
    beside: Callable[[], float] = lambda: math.nan


SetUp = Callable[[str, Any], Running]
"""(name of the system, job) → the system, called in its process. A function of a module, so that it can be pickled."""


def start_server(preload: Sequence[str] = ("torch", "numpy")) -> ForkServerContext:
    """The context whose processes start with `preload` imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


class Worker(AbstractContextManager):
    """One system in its own process. A context manager: leaving it ends the process and its children."""

    def __init__(
        self,
        context: ForkServerContext,
        set_up: SetUp,
        name: str,
        job: Any,
        *,
        logs: Path,
        limit_s: float,
        frozen: bool = False,
    ) -> None:
        """Start the process.

        logs: folder for the output of its libraries. limit_s: how long set-up, or one round, may take. frozen: all its
        threads are stopped between its rounds, so that it reads nothing ahead while other systems run; worker processes
        that it started go on.
        """
        self.name, self.limit_s, self.frozen = name, limit_s, frozen
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{name.replace(' ', '-').replace(':', '')}.log"
        self._pipe, other = context.Pipe()
        arguments = (other, set_up, name, job, log, multiprocessing.get_start_method(), frozen)
        self._process = context.Process(target=_serve, args=arguments, name=name)
        self._process.start()
        other.close()

    def __exit__(self, *exc: object) -> None:
        """End the process."""
        self.close()

    def _answer(self) -> Any:
        try:
            if not self._pipe.poll(self.limit_s):
                self.close()
                raise SystemFailedError(f"no answer within {self.limit_s:.0f} s")
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if kind == "failed":
            raise SystemFailedError(str(value))
        self._signal(signal.SIGSTOP)
        return value

    def _signal(self, number: signal.Signals) -> None:
        if self.frozen and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # `_answer` says why it died
                os.kill(self._process.pid, number)

    def _died(self) -> SystemFailedError:
        self._process.join(5)
        return SystemFailedError(f"its process died with exit code {self._process.exitcode}")

    def ready(self) -> dict[str, float]:
        """Wait until the system is set up; returns the numbers of its set-up. Raises SystemFailedError."""
        return self._answer()

    def run(self, seconds: float) -> Sample:
        """Make whole passes for at least `seconds`. Raises SystemFailedError with the reason."""
        self._signal(signal.SIGCONT)
        try:
            self._pipe.send(seconds)
        except (BrokenPipeError, OSError):
            raise self._died() from None
        return Sample(*self._answer())

    def close(self) -> None:
        """Let the process end, then kill what is left of it and its children."""
        self._pipe.close()
        self._signal(signal.SIGCONT)
        self._process.join(5)
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # all of the group have ended
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # it may have died before it made its own group
        self._process.join(5)


def take_turns(
    set_up: SetUp,
    names: Sequence[str],
    job: Any,
    logs: Path,
    measurement: Measurement,
    *,
    limit_s: float = SET_UP_LIMIT_S,
    frozen: bool = False,
) -> tuple[dict[str, Series], dict[str, dict[str, float]]]:
    """Set up every system in its own process, one after the other, then run them in turn, once per round.

    limit_s: how long set-up may take, and a round beyond 20 times its minimum. frozen: a system is stopped while others
    have their turn. A first round does not count: other systems were set up since, so a system's data has left the
    caches. Returns the timed runs of each system, and the numbers of its set-up. A system that fails or hangs has the
    reason in its series.
    """
    context = start_server()
    seconds, limit = measurement.seconds, limit_s + 20 * measurement.seconds
    series: dict[str, Series] = {}
    about: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        running: dict[str, Callable[[], Sample]] = {}
        for name in names:
            measurement.announce(f"set up {name}")
            worker = stack.enter_context(Worker(context, set_up, name, job, logs=logs, limit_s=limit, frozen=frozen))
            try:
                about[name] = worker.ready()
            except SystemFailedError as error:
                series[name] = Series(failed=str(error))
                continue
            running[name] = lambda worker=worker: worker.run(seconds)
        series |= interleave(running, measurement)
    return series, about


def _asked(pipe: Connection) -> float | None:
    """The seconds of the next round; None when the parent has closed the pipe after the last one."""
    try:
        return pipe.recv()
    except EOFError:
        return None


def _wake_when_alone(pipe: Connection) -> None:
    """Fork a child that wakes this process when the parent has ended: a frozen process would not notice."""
    parent, frozen = multiprocessing.parent_process(), os.getpid()
    if parent is None or os.fork():
        return
    try:
        pipe.close()  # it must close when this process ends, not its child
        parent.join()
        os.kill(frozen, signal.SIGCONT)
    finally:
        os._exit(0)  # no other code of the forked process may run here


def _serve(pipe: Connection, set_up: SetUp, name: str, job: Any, log: Path, start_method: str, frozen: bool) -> None:
    """The code of the process: set up, report that, and run a round for each number of seconds that arrives."""
    multiprocessing.set_start_method(start_method, force=True)  # for the system's own workers: Python's default
    os.setsid()  # its own group, so that its workers can be killed with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    with log.open("w", encoding="utf-8") as file:  # output of libraries would break the progress display
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if frozen:
        _wake_when_alone(pipe)
    try:
        system = set_up(name, job)
        pipe.send(("ready", system.about))
        while (seconds := _asked(pipe)) is not None:
            system.before()
            waited, beside = system.waited(), system.beside()
            meter, cpu_s, begin = Meter(), tree_cpu_s(os.getpid()), time.perf_counter()
            count, passed, done = 0.0, 0.0, 1.0
            while done and (passed < seconds or not count):  # one pass at least
                done = system.once()
                passed = time.perf_counter() - begin
                count += done
            if not count:
                raise ValueError("a round gave no image")
            cpu_s = tree_cpu_s(os.getpid()) - cpu_s
            other_cpu = meter.other_cpu(cpu_s)
            pipe.send(("done", (count, passed, cpu_s, other_cpu, system.waited() - waited, system.beside() - beside)))
    except Exception as error:  # noqa: BLE001 - any error of the system is the reason in its row
        traceback.print_exc()  # into the log
        with contextlib.suppress(BrokenPipeError):
            pipe.send(("failed", reason(error)))
