"""The `utilization` benchmark: what the device does while a model trains, read many times a second by the parent.

NVML's "utilization" says only that some kernel ran. So it is always shown beside the images per second, their share of
the cached-batch ceiling, and the time that the loop waited for data.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import click

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
from benchmarks.monitor import CPU, METRICS, MOST_CORE_SHARE, Reader, Sampler, in_order, metric, reader_of
from benchmarks.options import ONLY, WORKERS, Settings, benchmark, training_options
from benchmarks.pages import Page
from benchmarks.tables import cell, number, table
from benchmarks.training import (
    BASELINE,
    CACHED,
    DALI,
    LAST,
    NATIVE,
    STYLES,
    TrainingJob,
    set_up,
    system_name,
    train_models,
)
from benchmarks.worker import SET_UP_LIMIT_S, SetUp, Worker, start_server
from shards.common.errors import DataError
from shards.common.files import write_durably

START_UP, TRAINING = "start-up", "training"
"""The phases: before the clock starts, and what is counted."""
_KEYS = ("model", "system", "round", "phase", "device", "at_s")
"""First columns of a timeline; the others are readings."""
EXTREMES: dict[str, Callable[[list[float]], float]] = {"min": min, "max": max}
STATISTICS = ("mean", "median", *EXTREMES)
START_UP_KEPT_S = 5.0
"""The timeline has the readings of so many seconds before the clock starts."""
NO_GPU = "there is no GPU on this machine"
NOT_READ = "training ran on the CPU, so the GPU was not read"


@benchmark("utilization", ONLY, WORKERS, *training_options(["resnet18"]), rounds=(6, 5), seconds=(10, 1.5))
@click.option(
    "--style",
    type=click.Choice(STYLES[1:]),
    default=LAST,
    show_default=True,
    help="How this project's network is run. Compiling starts with an empty cache in every round.",
)
def command(settings: Settings, style: str) -> None:
    """What the GPU does while a model trains, or the CPU's cores where there is none: a summary and a timeline.

    The raw readings go to utilization-timeline.csv beside the table; `report` draws them.
    """
    from train import device as devices

    device = devices.choose(settings.device)
    names = settings.chosen({name: name for name in systems(style, device.type == "cuda")})
    moments: list[Moment] = []

    def measure(job: TrainingJob, measurement: Measurement) -> list[Row]:
        rows, read = measure_utilization(job, names, measurement, reader=lambda: reader_of(device))
        moments.extend(read)
        write_timeline(timeline_of(settings.table), moments)
        return rows

    train_models(settings, PAGE, len(names) * settings.rounds, measure)


def timeline_of(table: Path) -> Path:
    """The CSV of the raw readings beside that of a table."""
    return table.with_name(f"{table.stem}-timeline.csv")


# ------------------------------------------------------------------ the timeline


@dataclass(frozen=True, slots=True)
class Moment:
    """What was read at one moment.

    device: what was read. at_s: seconds since the clock of training started, negative before. values: by the name of
    the reading (`monitor.METRICS`, or `core_N_percent`).
    """

    model: str
    system: str
    round: int
    phase: str
    device: str
    at_s: float
    values: Mapping[str, float]


def write_timeline(path: Path, moments: Iterable[Moment]) -> None:
    """Write a line for each moment, the whole file or nothing; what was not read is empty."""
    import pandas as pd

    frame = pd.DataFrame([{name: getattr(m, name) for name in _KEYS} | dict(m.values) for m in moments])
    frame = frame.round({"at_s": 4})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, frame.to_csv(index=False, float_format="%.10g", lineterminator="\n").encode())


def read_timeline(path: Path) -> list[Moment]:
    """Read what `write_timeline` wrote. Raises DataError naming the file and what is wrong with it."""
    import pandas as pd

    try:
        frame = pd.read_csv(path, dtype={"round": int, "at_s": float})
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable timeline ({error})") from None
    if tuple(frame.columns[: len(_KEYS)]) != _KEYS:
        raise DataError(f"{path}: its columns are not those of a timeline of this release")
    keys, readings = frame[[*_KEYS]], frame.drop(columns=[*_KEYS])
    return [
        Moment(*own, values={name: value for name, value in read.items() if value == value})  # not NaN
        for own, read in zip(keys.itertuples(index=False), readings.to_dict("records"), strict=True)
    ]


# ------------------------------------------------------------------ the measurement


@dataclass
class Watched:
    """What was read while one system ran. summaries: one of each round's training. set_up_s: of each round."""

    summaries: list[dict[str, Any]] = field(default_factory=list)
    set_up_s: list[float] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)


