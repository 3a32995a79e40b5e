"""The `stalls` benchmark: how much of training is waiting for data, found by removing the causes one by one.

DS-Analyzer's differential method (Mohan et al., VLDB 2021, "Analyzing and mitigating data stalls in DNN training"):
the same training with one cached batch (no stall), with the files in memory (prep stall: decoding does not keep up)
and with files that are only on the disk (fetch stall on top). Beside it, the waiting that is counted in the loop. A GPU
is not synchronised for that before each batch, which would be a stall of its own: the host runs ahead of it, and waits
for batches that are not needed yet. So for a GPU only the differential stalls count.
"""

from collections.abc import Sequence
from dataclasses import replace

from benchmarks import training
from benchmarks.measure import Measurement, Row, Series, paired_row, series_rows, wait_row
from benchmarks.options import ADD, WORKERS, Settings, benchmark, training_options
from benchmarks.pages import Page
from benchmarks.tables import cell, table
from benchmarks.training import CACHED, LAST, TrainingJob, set_up, system_name, train_models
from benchmarks.worker import take_turns

ENGINES = {
    "jpg": (training.NATIVE, training.COLD),
    "raw": (training.RAW, training.COLD_RAW),
    "resident": (training.RESIDENT,),
    "dali": (training.DALI, training.COLD_DALI),
}
"""What is measured of each engine: warm files, and cold ones if the engine reads files during training."""
AGREE_WITHIN = 0.05
"""The differential stall and the counted wait may differ by this share of the time."""


@benchmark("stalls", WORKERS, *training_options(quick=["resnet18"]), ADD, rounds=(20, 10), seconds=(1, 0.5))
def command(settings: Settings) -> None:
    """How much of training waits for data: cached batch, warm files, cold files, and the counted wait.

    Rounds are many and short: the speed of a machine drifts, so turns that are compared should be near each other. A
    turn is at least one step, so use a smaller --batch-size for a model whose steps take seconds.
    """
    from train import device as devices

    gpu = devices.choose(settings.device).type == "cuda"
    engines = ["jpg"] if settings.quick else [name for name in ENGINES if gpu or name != "dali"]
    systems = 1 + sum(len(ENGINES[engine]) for engine in engines)

    steps = systems * (2 + settings.rounds)
    train_models(settings, PAGE, steps, lambda job, measurement: measure_stalls(job, engines, measurement))


def measure_stalls(job: TrainingJob, engines: Sequence[str], measurement: Measurement) -> list[Row]:
    """Time one model with a cached batch, and with each engine's warm and cold files, in turn. engines: of ENGINES."""
    ceiling = system_name(LAST, CACHED)
    fed = [[system_name(LAST, source) for source in ENGINES[engine]] for engine in engines]
    names = [ceiling, *(name for each in fed for name in each)]
    series, _ = take_turns(set_up, turns(ceiling, fed), job, job.images.cache / "logs", measurement, frozen=True)
    cached = series[ceiling]
    columns = {name: job.columns("stalls", measurement, name) for name in names}
    rows: list[Row] = []
    for name in names:
        rows += series_rows(series[name], **columns[name])
    for warm, *cold in fed:
        rows.append(_stall(series[warm], cached, metric="prep_stall", **columns[warm]))
        for name in cold:
            rows.append(_stall(series[name], series[warm], metric="fetch_stall", **columns[name]))
            rows.append(_stall(series[name], cached, metric="whole_stall", **columns[name]))
        for name in (warm, *cold):
            rows.append(wait_row(series[name], **columns[name]))
            rows.append(_utilization(series[name], cached, **columns[name]))
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


def _stall(slower: Series, faster: Series, **columns: object) -> Row:
    """Share of the slower system's time that the faster one does not need, round by round; below 0 it is noise."""
    return paired_row(slower, faster, lambda slow, fast: 1 - slow / fast, unit="1", **columns)


def _utilization(own: Series, cached: Series, **columns: object) -> Row:
    """MLPerf Storage's AU: the time that computing alone takes, divided by the time that training took. Set-up with its
    first steps, and a whole warm-up round, are not timed."""
    return paired_row(own, cached, lambda a, b: a / b, metric="accelerator_utilization", unit="1", **columns)


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
    return f"{points}; not clear whether they agree, the stall lies between {100 * low:.1f} and {100 * high:.1f} %"


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


def tables(rows: Sequence[Row]) -> list[str]:
    """A line per model and engine."""
    lines = []
    for model, engine, found in by_engine(rows):
        batch = next(iter(found.values())).batch_size
        line = [model, str(batch or ""), engine, cell(found.get(("", "img_per_s")))]
        for cache, stall in (("warm", "prep_stall"), ("cold", "whole_stall")):
            differential, wait = found.get((cache, stall)), found.get((cache, "data_wait"))
            line += [_percent(differential), _percent(wait), agreement(differential, wait)]
            line.append(_percent(found.get((cache, "accelerator_utilization"))))
        lines.append([*line, _percent(found.get(("cold", "fetch_stall")))])
    header = ["model", "batch", "engine", "img/s cached", "prep stall, %", "data wait, %", "both compared"]
    header += ["AU warm, %", "whole stall, cold, %", "data wait, cold, %", "both compared, cold", "AU cold, %"]
    return [
        "Percentages of training time. Prep stall: warm files against a cached batch. Fetch stall: cold files against "
        "warm ones. Data wait: the host's, counted in the loop. AU: accelerator utilization, the speed divided by that "
        "with a cached batch. On a CPU the loader and the model share the cores: a prep stall is then time that "
        "decoding took from the model, and little of it is waiting.\n",
        table([*header, "fetch stall, %"], lines),
    ]


def _percent(row: Row | None) -> str:
    """A share as a percentage."""
    if row is None or row.value is None:
        return cell(row)
    low, high = (None if end is None else 100 * end for end in (row.low, row.high))
    return cell(replace(row, value=100 * row.value, low=low, high=high))


_CHART = ("accelerator_utilization", "share of the speed with a cached batch")
PAGE = Page("stalls", "Stalls", tables, chart=_CHART)
