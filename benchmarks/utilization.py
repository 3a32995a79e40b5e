"""The `utilization` benchmark: what the device does while a model trains, read many times a second by the parent.

NVML's "utilization" says only that some kernel ran. So it is always shown beside the images per second, their share of
the cached-batch ceiling, and the time that the loop waited for data.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.machine import Meter
from benchmarks.measure import (
    Measurement,
    Row,
    Sample,
    Series,
    interleave,
    ratio_row,
    series_rows,
    summary_row,
    wait_row,
)
from benchmarks.monitor import METRICS, Reader, Sampler, metric, reader_of
from benchmarks.options import ONLY, WORKERS, Settings, benchmark, training_options
from benchmarks.pages import Page
from benchmarks.tables import cell, number, table
from benchmarks.training import (
    BASELINE,
    CACHED,
    DALI,
    LAST,
    NATIVE,
    TrainingJob,
    set_up,
    system_name,
    train_models,
)
from benchmarks.worker import SET_UP_LIMIT_S, SetUp, Worker, start_server

EXTREMES: dict[str, Callable[[list[float]], float]] = {"min": min, "max": max}
STATISTICS = ("mean", "median", *EXTREMES)


@benchmark("utilization", ONLY, WORKERS, *training_options(["resnet18"]), rounds=(6, 5), seconds=(10, 1.5))
def command(settings: Settings) -> None:
    """Speed, data wait, and what the GPU does while a model trains, or the CPU's cores where there is none."""
    from train import device as devices

    device = devices.choose(settings.device)
    names = settings.chosen({name: name for name in systems(device.type == "cuda")})

    def measure(job: TrainingJob, measurement: Measurement) -> list[Row]:
        return measure_utilization(job, names, measurement, reader=lambda: reader_of(device))

    train_models(settings, PAGE, len(names) * settings.rounds, measure)


# ------------------------------------------------------------------ the measurement


def systems(gpu: bool) -> tuple[str, ...]:
    """The ways to train that are watched: the ceiling, this project's loader (on a GPU, both that decode) and the usual
    one."""
    return *(system_name(LAST, source) for source in (CACHED, NATIVE, *([DALI] if gpu else []))), BASELINE


def measure_utilization(
    job: TrainingJob,
    names: Sequence[str],
    measurement: Measurement,
    *,
    reader: Callable[[], Reader],
    set_up: SetUp = set_up,
) -> list[Row]:
    """Train each system in turn while the device is read.

    In every round a system starts in its own process, and ends before the next one starts, so that memory, power and
    clocks are not those of another system. Start-up, compiling and warm-up come before the clock. reader: makes what
    reads the device; the sampler closes it. The rows of a system or a sampler that fails have the reason.
    """
    context = start_server()
    watched: dict[str, list[dict[str, Any]]] = {name: [] for name in names}  # summaries, one of each round
    logs, limit_s = job.images.cache / "logs", SET_UP_LIMIT_S + 20 * measurement.seconds

    def run(name: str) -> Sample:
        with Worker(context, set_up, name, job, logs=logs, limit_s=limit_s) as worker:
            worker.ready()
            meter = Meter()
            with Sampler(reader()) as sampler:
                sample = worker.run(measurement.seconds)
            watched[name].append(sampler.summary())
            return replace(sample, other_cpu=meter.other_cpu(sample.cpu_s))

    series = interleave({name: (lambda name=name: run(name)) for name in names}, measurement, warmup=0)
    rows: list[Row] = []
    ceiling = next((name for name in names if CACHED in name), "")
    for name in names:
        columns = job.columns("utilization", measurement, name)
        rows += _system_rows(series[name], watched[name], columns)
        if ceiling and name != ceiling:
            rows.append(ratio_row(series[name], series[ceiling], beside=ceiling, **columns))
    return rows


def _system_rows(series: Series, summaries: list[dict[str, Any]], columns: dict[str, Any]) -> list[Row]:
    """Speed, data wait, readings and the sampler's own cost of one system."""
    rows = [*series_rows(series, **columns), wait_row(series, **columns)]
    if series.failed:
        return rows
    failed = next((summary["error"] for summary in summaries if summary["error"]), "")
    first = summaries[0]
    missing = ", ".join(f"{metric(name).label} ({reason})" for name, reason in first["missing"].items())
    driver, left_out = first["driver"] and f", driver {first['driver']}", missing and f"; not read: {missing}"
    note = f"read from {first['device']}{driver}{left_out}"
    for name, unit in (("sampler_core_share", "1"), ("reached_hz", "1/s")):
        values = [summary[name] for summary in summaries]
        rows.append(summary_row(values, failed, metric=name, unit=unit, note=note, **columns))
    return rows if failed else rows + _reading_rows(summaries, columns)


def _reading_rows(summaries: list[dict[str, Any]], columns: dict[str, Any]) -> list[Row]:
    """Each reading's mean and median (the median over the rounds), minimum and maximum (of all rounds)."""
    rows: list[Row] = []
    for name in dict.fromkeys([*METRICS, *(name for summary in summaries for name in summary["metrics"])]):
        read = [summary["metrics"][name] for summary in summaries if name in summary["metrics"]]
        for statistic in STATISTICS if read else ():
            values = [one[statistic] for one in read]
            row = summary_row(values, metric=f"{name} {statistic}", unit=_unit(name), **columns)
            if statistic in EXTREMES:
                row = replace(row, value=EXTREMES[statistic](values), low=None, high=None, coverage=None)
            rows.append(row)
    return rows


def _unit(name: str) -> str:
    ends = {"percent": "%", "bytes": "B", "mhz": "MHz", "_w": "W"}
    return next(unit for end, unit in ends.items() if name.endswith(end))


# ------------------------------------------------------------------ tables


def tables(rows: Sequence[Row]) -> list[str]:
    """Speed, data wait and the sampler of each run, and every reading."""
    speeds = {"img_per_s": "img/s", "img_per_s ratio": "share of speed with a cached batch", "data_wait": "data wait"}
    speeds |= {"reached_hz": "readings / s", "sampler_core_share": "sampler, of a core"}
    lines, readings = [], []
    for model, system in dict.fromkeys((row.model, row.system) for row in rows):
        found = {row.metric: row for row in rows if (row.model, row.system) == (model, system)}
        lines.append([model, system, *(cell(found.get(name)) for name in speeds)])
        for name in (each.removesuffix(" mean") for each in found if each.endswith(" mean")):
            what = metric(name)
            shown = (number((found[f"{name} {one}"].value or 0.0) / what.divisor) for one in STATISTICS)
            readings.append([model, system, what.label, what.unit, *shown, what.meaning])
    return [
        "What the device did while a model trained. Each system starts in a process of its own, and ends before the "
        "next. Starting, compiling and warming up come before the clock.\n",
        table(["model", "system", *speeds.values()], lines),
        "Every reading; mean and median are medians over the rounds, min and max of all rounds. NVML busy says only "
        "that some kernel ran, not that the GPU was full. Memory used is that of all processes. Where a CPU trains, "
        "the loader and the model share the cores: busy cores are no sign that the model has them.\n",
        table(["model", "system", "reading", "unit", *STATISTICS, "what it is"], readings),
    ]


PAGE = Page("utilization", "Utilization", tables)
