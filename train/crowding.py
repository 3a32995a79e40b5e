"""Other programs on the cores of a run, which slow it down far more than their share.

The threads of a CPU kernel wait for each other at its end. If another program has the core of one of them, all wait
until it is back. Two runs with two threads each on two cores made less than a tenth of the images of one run alone;
with one thread each they made more than one alone. The number of threads decides the last bits of a CPU run, so it is
not changed here.
"""

import statistics
import time

from shards.common.machine import Load, LoadMeter

CROWDED = "crowded"
"""Among the warnings that a process has shown, the one of this file, whose figures differ each time."""
LOOK_S = 10.0
"""Seconds between two readings of the load."""
INTERRUPTED = 20.0
"""Interruptions a second from which threads count as disturbed. Alone on its cores, a run has a few."""
FIRST_STEPS = 5
SLOWER = 1.5
"""Steps that take so many times as long as the first ones of their kind are mentioned."""


class Crowding:
    """Notices once that other programs use the cores that the threads of this process need.

    threads: of PyTorch in this process. Call `after_step` after each step; it costs a few microseconds.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._first: dict[object, list[float]] = {}  # seconds of the first steps of each kind
        self._recent: list[float] = []  # seconds of the steps since the last reading
        self._kind: object = None
        self._meter: LoadMeter | None = LoadMeter()
        self._stepped = self._looked = time.monotonic()

    def pause(self) -> None:
        """Between two steps there was other work."""
        self._stepped = time.monotonic()

    def after_step(self, kind: object) -> str | None:
        """The warning, once, if others disturbed the steps since the last reading. kind: such steps cost the same."""
        if self._meter is None:
            return None
        now = time.monotonic()
        took, self._stepped = now - self._stepped, now
        first = self._first.setdefault(kind, [])
        if len(first) < FIRST_STEPS:
            first.append(took)
        if kind != self._kind:
            self._kind, self._recent = kind, []
        self._recent.append(took)
        if now - self._looked < LOOK_S:
            return None
        slower = statistics.median(self._recent) / statistics.median(first)
        self._looked, self._recent = now, []
        text = warning(self._meter.read(), self._threads, slower)
        if text is not None:
            self._meter = None
        return text


def fitting(cores: int, others: float) -> int:
    """The threads that have a core of their own, where other programs use `others` of the cores on average."""
    return max(1, round(cores - others))


def warning(load: Load, threads: int, slower: float) -> str | None:
    """One line if other programs disturb `threads` threads, with the number that would fit."""
    fit = fitting(load.cores, load.others)
    if fit >= threads or load.interruptions < INTERRUPTED:
        return None
    steps = f", and its steps take {slower:.1f} times as long as the first ones" if slower >= SLOWER else ""
    cause = "other programs slow this one down: they use"
    if threads > load.cores:
        cause = "this program has more threads than cores: others use"
    return (
        f"{cause} {load.others:.1f} of {load.cores} cores, and this one has "
        f"{threads} threads, which were interrupted {load.interruptions:.0f} times a second{steps}. Threads that have "
        f"no core of their own make all others wait. Start it again with --threads {fit}, and the other programs with "
        "so few threads that all have a core (the last bits of a result depend on the number of threads)"
    )
