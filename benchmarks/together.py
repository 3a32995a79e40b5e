"""The `together` benchmark: two trainings at the same time on the same cores, in sum, beside one alone.

The threads of a CPU kernel wait for each other, so a run whose threads have no core of their own is slow out of all
proportion. Two runs with the default number of threads are such runs. With the number that a run then advises
(`train/crowding.py`), every thread has a core.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from benchmarks import training
from benchmarks.machine import Meter
from benchmarks.measure import Measurement, Row, Sample, Series, interleave, ratio_rows, series_rows
from benchmarks.options import ADD, Settings, benchmark, training_options
from benchmarks.pages import Page
from benchmarks.tables import pivot, ratios
from benchmarks.training import LAST, NATIVE, TrainingJob, system_name, train_models
from benchmarks.worker import SET_UP_LIMIT_S, Running, SystemFailedError, Worker, start_server
from shards.common.machine import available_cores
from train.crowding import fitting

ALONE, DEFAULT, ADVISED = "one run", "two runs", "two runs with the advised threads"
_RUNS = {ALONE: 1, DEFAULT: 2, ADVISED: 2}
RATIOS = ((DEFAULT, ALONE), (ADVISED, ALONE))
_NOTES = {
    ALONE: "default number of threads, channels-last, native loader, no compilation",
    ADVISED: "--threads as the warning of a run says where another one like it runs; the same for both",
}


@benchmark("together", *training_options(["resnet18"]), ADD, rounds=(6, 5), seconds=(10, 3))
def command(settings: Settings) -> None:
    """Two trainings at once, at 64 px, beside one alone: with the default number of threads, and with the advised."""
    train_models(settings, PAGE, len(_RUNS) * (2 + settings.rounds), measure_together, resolution_px=64)


def threads_of(name: str) -> int:
    """The threads of each run of a system."""
    import torch

    cores = available_cores()
    return fitting(cores, cores / 2) if name == ADVISED else min(torch.get_num_threads(), cores)


def set_up(name: str, job: TrainingJob) -> Running:
    """One run, as `train.run --threads` makes its steps; images.workers: its threads."""
    import torch

    torch.set_num_threads(job.images.workers)
    return training.set_up(system_name(LAST, NATIVE), job)


def at_once(runs: Sequence[Callable[[float], Sample]], seconds: float) -> Sample:
    """Let all runs train for `seconds` at the same time: their images per second, in sum."""
    meter = Meter()
    with ThreadPoolExecutor(len(runs)) as pool:
        samples = list(pool.map(lambda run: run(seconds), runs))
    other = meter.other_cpu(sum(sample.cpu_s for sample in samples))
    cpu_s = sum(sample.cpu_s / sample.seconds for sample in samples)
    return Sample(sum(sample.per_s for sample in samples), 1.0, cpu_s, other)


def measure_together(job: TrainingJob, measurement: Measurement) -> list[Row]:
    """Time one run, two, and two with fewer threads, in turn. Runs are stopped while others have their turn."""
    context = start_server()
    series: dict[str, Series] = {}
    running: dict[str, Callable[[], Sample]] = {}
    columns = {}
    limits = {"logs": job.images.cache / "logs", "limit_s": SET_UP_LIMIT_S + 20 * measurement.seconds}
    with ExitStack() as stack:
        for name, count in _RUNS.items():
            measurement.announce(f"set up {name}")
            own = replace(job, images=replace(job.images, workers=threads_of(name)))
            columns[name] = own.columns("together", measurement, name, note=_NOTES.get(name, ""))
            runs = []
            try:
                for number in range(count):
                    worker = Worker(context, set_up, f"{name} {number}", own, frozen=True, **limits)
                    stack.enter_context(worker).ready()
                    runs.append(worker.run)
            except SystemFailedError as error:
                series[name] = Series(failed=str(error))
                continue
            running[name] = partial(at_once, runs, measurement.seconds)
        series |= interleave(running, measurement)
    rows = [row for name in _RUNS for row in series_rows(series[name], **columns[name])]
    return rows + ratio_rows(RATIOS, series, columns.__getitem__)


def tables(rows: Sequence[Row]) -> list[str]:
    """Speeds and processor time of all runs together, and the ratios."""
    threads = dict.fromkeys(f"{row.system}: {row.workers}" for row in rows if not row.beside)
    return [
        f"Threads of each run: {'; '.join(threads)}.\n",
        pivot(rows, {"img_per_s": "img/s, in sum", "cpu_s_per_1000": "CPU s / 1,000 images"}),
        ratios(rows, "img/s, in sum"),
    ]


PAGE = Page("together", "Two trainings at once", tables, chart=("img_per_s", "images per second, all runs in sum"))
