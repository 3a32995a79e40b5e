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
from benchmarks.monitor import CPU, METRICS, MOST_CORE_SHARE, Reader, Sampler, metric, reader_of
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
NO_GPU = "there is no GPU on this machine"
NOT_READ = "training ran on the CPU, so the GPU was not read"


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
    note = f"read from {first['device']}" + (f", driver {first['driver']}" if first["driver"] else "")
    for name, unit in (("sampler_core_share", "1"), ("reached_hz", "1/s")):
        values = [summary[name] for summary in summaries]
        rows.append(summary_row(values, failed, metric=name, unit=unit, note=note, **columns))
    return rows + _reading_rows(summaries, failed, columns)


def _reading_rows(summaries: list[dict[str, Any]], failed: str, columns: dict[str, Any]) -> list[Row]:
    """Each reading's mean and median (the median over the rounds), minimum and maximum (of all rounds).

    A GPU's reading that is missing has one row, without a value and with the reason.
    """
    missing: dict[str, str] = summaries[0]["missing"]
    otherwise = "this GPU does not count it"
    if summaries[0]["device"] == CPU:
        otherwise = NO_GPU if columns["environment"].gpu == "none" else NOT_READ
    rows: list[Row] = []
    for name in dict.fromkeys([*METRICS, *(name for summary in summaries for name in summary["metrics"])]):
        unit = _unit(name)
        read = [summary["metrics"][name] for summary in summaries if name in summary["metrics"]]
        if failed or not read:
            why = failed or missing.get(name, otherwise)
            rows.append(Row(metric=f"{name} mean", unit=unit, value=None, failed=why, **columns))
            continue
        for statistic in STATISTICS:
            values = [one[statistic] for one in read]
            row = summary_row(values, metric=f"{name} {statistic}", unit=unit, **columns)
            if statistic in EXTREMES:
                row = replace(row, value=EXTREMES[statistic](values), low=None, high=None, coverage=None)
            rows.append(row)
    return rows


def _unit(name: str) -> str:
    ends = {"percent": "%", "bytes": "B", "mhz": "MHz", "per_s": "MiB/s", "_w": "W"}
    return next(unit for end, unit in ends.items() if name.endswith(end))


# ------------------------------------------------------------------ tables


def tables(rows: Sequence[Row]) -> list[str]:
    """Speed and data wait of each run, every reading, and what sampling cost."""
    speeds = {"img_per_s": "img/s", "img_per_s ratio": "share of speed with a cached batch", "data_wait": "data wait"}
    lines, readings = [], []
    for model, system in dict.fromkeys((row.model, row.system) for row in rows):
        found = {row.metric: row for row in rows if (row.model, row.system) == (model, system)}
        lines.append([model, system, *(cell(found.get(name)) for name in speeds)])
        for name in (_reading(row) for row in found.values() if row.metric.endswith(" mean") and row.value is not None):
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
        _missing(rows),
        _cost(rows),
    ]


def _noted(row: Row) -> bool:
    """Whether notes list the row: `_missing` has the readings, each with its reason."""
    return row.metric == "img_per_s" or (bool(row.failed) and row.metric in ("sampler_core_share", "reached_hz"))


def _reading(row: Row) -> str:
    return row.metric.rpartition(" ")[0]


def _missing(rows: Sequence[Row]) -> str:
    """The readings that are missing, by reason."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.metric.endswith(" mean") and row.value is None:
            reasons.setdefault(row.failed, {})[metric(_reading(row)).label] = None
    return "\n".join(f"- Not read: {', '.join(names)} ({reason})." for reason, names in reasons.items()) + "\n"


def _cost(rows: Sequence[Row]) -> str:
    """What the sampler cost, and what it read."""
    shares = [share for row in rows if row.metric == "sampler_core_share" for share in row.values]
    paces = [pace for row in rows if row.metric == "reached_hz" for pace in row.values]
    if not shares or not paces:
        return ""
    sources = dict.fromkeys(row.note for row in rows if row.metric == "reached_hz" and row.note)
    kept = "less than" if max(shares) < MOST_CORE_SHARE else "MORE than"
    return (
        f"The sampler ({'; '.join(sources)}) made {min(paces):.1f} to {max(paces):.1f} readings a second beside "
        f"training, and took {100 * min(shares):.2f} to {100 * max(shares):.2f} % of a core from start to end: {kept} "
        "the 1 % that it may take.\n"
    )


PAGE = Page("utilization", "Utilization", tables, noted=_noted)
