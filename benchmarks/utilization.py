"""The `utilization` benchmark: what the device does while a model trains, read many times a second from outside.

NVML's "utilization" says only that some kernel ran. Every figure of it stands beside the images per second, the share
of the cached-batch ceiling that they are, and the time that the loop was seen waiting for data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from time import perf_counter
from typing import Any

from benchmarks.gpu import UNITS
from benchmarks.machine import Environment, Meter
from benchmarks.measure import Row, Sample, Series, interleave, ratio_row, series_rows, summary_row
from benchmarks.monitor import Sampler, Source
from benchmarks.speed import BASELINE
from benchmarks.tables import cell, figure
from benchmarks.timeline import START_UP, TRAINING, Moment
from benchmarks.training import CACHED, DALI, FOLDER, NATIVE, TrainingJob, set_up, system_name
from benchmarks.worker import SET_UP_LIMIT_S, SetUp, Told, Worker, start_server

STATISTICS = ("mean", "median", "min", "max")
START_UP_KEPT_S = 5.0
"""Of the readings before the clock, those of the last seconds are kept for the timeline."""
CPU = "CPU"
"""How `benchmarks.monitor.CoreSource` calls what it reads."""
NO_GPU = "there is no GPU on this machine"
NOT_READ = "training ran on the CPU, so the GPU was not read"


@dataclass
class Watched:
    """What was read while one system ran. summaries: of each round's training; about: of what was read."""

    summaries: list[dict[str, Any]] = field(default_factory=list)
    set_up_s: list[float] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)


def systems(style: str, gpu: bool = False) -> tuple[str, ...]:
    """The ways to train that are watched: the ceiling, this project's loader (on a GPU, both that decode), and how
    these models are usually run."""
    ours = (NATIVE, DALI) if gpu else (NATIVE,)
    return system_name(style, CACHED), *(system_name(style, loader) for loader in ours), BASELINE


def measure_utilization(
    job: TrainingJob,
    names: Sequence[str],
    environment: Environment,
    *,
    rounds: int,
    seconds: float,
    told: Told,
    source: Callable[[], Source],
    set_up: SetUp = set_up,
) -> tuple[list[Row], list[Moment]]:
    """Train each system for at least `seconds` a round, in turn, while the device is read; rows and raw readings.

    In every round a system starts in a process of its own, and ends before the next one starts, so that memory, power
    and clocks are not those of another system; start-up, compiling and warm-up come before the clock. source: makes
    what is read; the sampler closes it. A system that fails keeps the reason; so do the readings of one whose sampler
    failed.
    """
    context = start_server()
    watched = {name: Watched() for name in names}

    def run(name: str) -> Sample:
        limit_s = SET_UP_LIMIT_S + 20 * seconds
        with (
            Sampler(source()) as sampler,
            Worker(context, set_up, name, job, logs=job.work.cache / "logs", limit_s=limit_s) as worker,
        ):
            about = worker.ready()
            meter, began = Meter(), perf_counter()
            sample = worker.run(seconds)
            ended = perf_counter()
            other = meter.other_cpu(sample.cpu_s)
        own = watched[name]
        span = (began - sampler.started, ended - sampler.started)
        own.summaries.append(sampler.summary(*span))
        own.set_up_s.append(about["set_up_s"])
        own.moments += _moments(job.model, name, len(own.summaries), sampler, *span)
        return replace(sample, other_cpu=other)

    turns = {name: (lambda name=name: run(name)) for name in names}
    series = interleave(
        turns, rounds, warmup=0, told=lambda round_, name: told(f"round {round_ + 1} of {rounds}, {name}")
    )
    rows: list[Row] = []
    ceiling = next((name for name in names if CACHED in name), "")
    for name in names:
        columns = _columns(job, name, environment)
        rows += _system_rows(series[name], watched[name], columns)
        if ceiling and name != ceiling:
            rows.append(ratio_row(series[name], series[ceiling], beside=ceiling, **columns))
    return rows, [moment for name in names for moment in watched[name].moments]


def _moments(model: str, name: str, round_: int, sampler: Sampler, began_s: float, ended_s: float) -> list[Moment]:
    """The readings of the end of start-up, and all of training; their clock starts with training's."""
    device = str(sampler.source.about["device"])
    found = []
    for one in sampler.readings:
        if one.values and began_s - START_UP_KEPT_S <= one.at_s <= ended_s:
            phase = START_UP if one.at_s < began_s else TRAINING
            found.append(Moment(model, name, round_, phase, device, one.at_s - began_s, one.values))
    return found


