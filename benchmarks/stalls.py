"""The `stalls` benchmark: how much of training is waiting for data, found by removing the causes one by one.

DS-Analyzer's differential method (Mohan et al., VLDB 2021, "Analyzing and mitigating data stalls in DNN training"):
the same training with one cached batch (no stall), with the files in memory (prep stall: decoding does not keep up)
and with files that are only on the disk (fetch stall on top). Beside it, the waiting that is counted in the loop.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click

from benchmarks.machine import Environment
from benchmarks.measure import Row, Series, series_rows, summary_row
from benchmarks.options import rounds_option, seconds_option, shared, training_options
from benchmarks.tables import busy_text, cell, machine_text, notes, table
from benchmarks.training import (
    CACHED,
    COLD,
    COLD_DALI,
    COLD_RAW,
    DALI,
    LAST,
    NATIVE,
    RAW,
    RESIDENT,
    STYLES,
    TrainingJob,
    set_up,
    system_name,
    train_models,
)
from benchmarks.worker import Announce, take_turns
from shards.common.errors import UsageError

ENGINES = {"jpg": (NATIVE, COLD), "raw": (RAW, COLD_RAW), "resident": (RESIDENT,), "dali": (DALI, COLD_DALI)}
"""What is measured of each engine: warm files, and cold ones if the engine reads files during training."""
AGREE_WITHIN = 0.05
"""The differential stall and the counted wait may differ by this share of the time."""
AU_LINE = 0.90
"""MLPerf Storage's minimum accelerator utilization for image classification (3D-UNet and ResNet-50)."""


@click.command("stalls")
@shared
@rounds_option(20, quick=10)
@training_options(quick="resnet18")
@click.option("--add", is_flag=True, help="Keep the rows that the table in --out has for other models.")
@seconds_option(1, quick=0.5)
@click.option(
    "--style",
    type=click.Choice(STYLES),
    default=LAST,
    show_default=True,
    help="How the models are run.",
)
@click.option(
    "--engine",
    "engines",
    type=click.Choice(list(ENGINES)),
    multiple=True,
    help="native with JPEG or raw files, resident, or dali with JPEG files. Repeatable.  [default: the first three, on "
    "a GPU all four; quick jpg]",
)
def command(
    quick: bool,
    rounds: int,
    seconds: float,
    only: tuple[str, ...],
    style: str,
    engines: tuple[str, ...],
    **settings: Any,
) -> None:
    """How much of training waits for data: cached batch, warm files, cold files, and the counted wait.

    Rounds are many and short: the speed of a machine drifts, so turns that are compared should be near each other. A
    turn is at least one step, so use a smaller --batch-size for a model whose steps take seconds.
    """
    from train import device as devices

    if only:
        raise UsageError("--only: the systems of `stalls` belong together; choose models with --model")

    def measure(job: TrainingJob, machine: Environment, rounds: int, seconds: float, announce: Announce) -> list[Row]:
        job = replace(job, synchronized=True)
        return measure_stalls(job, style, engines, machine, rounds=rounds, seconds=seconds, announce=announce)

    gpu = devices.choose(settings["device"]).type == "cuda"
    engines = engines or (("jpg",) if quick else tuple(name for name in ENGINES if gpu or name != "dali"))
    systems = 1 + sum(len(ENGINES[engine]) for engine in engines)
    settings["models"] = settings["models"] or (("resnet18",) if quick else ())
    train_models("stalls", measure, systems, stalls_text, quick, rounds, seconds=seconds, **settings)


def measure_stalls(
    job: TrainingJob,
    style: str,
    engines: Sequence[str],
    environment: Environment,
    *,
    rounds: int,
    seconds: float,
    announce: Announce,
) -> list[Row]:
    """Time one model with a cached batch, and with each engine's warm and cold files, in turn. engines: of ENGINES."""
    ceiling = system_name(style, CACHED)
    fed = [[system_name(style, source) for source in ENGINES[engine]] for engine in engines]
    names = [ceiling, *(name for each in fed for name in each)]
    series, _ = take_turns(
        set_up,
        turns(ceiling, fed),
        job,
        job.images.cache / "logs",
        rounds=rounds,
        seconds=seconds,
        announce=announce,
        frozen=True,
    )
    cached = series[ceiling]
    rows: list[Row] = []
    for name in names:
        rows += series_rows(series[name], **_columns(job, name, environment))
    for warm, *cold in fed:
        compared = [(warm, cached, "prep_stall")]
        for name in cold:
            compared += [(name, series[warm], "fetch_stall"), (name, cached, "whole_stall")]
        for name, faster, metric in compared:
            rows.append(_stall(series[name], faster, metric, _columns(job, name, environment)))
        for name in (warm, *cold):
            columns = _columns(job, name, environment)
            waits = [s.data_wait_s / s.seconds for s in series[name].samples]
            rows.append(summary_row(waits, series[name].failed, metric="data_wait", unit="1", **columns))
            rows.append(_utilization(series[name], cached, columns))
    return rows


def turns(ceiling: str, fed: Sequence[Sequence[str]]) -> list[str]:
    """The order within a round: the cached batch in the middle, warm files next to it, and cold files, which take
    longest, outside. The machine's speed drifts, so systems that are compared should be near each other."""
    before: list[str] = []
    after: list[str] = []
    for place, (warm, *cold) in enumerate(fed):
        if place % 2:
            after = [warm, *after, *cold]
        else:
            before = [*cold, *before, warm]
    return [*before, ceiling, *after]


