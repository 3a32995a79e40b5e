"""The `latency` benchmark: what the native engine costs around the loading of images.

The first batch of a loader that was just made; the wait at the edge of two epochs, for short and long ones; the memory
that the order and the plan of an epoch take; and the processor time of the thread that takes the batches.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from benchmarks.datasets import Job, prepared
from benchmarks.measure import Measurement, Row, summary_row
from benchmarks.options import WORKERS, Settings, benchmark
from benchmarks.pages import Page
from benchmarks.peers.ours import SHARDS_JPG, SHARDS_RAW, loader_of
from benchmarks.tables import cell, table
from shards.kernels.load import compiled, holding_the_lock

if TYPE_CHECKING:
    from shards import Loader, ShardSet

METRICS = {
    "batch": ("ms", "time from one batch to the next, without other work"),
    "first_batch": ("ms", "first batch of a loader that was just made, the batch's own time included"),
    "edge_10000": ("ms", "longer wait for the first batch of the next epoch, 10,000 samples"),
    "edge_1000000": ("ms", "the same, 1,000,000 samples"),
    "plan_memory_1000000": ("MB", "memory for order, plan and batches around that edge, 1,000,000 samples"),
    "consumer": ("us", "processor time of the thread that takes the batches, per image"),
    "python": ("us", "the same without the calls of the compiled library that submit and wait, per image"),
}
"""Metric → its unit, and what it is."""
_SETS = {"dermscale native jpg": SHARDS_JPG, "dermscale native raw": SHARDS_RAW}
_AROUND = 300
"""Batches before the edge of two epochs that are loaded first: as in any epoch, the next order is made meanwhile."""
_BEHIND = 20


@benchmark("latency", WORKERS, rounds=(9, 5))
def command(settings: Settings) -> None:
    """First batch, edges of epochs, memory of the plan, and time in Python, of the native engine."""
    job = settings.job(341, 2496, quick=2496, whole_batches=True)
    with settings.measurement(job, len(_SETS) * (1 + settings.rounds)) as measurement:
        settings.publish(PAGE, [row for name in _SETS for row in measure(name, job, measurement)])


def measure(name: str, job: Job, measurement: Measurement) -> list[Row]:
    """All metrics of one system, in rounds."""
    from shards import ShardSet

    found: dict[str, list[float]] = {metric: [] for metric in METRICS}
    with ShardSet(prepared(_SETS[name], job) / "set") as data:
        for round_ in range(-1, measurement.rounds):
            measurement.announce(f"{name}, {'warm-up' if round_ < 0 else f'round {round_ + 1}'}")
            values = one_round(data, job)
            for metric in METRICS if round_ >= 0 else ():
                found[metric].append(values[metric])
    columns = measurement.columns("latency", job, system=name, packed=f"{job.packed_px} px")
    return [summary_row(found[metric], metric=metric, unit=unit, **columns) for metric, (unit, _) in METRICS.items()]


def one_round(data: "ShardSet", job: Job) -> dict[str, float]:
    """Every metric once."""
    began = time.perf_counter()
    loader = loader_of(data, job, "native", "cpu")
    next(iter(loader))
    first = time.perf_counter() - began
    loader.close()

    intervals, of_consumer = steady(data, job)
    with timed_calls() as spent:
        _, of_python = steady(data, job, spent)
    batch = median(intervals)
    values = {"batch": 1e3 * batch, "first_batch": 1e3 * first}
    for count in (10_000, 1_000_000):
        values[f"edge_{count}"] = 1e3 * (edge(data, job, count) - batch)
    values["plan_memory_1000000"] = plan_memory(data, job, 1_000_000) / 1e6
    values["consumer"] = 1e6 * of_consumer
    values["python"] = 1e6 * of_python
    return values


def steady(data: "ShardSet", job: Job, spent: list[float] | None = None) -> tuple[list[float], float]:
    """Seconds between batches within epochs, and processor seconds of the consumer's thread per image.

    spent: seconds that it spends in calls, which are not counted.
    """
    loader = resized(data, job, 100_000)
    batches = iter(loader)
    for _ in range(_BEHIND):
        next(batches)
    stamps, used, calls = [time.perf_counter()], time.thread_time(), len(spent or ())
    for _ in range(_AROUND):
        next(batches)
        stamps.append(time.perf_counter())
    used = (time.thread_time() - used - sum((spent or [])[calls:])) / (_AROUND * job.batch_size)
    loader.close()
    return np.diff(stamps).tolist(), used


def edge(data: "ShardSet", job: Job, count: int) -> float:
    """Seconds from the last batch of an epoch to the first one of the next."""
    loader = resized(data, job, count)
    loader.load_state_dict(loader.state_dict() | {"batch": max(0, len(loader) - _AROUND)})
    last = 0.0
    for _ in loader:
        last = time.perf_counter()
    batches = iter(loader)
    next(batches)
    found = time.perf_counter() - last
    loader.close()
    return found


def plan_memory(data: "ShardSet", job: Job, count: int) -> float:
    """The most bytes of memory that the process has more around the edge of two epochs than before the first batch: for
    order, plan and batches."""
    import psutil
    import torch

    from train.device import peak_memory_bytes, reset_peak_memory

    cpu, loader = torch.device("cpu"), resized(data, job, count)
    loader.load_state_dict(loader.state_dict() | {"batch": len(loader) - _BEHIND})
    before = psutil.Process().memory_info().rss
    reset_peak_memory(cpu)
    for _ in range(2):
        for number, _batch in enumerate(loader):
            if number == 2 * _BEHIND:
                break
    most = peak_memory_bytes(cpu)
    loader.close()
    return float(most - before)


@contextmanager
def timed_calls() -> Iterator[list[float]]:
    """Time the calls of the compiled library that submit a batch and wait for it: processor seconds of each call.

    What the clock itself takes counts for Python.
    """
    spent: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*arguments: Any) -> Any:
            began = time.thread_time()
            result = call(*arguments)
            spent.append(time.thread_time() - began)
            return result

        return timed_call

    with ExitStack() as patches:
        for library, name in ((holding_the_lock(), "dermscale_batch_draw"), (compiled(), "dermscale_batch_wait")):
            if library is not None:
                patches.enter_context(patch.object(library, name, timed(getattr(library, name))))
        yield spent


def resized(data: "ShardSet", job: Job, count: int) -> "Loader":
    """A loader over `count` samples: those of the training split, again and again."""
    loader = loader_of(data, job, "native", "cpu")
    rows = np.resize(loader.selection.samples, count)
    loader.close()
    return loader_of(data, job, "native", "cpu", selection=replace(loader.selection, samples=rows))


def tables(rows: Sequence[Row]) -> list[str]:
    """A line per metric and a column per system."""
    systems = list(dict.fromkeys(row.system for row in rows))
    lines = []
    for metric, (unit, what) in METRICS.items():
        of = {row.system: row for row in rows if row.metric == metric}
        lines.append([f"{what}, {unit}", *(cell(of.get(system)) for system in systems)])
    return [table(["what", *systems], lines)]


PAGE = Page("latency", "Around the loading of images", tables, chart=("first_batch", "first batch, ms"))
