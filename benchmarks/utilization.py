"""The `utilization` benchmark: what the device does while a model trains, read many times a second by the parent.

NVML's "utilization" says only that some kernel ran. So it is always shown beside the images per second, their share of
the cached-batch ceiling, and the time that the loop waited for data.
"""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import click

from benchmarks.machine import Environment, Meter
from benchmarks.measure import Row, Sample, Series, interleave, ratio_row, series_rows, summary_row
from benchmarks.monitor import CPU, METRICS, MOST_CORE_SHARE, Reader, Sampler, in_order, metric, reader_of
from benchmarks.options import (
    advance,
    check_models,
    chosen,
    measured_on,
    publish,
    rounds_option,
    seconds_option,
    shared,
    training_images,
    training_options,
)
from benchmarks.tables import busy_text, cell, machine_text, notes, number, table
from benchmarks.training import BASELINE, CACHED, DALI, FOLDER, LAST, NATIVE, STYLES, TrainingJob, set_up, system_name
from benchmarks.worker import SET_UP_LIMIT_S, Announce, SetUp, Worker, start_server
from shards.common.errors import DataError
from shards.common.files import write_durably

START_UP, TRAINING = "start-up", "training"
"""The phases: before the clock starts, and what is counted."""
_KEYS = ("model", "system", "round", "phase", "device", "at_s")
"""First columns of a timeline; the others are readings."""
STATISTICS = ("mean", "median", "min", "max")
START_UP_KEPT_S = 5.0
"""The timeline has the readings of so many seconds before the clock starts."""
NO_GPU = "there is no GPU on this machine"
NOT_READ = "training ran on the CPU, so the GPU was not read"


@click.command("utilization")
@shared
@rounds_option(6, quick=5)
@training_options(["resnet18"])
@click.option(
    "--style",
    type=click.Choice(STYLES[1:]),
    default=LAST,
    show_default=True,
    help="How this project's network is run. Compiling starts with an empty cache in every round.",
)
@seconds_option(10, quick=1.5)
def command(
    quick: bool,
    out: Path,
    cache: Path,
    source: Path,
    rounds: int,
    workers: int,
    only: tuple[str, ...],
    models: tuple[str, ...],
    style: str,
    seconds: float,
    resolution: int,
    batch_size: int,
    device: str,
) -> None:
    """What the GPU does while a model trains, or the CPU's cores where there is none: a summary and a timeline.

    The raw readings go to utilization-timeline.csv beside the table; `report` draws them.
    """
    from shards.common.progress import Progress
    from train import device as devices

    chosen_device = devices.choose(device)
    names = chosen({name: name for name in systems(style, chosen_device.type == "cuda")}, only)
    check_models(models, resolution)
    images = training_images(source, cache, resolution, batch_size, workers, quick)
    machine = measured_on(images, device)
    stem = "utilization-quick" if quick else "utilization"
    rows: list[Row] = []
    moments: list[Moment] = []
    with Progress("utilization", len(models) * len(names) * rounds, "runs") as bar:
        for model in models:
            found, read = measure_utilization(
                TrainingJob(images, model, device),
                names,
                machine,
                rounds=rounds,
                seconds=seconds,
                announce=advance(bar),
                reader=lambda: reader_of(chosen_device),
            )
            rows += found
            moments += read
            write_timeline(out / f"{stem}-timeline.csv", moments)
            publish(out, stem, rows, utilization_text, show=model == models[-1])


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
    moments = list(moments)
    metrics = list(dict.fromkeys(name for moment in moments for name in moment.values))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_KEYS, *metrics])
    for m in moments:
        read = (f"{m.values[name]:.10g}" if name in m.values else "" for name in metrics)
        writer.writerow([m.model, m.system, m.round, m.phase, m.device, f"{m.at_s:.4f}", *read])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, out.getvalue().encode())