def systems(style: str, gpu: bool = False) -> tuple[str, ...]:
    """The ways to train that are watched: the ceiling, this project's loader (on a GPU, both that decode) and the usual
    one."""
    ours = (NATIVE, DALI) if gpu else (NATIVE,)
    return system_name(style, CACHED), *(system_name(style, loader) for loader in ours), BASELINE


def measure_utilization(
    job: TrainingJob,
    names: Sequence[str],
    measurement: Measurement,
    *,
    reader: Callable[[], Reader],
    set_up: SetUp = set_up,
) -> tuple[list[Row], list[Moment]]:
    """Train each system in turn while the device is read; rows and raw readings.

    In every round a system starts in its own process, and ends before the next one starts, so that memory, power and
    clocks are not those of another system. Start-up, compiling and warm-up come before the clock. reader: makes what
    reads the device; the sampler closes it. The rows of a system or a sampler that fails have the reason.
    """
    context = start_server()
    watched = {name: Watched() for name in names}
    logs, limit_s = job.images.cache / "logs", SET_UP_LIMIT_S + 20 * measurement.seconds

    def run(name: str) -> Sample:
        with (
            Sampler(reader()) as sampler,
            Worker(context, set_up, name, job, logs=logs, limit_s=limit_s) as worker,
        ):
            about = worker.ready()
            meter, began = Meter(), perf_counter()
            sample = worker.run(measurement.seconds)
            ended = perf_counter()
            other = meter.other_cpu(sample.cpu_s)
        own = watched[name]
        span = (began - sampler.started, ended - sampler.started)
        own.summaries.append(sampler.summary(*span))
        own.set_up_s.append(about["set_up_s"])
        own.moments += _moments(job.model, name, len(own.summaries), sampler, *span)
        return replace(sample, other_cpu=other)

    series = interleave({name: (lambda name=name: run(name)) for name in names}, measurement, warmup=0)
    rows: list[Row] = []
    ceiling = next((name for name in names if CACHED in name), "")
    for name in names:
        columns = job.columns("utilization", measurement, name)
        rows += _system_rows(series[name], watched[name], columns)
        if ceiling and name != ceiling:
            rows.append(ratio_row(series[name], series[ceiling], beside=ceiling, **columns))
    return rows, [moment for name in names for moment in watched[name].moments]


def _moments(model: str, name: str, round_: int, sampler: Sampler, began_s: float, ended_s: float) -> list[Moment]:
    """The readings from the end of start-up, and all of training; time 0 is the start of training."""
    device = str(sampler.reader.about["device"])
    found = []
    for one in sampler.readings:
        if one.values and began_s - START_UP_KEPT_S <= one.at_s <= ended_s:
            phase = START_UP if one.at_s < began_s else TRAINING
            found.append(Moment(model, name, round_, phase, device, one.at_s - began_s, one.values))
    return found


def _system_rows(series: Series, watched: Watched, columns: dict[str, Any]) -> list[Row]:
    """Speed, data wait, readings and the sampler's own cost of one system."""
    rows = [*series_rows(series, **columns), wait_row(series, **columns)]
    rows.append(summary_row(watched.set_up_s, series.failed, metric="set_up_s", unit="s", **columns))
    if series.failed:
        return rows
    failed = next((summary["error"] for summary in watched.summaries if summary["error"]), "")
    first = watched.summaries[0]
    note = f"read from {first['device']}" + (f", driver {first['driver']}" if first["driver"] else "")
    for name, unit in (("sampler_core_share", "1"), ("reached_hz", "1/s")):
        values = [summary[name] for summary in watched.summaries]
        rows.append(summary_row(values, failed, metric=name, unit=unit, note=note, **columns))
    return rows + _reading_rows(watched.summaries, failed, columns)


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


# ------------------------------------------------------------------ tables and words


