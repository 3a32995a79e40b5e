"""The process that one system lives in, so that systems share no threads, locks or crashes, and can still take turns.

All come from one fork server that has imported torch already. The parent asks for rounds over a pipe; between rounds a
system waits. Its threads may go on reading ahead then, unless it is frozen.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from benchmarks.machine import Meter, tree_cpu_s
from benchmarks.measure import Sample, Series, interleave, reason

SET_UP_LIMIT_S = 900.0
"""Making a data set, compiling and starting workers take minutes; more than this is a hang."""


class SystemFailedError(Exception):
    """A system could not be set up or run; the text is the reason."""


def _nothing() -> None:
    pass


def _unknown() -> float:
    return math.nan


@dataclass(frozen=True)
class Running:
    """A system that is set up. once: one whole pass; returns the number of images, 0 where the round has no more of
    them. before: untimed, before each round.

    about: figures found while setting up, by metric. waited: seconds that passes have spent waiting for data so far.
    """

    once: Callable[[], float]
    before: Callable[[], None] = _nothing
    about: dict[str, float] = field(default_factory=dict)
    waited: Callable[[], float] = _unknown


SetUp = Callable[[str, Any], Running]
"""(name of the system, job) → the system, in its process; a function of a module, so that it can be sent there."""


def start_server(preload: Sequence[str] = ("torch", "numpy")) -> ForkServerContext:
    """The context whose processes start with `preload` imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


class Worker:
    """One system in a process of its own. A context manager: leaving it ends the process and its children."""

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

        logs: folder for what its libraries print. limit_s: how long it may take to get ready, or for one round, before
        it is given up. frozen: all its threads are stopped between its rounds, so that each goes on where the last one
        ended, with nothing read ahead meanwhile; worker processes of its own go on.
        """
        self.name, self.limit_s, self.frozen = name, limit_s, frozen
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{name.replace(' ', '-').replace(':', '')}.log"
        self._pipe, other = context.Pipe()
        arguments = (other, set_up, name, job, log, multiprocessing.get_start_method(), frozen)
        self._process = context.Process(target=_serve, args=arguments, name=name)
        self._process.start()
        other.close()

    def __enter__(self) -> "Worker":
        """Enter the context."""
        return self

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
            with contextlib.suppress(ProcessLookupError):  # what it died of is said where its answer is waited for
                os.kill(self._process.pid, number)

    def _died(self) -> SystemFailedError:
        self._process.join(5)
        return SystemFailedError(f"its process died with exit code {self._process.exitcode}")

    def ready(self) -> dict[str, float]:
        """Wait until the system is set up; returns the figures found meanwhile, and `set_up_s`, the seconds it took.

        Raises SystemFailedError with the reason.
        """
        return self._answer()

    def run(self, seconds: float) -> Sample:
        """Whole passes until at least `seconds` have gone by. Raises SystemFailedError with the reason."""
        self._signal(signal.SIGCONT)
        try:
            self._pipe.send(seconds)
        except (BrokenPipeError, OSError):
            raise self._died() from None
        return Sample(*self._answer())

    def close(self) -> None:
        """End the process, kindly at first, then with all its children."""
        self._pipe.close()
        self._signal(signal.SIGCONT)
        self._process.join(5)
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # the group is gone when nobody is left in it
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # it may have been too young to have a group of its own
        self._process.join(5)


Told = Callable[[str], None]
"""Is given the name of each step when it begins."""


def take_turns(
    set_up: SetUp,
    names: Sequence[str],
    job: Any,
    logs: Path,
    *,
    rounds: int,
    seconds: float,
    told: Told,
    warmup: int = 1,
    limit_s: float = SET_UP_LIMIT_S,
    frozen: bool = False,
    at_once: int = 1,
) -> tuple[dict[str, Series], dict[str, dict[str, float]]]:
    """Set up every system in a process of its own, then run them in turn, `rounds` times.

    seconds: least length of a round. warmup: rounds before those, which are thrown away: since a system was set up all
    others were, and what it had in caches is gone. limit_s: what setting up, and a round beyond its least length, may
    take from when it is waited for. frozen: a system stands still while others have their turn. at_once: how many are
    set up beside each other; with more than one, `set_up_s` and other times of that mean nothing. Returns the timed
    runs of each system, and the figures found while setting it up. One that fails or hangs keeps the reason.
    """
    context = start_server()
    series: dict[str, Series] = {}
    about: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        running: dict[str, Callable[[], Sample]] = {}
        limit = limit_s + 20 * seconds
        started: deque[Worker] = deque()

        def await_first() -> None:
            worker = started.popleft()
            try:
                about[worker.name] = worker.ready()
            except SystemFailedError as error:
                series[worker.name] = Series(failed=str(error))
                return
            running[worker.name] = lambda: worker.run(seconds)

        for name in names:
            if len(started) == at_once:
                await_first()
            told(f"set up {name}")
            worker = Worker(context, set_up, name, job, logs=logs, limit_s=limit, frozen=frozen)
            started.append(stack.enter_context(worker))
        while started:
            await_first()
        series |= interleave(running, rounds, warmup, lambda round_, name: told(f"{_round(round_, rounds)}, {name}"))
    return series, about


def _round(round_: int, rounds: int) -> str:
    return "warm-up round" if round_ < 0 else f"round {round_ + 1} of {rounds}"


def _asked(pipe: Connection) -> float | None:
    """The seconds of the next round; None when the parent has closed the pipe, for all rounds are done."""
    try:
        return pipe.recv()
    except EOFError:
        return None


def _wake_when_alone(pipe: Connection) -> None:
    """Leave a child behind that wakes this process when the parent is gone: frozen, it would never see that."""
    parent, frozen = multiprocessing.parent_process(), os.getpid()
    if parent is None or os.fork():
        return
    try:
        pipe.close()  # its end is the sign of life of this process, not of its child
        parent.join()
        os.kill(frozen, signal.SIGCONT)
    finally:
        os._exit(0)  # nothing else of what was forked may run here


def _serve(pipe: Connection, set_up: SetUp, name: str, job: Any, log: Path, start_method: str, frozen: bool) -> None:
    """The process: set up, say so, and run a round for every number of seconds that comes."""
    multiprocessing.set_start_method(start_method, force=True)  # for the system's own workers: Python's default
    os.setsid()  # a group of its own, so that its workers can be ended with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    with log.open("w", encoding="utf-8") as file:  # what libraries print would land in the progress display
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if frozen:
        _wake_when_alone(pipe)
    try:
        begin = time.perf_counter()
        system = set_up(name, job)
        pipe.send(("ready", system.about | {"set_up_s": time.perf_counter() - begin}))
        while (seconds := _asked(pipe)) is not None:
            system.before()
            meter, waited, cpu_s, begin = Meter(), system.waited(), tree_cpu_s(os.getpid()), time.perf_counter()
            count, passed, done = 0.0, 0.0, 1.0
            while done and (passed < seconds or not count):  # one pass at least, whatever the seconds
                done = system.once()
                passed = time.perf_counter() - begin
                count += done
            if not count:
                raise ValueError("a round gave no image")
            cpu_s = tree_cpu_s(os.getpid()) - cpu_s
            pipe.send(("done", (count, passed, cpu_s, meter.other_cpu(cpu_s), system.waited() - waited)))
    except Exception as error:  # noqa: BLE001 - whatever the system raises is its row's reason
        traceback.print_exc()  # into the log
        with contextlib.suppress(BrokenPipeError):
            pipe.send(("failed", reason(error)))