def read_timeline(path: Path) -> list[Moment]:
    """Read what `write_timeline` wrote. Raises DataError naming the file and what is wrong with it."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns = tuple(reader.fieldnames or ())
            if columns[: len(_KEYS)] != _KEYS:
                raise DataError(f"{path}: its columns are not those of a timeline of this release")
            metrics = columns[len(_KEYS) :]
            return [
                Moment(
                    line["model"],
                    line["system"],
                    int(line["round"]),
                    line["phase"],
                    line["device"],
                    float(line["at_s"]),
                    {name: float(line[name]) for name in metrics if line[name]},
                )
                for line in reader
            ]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a readable timeline ({error})") from None


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
    environment: Environment,
    *,
    rounds: int,
    seconds: float,
    announce: Announce,
    reader: Callable[[], Reader],
    set_up: SetUp = set_up,
) -> tuple[list[Row], list[Moment]]:
    """Train each system for at least `seconds` a round, in turn, while the device is read; rows and raw readings.

    In every round a system starts in its own process, and ends before the next one starts, so that memory, power and
    clocks are not those of another system. Start-up, compiling and warm-up come before the clock. reader: makes what
    reads the device; the sampler closes it. The rows of a system or a sampler that fails have the reason.
    """
    context = start_server()
    watched = {name: Watched() for name in names}

    def run(name: str) -> Sample:
        limit_s = SET_UP_LIMIT_S + 20 * seconds
        with (
            Sampler(reader()) as sampler,
            Worker(context, set_up, name, job, logs=job.images.cache / "logs", limit_s=limit_s) as worker,
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
        turns, rounds, warmup=0, announce=lambda round_, name: announce(f"round {round_ + 1} of {rounds}, {name}")
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
    rows = series_rows(series, **columns)
    waits = [sample.data_wait_s / sample.seconds for sample in series.samples]
    rows.append(summary_row(waits, series.failed, metric="data_wait", unit="1", **columns))
    rows.append(summary_row(watched.set_up_s, series.failed, metric="set_up_s", unit="s", **columns))
    if series.failed:
        return rows
    sampler_failed = next((s["error"] for s in watched.summaries if s["error"]), "")
    first = watched.summaries[0]
    note = f"read from {first['device']}" + (f", driver {first['driver']}" if first["driver"] else "")
    for name, unit in (("sampler_core_share", "1"), ("reached_hz", "1/s")):
        values = [summary[name] for summary in watched.summaries]
        rows.append(summary_row(values, sampler_failed, metric=name, unit=unit, note=note, **columns))
    return rows + _reading_rows(watched.summaries, sampler_failed, columns)


def _reading_rows(summaries: list[dict[str, Any]], failed: str, columns: dict[str, Any]) -> list[Row]:
    """Each reading's mean and median (the median over the rounds), minimum and maximum (of all rounds).

    A GPU's reading that is missing has one row, without a value and with the reason.
    """
    found = dict.fromkeys(name for summary in summaries for name in summary["metrics"])
    missing: dict[str, str] = summaries[0]["missing"]
    if summaries[0]["device"] == CPU:
        otherwise = NO_GPU if columns["environment"].gpu == "none" else NOT_READ
    else:
        otherwise = "this GPU does not count it"
    rows: list[Row] = []
    for name in dict.fromkeys([*METRICS, *found]):
        unit = _unit(name)
        if failed or name not in found:
            why = failed or missing.get(name, otherwise)
            rows.append(Row(metric=f"{name} mean", unit=unit, value=None, failed=why, **columns))
            continue
        read = [summary["metrics"][name] for summary in summaries if name in summary["metrics"]]
        for statistic in STATISTICS:
            values = [one[statistic] for one in read]
            row = summary_row(values, metric=f"{name} {statistic}", unit=unit, **columns)
            if statistic in ("min", "max"):
                row = replace(row, value=min(values) if statistic == "min" else max(values), low=None, high=None)
                row = replace(row, coverage=None)
            rows.append(row)
    return rows


def _unit(name: str) -> str:
    ends = {"percent": "%", "bytes": "B", "mhz": "MHz", "per_s": "MiB/s", "_w": "W"}
    return next(unit for end, unit in ends.items() if name.endswith(end))


def _columns(job: TrainingJob, name: str, environment: Environment) -> dict[str, Any]:
    return {
        "benchmark": "utilization",
        "system": name,
        "model": job.model,
        "packed": "originals" if FOLDER in name else "400 px jpg",
        "resolution_px": job.images.resolution_px,
        "batch_size": job.images.batch_size,
        "workers": job.images.workers,
        "page_cache": "" if CACHED in name else "warm",
        "environment": environment,
    }


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


def utilization_text(rows: Sequence[Row]) -> str:
    """The rows as Markdown: the summary of each run, every reading, and what sampling cost."""
    own = [row for row in rows if row.benchmark == "utilization"]
    gpu = any(row.value is not None and _reading(row) in METRICS for row in own)
    parts = [
        "## Utilization\n",
        "What the device did while a model trained. Speed, its share of the cached-batch ceiling and the share of time "
        "spent waiting for data come first; readings are means over the counted span, median [interval] over the "
        "rounds.\n",
        _start_up(own),
    ]
    if gpu:
        parts.append(
            "NVML busy says only that some kernel ran, not that the GPU was full: read it beside the first columns. "
            "Memory used is that of all processes on the GPU.\n"
        )
    else:
        reason = NOT_READ if any(row.failed == NOT_READ for row in own) else NO_GPU
        parts.append(
            f"The GPU columns are empty: {reason}. What was read are the CPU's cores, from the kernel's counters "
            "(10 ms steps, all processes on the machine); there the loader and the model share the cores, so cores "
            "that are busy are no sign that the model has them.\n"
        )
    parts.append(_summary(own))
    parts.append("Every reading; mean and median are medians over the rounds, min and max of all rounds:\n")
    parts.append(_readings(own))
    parts += [_missing(own), _cost(own), busy_text(own)]
    parts.append(notes([row for row in own if row.metric == "img_per_s" or (row.failed and _is_samplers(row))]))
    parts.append(machine_text(own))
    return "\n".join(part for part in parts if part)


def _is_samplers(row: Row) -> bool:
    return row.metric in ("sampler_core_share", "reached_hz")


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
    header = ["model", "system", "img/s", "share of the cached-batch ceiling", "data wait"]
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
    kept = "under" if max(shares) < MOST_CORE_SHARE else "NOT under"
    return (
        f"The sampler ({'; '.join(sources)}) made {min(paces):.1f} to {max(paces):.1f} readings a second beside "
        f"training, and took {100 * min(shares):.2f} to {100 * max(shares):.2f} % of a core from start to end: {kept} "
        "the 1 % it may take.\n"
    )


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
        text = f"Utilization: {row.model}, {row.system}: {number(row.value)} img/s"
        if share is not None and share.value is not None:
            text += f", {cell(share)} of the ceiling ({share.beside})"
        text += f", {100 * wait.value:.1f} % of the time waiting for data"
        cores = core_means(list(own.values()))
        if cores:
            text += f"; the CPU's cores were busy {fmean(cores):.0f} % of the time, by all processes on the machine"
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
