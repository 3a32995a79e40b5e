"""`loader --beside-python`: what loaders are worth beside a thread of Python that never waits, as a training loop is.

Every loader has one thread or one worker process. The thread counts, and so holds Python's lock (the GIL) but for the
moments in which the interpreter takes it away, every 5 ms at the earliest. Each loader is timed without the thread and
with it. The thread is timed alone too, so that the table says what the loader takes from it.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks import systems
from benchmarks.datasets import Job, stats
from benchmarks.measure import Measurement, Row, Series, ratio_row, series_row
from benchmarks.options import Settings
from benchmarks.pages import Page
from benchmarks.peers.system import System
from benchmarks.tables import pivot
from benchmarks.worker import Running, take_turns

NAME = "loader-beside-python"
SYSTEMS = (
    "dermscale native jpg",
    "dermscale native raw",
    "dermscale dali jpg (on the CPU)",
    "FFCV jpg",
    "FFCV raw",
    "DALI webdataset reader",
    "webdataset",
    "LitData",
)
"""The loaders of the `loader` benchmark that are timed."""
THREAD = "Python thread"
_BESIDE = ", beside Python"
_ALONE_S = 0.2


class Counter:
    """A thread of Python that counts while it is switched on."""

    def __init__(self) -> None:
        self.count, self._on = 0, threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while self._on.wait():
            while self._on.is_set():
                self.count += 1

    def during(self, work: Callable[[], float]) -> float:
        """What `work` returns; the thread counts for as long as that takes."""
        self._on.set()
        try:
            return work()
        finally:
            self._on.clear()


def set_up(name: str, job: Job) -> Running:
    """A loader, without the thread or with it; or the thread alone, which counts for some time."""
    counter = Counter()
    if name == THREAD:

        def alone() -> float:
            before = counter.count
            counter.during(lambda: time.sleep(_ALONE_S) or 0.0)
            return counter.count - before

        return Running(alone)
    running = systems.set_up(name.removesuffix(_BESIDE), job)
    if not name.endswith(_BESIDE):
        return running
    return replace(running, once=lambda: counter.during(running.once), beside=lambda: float(counter.count))


def run(settings: Settings, packed_px: int) -> None:
    """The command: time the loaders that --only names, or all, and publish the table."""
    chosen = settings.chosen({name: systems.SYSTEMS[name] for name in SYSTEMS})
    job = settings.job(packed_px, 2496, quick=2496, whole_batches=True)
    with settings.measurement(job, (2 * len(chosen) + 1) * (2 + settings.rounds)) as measurement:
        settings.publish(PAGE, measure(chosen, job, measurement))


def measure(loaders: Sequence[System], job: Job, measurement: Measurement) -> list[Row]:
    """Time each system without the thread and with it, in turn."""
    _, size = stats(job)
    names = [name for system in loaders for name in (system.name, system.name + _BESIDE)]
    series, _ = take_turns(set_up, [THREAD, *names], job, job.cache / "logs", measurement)

    rows: list[Row] = []
    for system in loaders:
        alone, beside = series[system.name], series[system.name + _BESIDE]
        counted = Series([replace(sample, count=sample.beside) for sample in beside.samples], beside.failed)
        packed = f"{size} {system.encoding}"
        own = measurement.columns(NAME, job, system=system.name, packed=packed, page_cache="warm", note=system.note)
        rows.append(series_row(alone, lambda s: s.per_s, metric="img_per_s", unit="img/s", **own))
        rows.append(series_row(beside, lambda s: s.per_s, metric="beside_img_per_s", unit="img/s", **own))
        rows.append(ratio_row(beside, alone, **own | {"metric": "kept", "unit": "1"}))
        rows.append(ratio_row(counted, series[THREAD], **own | {"metric": "left_to_python", "unit": "1"}))
    return rows


def tables(rows: Sequence[Row]) -> list[str]:
    """A line per loader and a column per metric."""
    metrics = {
        "img_per_s": "alone, img/s",
        "beside_img_per_s": "beside the thread, img/s",
        "kept": "of its speed alone",
        "left_to_python": "the thread's speed, of its speed alone",
    }
    return [
        "Each loader has one thread or one worker process, and a thread of Python counts beside it.\n",
        pivot(rows, metrics),
    ]


PAGE = Page(NAME, "Loading beside a busy Python thread", tables, chart=("kept", "speed beside Python, of that alone"))