_SUMMARY = (
    "sm_percent",
    "tensor_percent",
    "occupancy_percent",
    "dram_percent",
    "memory_used_bytes",
    "power_w",
    "sm_mhz",
    "pcie_rx_mib_per_s",
    "pcie_tx_mib_per_s",
    "busy_percent",
)
"""Columns of the summary for a GPU; NVML's "utilization" is the last one."""


def tables(rows: Sequence[Row]) -> list[str]:
    """The summary of each run, every reading, and what sampling cost."""
    parts = [
        "What the device did while a model trained. Speed, its share of the speed with a cached batch and the share of "
        "time spent waiting for data come first; readings are means over the counted span, median [interval] over the "
        "rounds.\n",
        _start_up(rows),
    ]
    if any(row.value is not None and _reading(row) in METRICS for row in rows):
        parts.append(
            "NVML busy says only that some kernel ran, not that the GPU was full: read it beside the first columns. "
            "Memory used is that of all processes on the GPU.\n"
        )
    else:
        reason = NOT_READ if any(row.failed == NOT_READ for row in rows) else NO_GPU
        parts.append(
            f"The GPU columns are empty: {reason}. What was read are the CPU's cores, from the kernel's counters "
            "(10 ms steps, all processes on the machine); there the loader and the model share the cores, so cores "
            "that are busy are no sign that the model has them.\n"
        )
    parts += [
        _summary(rows),
        "Every reading; mean and median are medians over the rounds, min and max of all rounds:\n",
    ]
    return [*parts, _readings(rows), _missing(rows), _cost(rows)]


def _noted(row: Row) -> bool:
    """Whether notes list the row: `_missing` has the readings, each with its reason."""
    return row.metric == "img_per_s" or (bool(row.failed) and row.metric in ("sampler_core_share", "reached_hz"))


def _reading(row: Row) -> str:
    return row.metric.rpartition(" ")[0]


def _runs(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """(model, system) → its rows."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.model, row.system), []).append(row)
    return found


def _start_up(rows: Sequence[Row]) -> str:
    took = [row.value for row in rows if row.metric == "set_up_s" and row.value is not None]
    if not took:
        return ""
    return (
        "In every round each system started in a process of its own, and ended before the next. Starting, compiling "
        f"where it compiles, and three warm-up passes ({number(min(took))} to {number(max(took))} s, median of each "
        "system) come before the clock: they are in no figure here.\n"
    )


def _summary(rows: Sequence[Row]) -> str:
    cores = any(core_means(run) for run in _runs(rows).values())
    header = ["model", "system", "img/s", "share of the speed with a cached batch", "data wait"]
    header += ["CPU cores, mean %, one by one"] if cores else []
    header += [f"{metric(name).label}, {metric(name).unit}" for name in _SUMMARY]
    lines = []
    for (model, system), run in _runs(rows).items():
        found = {row.metric: row for row in run}
        line = [model, system, *(cell(found.get(name)) for name in ("img_per_s", "img_per_s ratio", "data_wait"))]
        line += [" / ".join(f"{mean:.0f}" for mean in core_means(run))] if cores else []
        lines.append([*line, *(_shown(found.get(f"{name} mean"), name) for name in _SUMMARY)])
    return table(header, lines)


def _shown(row: Row | None, name: str) -> str:
    """A reading for people; empty where there is none: the reason is below the tables."""
    return "" if row is None or row.value is None else number(row.value / metric(name).divisor)


def _readings(rows: Sequence[Row]) -> str:
    lines = []
    for (model, system), run in _runs(rows).items():
        found = {row.metric: row for row in run}
        for name in in_order(_reading(row) for row in run if row.metric.endswith(" mean")):
            if found[f"{name} mean"].value is None:
                continue
            what = metric(name)
            shown = (_shown(found.get(f"{name} {statistic}"), name) for statistic in STATISTICS)
            lines.append([model, system, what.label, what.unit, *shown, what.meaning])
    return table(["model", "system", "reading", "unit", *STATISTICS, "what it is"], lines)


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


def core_means(rows: Sequence[Row]) -> list[float]:
    """The mean use of each CPU core, percent, in the order of the cores."""
    return [
        r.value for r in rows if r.metric.startswith("core_") and r.metric.endswith(" mean") and r.value is not None
    ]


PAGE = Page("utilization", "Utilization", tables, noted=_noted)