def _stall(slower: Series, faster: Series, metric: str, columns: dict[str, Any]) -> Row:
    """Share of the slower system's time that the faster one does not need, round by round; below 0 it is noise."""
    failed = slower.failed or faster.failed
    shares = [] if failed else [1 - s.per_s / f.per_s for s, f in zip(slower.samples, faster.samples, strict=True)]
    return summary_row(shares, failed, metric=metric, unit="1", **columns)


def _utilization(own: Series, cached: Series, columns: dict[str, Any]) -> Row:
    """MLPerf Storage's AU: the time that computing alone takes, divided by the time that training took. Set-up with its
    first steps, and a whole warm-up round, are not timed."""
    failed = own.failed or cached.failed
    shares = [] if failed else [s.per_s / c.per_s for s, c in zip(own.samples, cached.samples, strict=True)]
    return summary_row(shares, failed, metric="accelerator_utilization", unit="1", **columns)


def _columns(job: TrainingJob, name: str, environment: Environment) -> dict[str, Any]:
    return {
        "benchmark": "stalls",
        "system": name,
        "model": job.model,
        "packed": f"400 px {'raw' if RAW in name else 'jpg'}",
        "resolution_px": job.images.resolution_px,
        "batch_size": job.images.batch_size,
        "workers": job.images.workers,
        "page_cache": "" if CACHED in name else "cold" if name.endswith("cold files") else "warm",
        "environment": environment,
    }


def agreement(stall: Row | None, wait: Row | None) -> str:
    """Whether the differential stall and the counted wait agree, in words: they do if the stall's whole interval lies
    within `AGREE_WITHIN` of the wait, they do not if none of it does."""
    if stall is None or wait is None or stall.value is None or wait.value is None:
        return ""
    points = f"{100 * abs(stall.value - wait.value):.1f} points apart"
    low, high = stall.ends
    from_below, to_above = wait.value - AGREE_WITHIN, wait.value + AGREE_WITHIN
    if from_below <= low and high <= to_above:
        return f"{points}: they agree"
    if high < from_below or low > to_above:
        return f"{points}: they do not agree"
    return f"{points}, undecided: the stall lies between {100 * low:.1f} and {100 * high:.1f} %"


def by_engine(rows: Sequence[Row]) -> list[tuple[str, str, dict[tuple[str, str], Row]]]:
    """The rows of each model and engine: (model, engine, (page cache, metric) → row), with the cached batch's rows."""
    found: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    sources = {source: engine for engine, known in ENGINES.items() for source in known}
    for row in rows:
        engine = sources.get(row.system.partition(", ")[2])
        if engine is not None:
            found.setdefault((row.model, engine), {})[row.page_cache, row.metric] = row
    ceilings = {(row.model, row.metric): row for row in rows if row.system.endswith(CACHED)}
    return [
        (model, engine, own | {("", metric): row for (of, metric), row in ceilings.items() if of == model})
        for (model, engine), own in found.items()
    ]


def stalls_text(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    own = [row for row in rows if row.benchmark == "stalls"]
    parts = ["## Stalls\n"]
    parts.append(
        "Percentages of training time. Prep stall: warm files against a cached batch. Fetch stall: cold files against "
        "warm ones. Data wait: counted in the loop. On a CPU the loader and the model share the cores: a prep stall is "
        "then time that decoding took from the model, and little of it is waiting.\n"
    )
    lines = []
    for model, engine, found in by_engine(own):
        batch = next(iter(found.values())).batch_size
        line = [model, str(batch or ""), engine, cell(found.get(("", "img_per_s")))]
        for cache, stall in (("warm", "prep_stall"), ("cold", "whole_stall")):
            differential, wait = found.get((cache, stall)), found.get((cache, "data_wait"))
            line += [_percent(differential), _percent(wait), agreement(differential, wait)]
            utilization = found.get((cache, "accelerator_utilization"))
            line.append(_percent(utilization) + _line(utilization))
            if cache == "cold":
                line.append(_percent(found.get((cache, "fetch_stall"))))
        lines.append(line)
    header = ["model", "batch", "engine", "img/s cached", "prep stall, %", "data wait, %", "the two", "AU warm, %"]
    header += ["whole stall, cold, %", "data wait, cold, %", "the two, cold", "AU cold, %", "fetch stall, %"]
    parts.append(table(header, lines))
    parts += [busy_text(own), notes(own), machine_text(own)]
    return "\n".join(part for part in parts if part)


def _percent(row: Row | None) -> str:
    """A share as a percentage."""
    if row is None or row.value is None:
        return cell(row)
    low, high = (None if end is None else 100 * end for end in (row.low, row.high))
    return cell(replace(row, value=100 * row.value, low=low, high=high))


def _line(row: Row | None) -> str:
    """On which side of MLPerf Storage's line the whole interval lies."""
    if row is None or row.value is None:
        return ""
    low, high = row.ends
    said = "at least" if low >= AU_LINE else "under" if high < AU_LINE else "undecided:"
    return f" ({said} {AU_LINE:.0%})"