def _system_rows(series: Series, watched: Watched, columns: dict[str, Any]) -> list[Row]:
    """Speed, data wait, readings and the sampler's own cost of one system."""
    rows = series_rows(series, **columns)
    waits = [sample.data_wait_s / sample.seconds for sample in series.samples]
    rows.append(summary_row(waits, series.failed, metric="data_wait", unit="1", **columns))
    rows.append(summary_row(watched.set_up_s, series.failed, metric="set_up_s", unit="s", **columns))
    if series.failed:
        return rows
    sampler_failed = next((s["error"] for s in watched.summaries if s["error"]), "")
    first = watched.summaries[0]
    note = f"read from {first['device']}" + (f", driver {first['driver']}" if first["driver"] else "")
    for metric, unit in (("sampler_core_share", "1"), ("reached_hz", "1/s")):
        values = [summary[metric] for summary in watched.summaries]
        rows.append(summary_row(values, sampler_failed, metric=metric, unit=unit, note=note, **columns))
    return rows + _reading_rows(watched.summaries, sampler_failed, columns)


def _reading_rows(summaries: list[dict[str, Any]], failed: str, columns: dict[str, Any]) -> list[Row]:
    """Each metric's mean and median (the median over the rounds), least and largest (of all rounds).

    A GPU's metric that was not read is there once, without a value and with the reason.
    """
    found = dict.fromkeys(name for summary in summaries for name in summary["metrics"])
    missing: dict[str, str] = summaries[0]["missing"]
    if summaries[0]["device"] == CPU:
        otherwise = NO_GPU if columns["environment"].gpu == "none" else NOT_READ
    else:
        otherwise = "this GPU does not count it"
    rows: list[Row] = []
    for metric in dict.fromkeys([*UNITS, *found]):
        unit = _unit(metric)
        if failed or metric not in found:
            why = failed or missing.get(metric, otherwise)
            rows.append(Row(metric=f"{metric} mean", unit=unit, value=None, failed=why, **columns))
            continue
        told = [summary["metrics"][metric] for summary in summaries if metric in summary["metrics"]]
        for statistic in STATISTICS:
            values = [one[statistic] for one in told]
            row = summary_row(values, metric=f"{metric} {statistic}", unit=unit, **columns)
            if statistic in ("min", "max"):
                row = replace(row, value=min(values) if statistic == "min" else max(values), low=None, high=None)
                row = replace(row, coverage=None)
            rows.append(row)
    return rows


def _unit(metric: str) -> str:
    ends = {"percent": "%", "bytes": "B", "mhz": "MHz", "per_s": "MiB/s", "_w": "W"}
    return next(unit for end, unit in ends.items() if metric.endswith(end))


def _columns(job: TrainingJob, name: str, environment: Environment) -> dict[str, Any]:
    return {
        "benchmark": "utilization",
        "system": name,
        "model": job.model,
        "packed": "originals" if FOLDER in name else "400 px jpg",
        "resolution_px": job.work.resolution_px,
        "batch_size": job.work.batch_size,
        "workers": job.work.workers,
        "page_cache": "" if CACHED in name else "warm",
        "environment": environment,
    }


def utilization_in_words(rows: Sequence[Row]) -> list[str]:
    """A sentence for each model and loader: speed, ceiling and wait first, what the device did after them."""
    said = []
    for row in rows:
        if row.metric != "img_per_s" or CACHED in row.system:
            continue
        own = {r.metric: r for r in rows if (r.model, r.system) == (row.model, row.system)}
        wait, share = own["data_wait"], own.get("img_per_s ratio")
        if row.value is None or wait.value is None:
            said.append(f"Utilization: {row.model}, {row.system} failed: {row.failed}.")
            continue
        text = f"Utilization: {row.model}, {row.system}: {figure(row.value)} img/s"
        if share is not None and share.value is not None:
            text += f", {cell(share)} of the ceiling ({share.beside})"
        text += f", {100 * wait.value:.1f} % of the time waiting for data"
        cores = core_means(list(own.values()))
        if cores:
            text += f"; the CPU's cores were busy {fmean(cores):.0f} % of the time, with all that ran on the machine"
        busy, full = own.get("busy_percent mean"), own.get("sm_percent mean")
        if full is not None and full.value is not None:
            text += f"; {full.value:.0f} % of the GPU's multiprocessors were busy (GPM)"
        if busy is not None and busy.value is not None:
            text += f"; a kernel ran {busy.value:.0f} % of the time (NVML), which does not mean that the GPU was full"
        said.append(text + ".")
    return said


def core_means(rows: Sequence[Row]) -> list[float]:
    """The mean use of each CPU core, percent, in the order of the cores."""
    return [
        r.value for r in rows if r.metric.startswith("core_") and r.metric.endswith(" mean") and r.value is not None
    ]
