"""The `loader` benchmark: images per second and CPU seconds of every loader at equal work, beside the ceilings."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.datasets import Job, originals_in, prepared, sized, stats
from benchmarks.machine import Environment
from benchmarks.measure import Row, ratio_row, series_rows
from benchmarks.options import advance, chosen, measured_on, publish, rounds_option, seconds_option, shared
from benchmarks.peers.dali import DALI
from benchmarks.peers.ffcv import FFCV
from benchmarks.peers.ours import CEILINGS, OURS, OURS_ON_GPU
from benchmarks.peers.pytorch import PYTORCH
from benchmarks.peers.spdl import SPDL
from benchmarks.peers.system import System, WrongBatchError, check_batch, need
from benchmarks.tables import busy_text, cell, machine_text, notes, pivot, table
from benchmarks.targets import targets_text
from benchmarks.worker import Announce, Running, take_turns

SYSTEMS: dict[str, System] = {s.name: s for s in (*OURS, *OURS_ON_GPU, *FFCV, *DALI, *PYTORCH, *SPDL, *CEILINGS)}
"""Every system by its name, in the order of the tables."""

NOT_IN_QUICK = (
    "dermscale native jpg, 1 thread",
    "dermscale native raw, 1 thread",
    "dermscale native proportion",
    "dermscale dali jpg (on the CPU)",
    "dermscale resident (on the CPU)",
    "FFCV proportion",
)
"""Not in the quick benchmark: sets that are half raw, engines on one thread, and engines for a GPU on a CPU."""

RATIOS = (
    ("dermscale native jpg", "FFCV jpg"),
    ("dermscale native raw", "FFCV raw"),
    ("dermscale native proportion", "FFCV proportion"),
    ("dermscale native jpg", "torchvision ImageFolder"),
    ("dermscale native jpg", "webdataset"),
    ("dermscale native jpg", "DALI webdataset reader"),
    ("dermscale native jpg", "MosaicML streaming"),
    ("dermscale native jpg", "LitData"),
    ("dermscale native jpg", "SPDL"),
    ("dermscale native jpg", "dermscale native jpg, 1 thread"),
    ("dermscale native raw", "dermscale native raw, 1 thread"),
    ("dermscale native jpg", "ceiling: bare loop jpg"),
    ("dermscale native raw", "ceiling: bare loop raw"),
    ("dermscale native jpg", "ceiling: decode only"),
    ("dermscale native raw", "ceiling: memory copy only"),
    ("dermscale dali jpg, on the GPU", "dermscale native jpg, to the GPU"),
    ("dermscale resident, on the GPU", "dermscale native jpg, to the GPU"),
)
"""Pairs whose ratio of images per second is in the table."""

_SIZE = re.compile(r"\d+x\d+")


@click.command("loader")
@shared
@rounds_option(9, quick=5)
@click.option(
    "--packed",
    "packed_px",
    type=click.IntRange(1),
    multiple=True,
    help="Longer side of the packed images, px. Repeatable.  [default: 341 400, quick 341]",
)
@click.option(
    "--resolution",
    "resolutions_px",
    type=click.IntRange(1),
    multiple=True,
    help="Side of the images that come out, px. Repeatable.  [default: 224 128, quick 224]",
)
@seconds_option(2, quick=0.5)
def command(
    quick: bool,
    out: Path,
    cache: Path,
    source: Path,
    rounds: int,
    workers: int,
    only: tuple[str, ...],
    packed_px: tuple[int, ...],
    resolutions_px: tuple[int, ...],
    seconds: float,
) -> None:
    """Images per second and CPU seconds of loaders that do the same job.

    --quick does not measure half-raw sets, engines on one thread, and GPU engines on a CPU, unless --only names them.
    """
    from shards.common.progress import Progress
    from train import device as devices

    here = {name: system for name, system in SYSTEMS.items() if devices.gpu_count() or not system.on_gpu}
    systems = chosen(here, only, NOT_IN_QUICK if quick else ())
    job = sized(Job(originals_in(source), cache, workers=workers), 624 if quick else 2496, whole_batches=True)
    machine = measured_on(job, "auto")
    packed_px = packed_px or ((341,) if quick else (341, 400))
    todo = jobs(job, packed_px, resolutions_px or ((224,) if quick else (224, 128)))
    rows = []
    with Progress("loader", len(todo) * len(systems) * (2 + rounds), "runs") as bar:
        for one in todo:
            rows += measure_loaders(systems, one, machine, rounds=rounds, seconds=seconds, announce=advance(bar))
            publish(out, "loader-quick" if quick else "loader", rows, loader_text, show=one is todo[-1])


def jobs(job: Job, packed_px: Sequence[int], resolutions_px: Sequence[int]) -> list[Job]:
    """One job per packed size and resolution."""
    return [replace(job, packed_px=p, resolution_px=r) for p in packed_px for r in resolutions_px]


def set_up(name: str, job: Job) -> Running:
    """Make a system's data if it is not there yet, open it, run one epoch, and check its first batch.

    Raises MissingPeerError naming what is not installed, WrongBatchError where the output is not what was asked for.
    """
    system = SYSTEMS[name]
    need(system.packages)
    mean, _ = stats(job)
    epoch = system.open(job, prepared(system.format, job))

    def once() -> int:
        return sum(len(images) for images, _ in epoch())

    count = 0
    for batch in epoch():
        if not count and not system.ceiling:
            check_batch(batch, job, mean)
        count += len(batch[0])
    if not count:
        raise WrongBatchError("no batch came")
    return Running(once, system.before(epoch) if system.before else lambda: None)


def measure_loaders(
    systems: Sequence[System], job: Job, environment: Environment, *, rounds: int, seconds: float, announce: Announce
) -> list[Row]:
    """Time the systems in turn on one job. seconds: minimum length of a timed round.

    Every system is set up and its first batch is checked. Its first epoch and its first round do not count; then come
    `rounds` that do. A system that cannot be set up, gives wrong images, fails or hangs has rows that say so.
    """
    _, size = stats(job)
    names = [system.name for system in systems]
    series, _ = take_turns(
        set_up, names, job, job.cache / "logs", rounds=rounds, seconds=seconds, announce=announce, at_once=2
    )
    rows: list[Row] = []
    for system in systems:
        rows += series_rows(series[system.name], note=system.note, **_columns(system, job, size, environment))
    known = {system.name: system for system in systems}
    for above, below in RATIOS:
        if above in known and below in known:
            columns = _columns(known[above], job, size, environment)
            rows.append(ratio_row(series[above], series[below], beside=below, **columns))
    return sorted(rows, key=lambda row: not _SIZE.match(row.packed))  # in the order that `packed_sizes` needs


def _columns(system: System, job: Job, size: str, environment: Environment) -> dict:
    packed = {"originals": "originals", "none": ""}.get(system.encoding, f"{size} {system.encoding}")
    return {
        "benchmark": "loader",
        "system": system.name,
        "packed": packed,
        "resolution_px": job.resolution_px,
        "batch_size": job.batch_size,
        "workers": job.workers,
        "page_cache": "" if system.ceiling else "warm",
        "environment": environment,
    }


def loader_text(rows: Sequence[Row]) -> str:
    """The rows as Markdown: a table per packed size and workers, the ratios, then notes and the machine."""
    own = [row for row in rows if row.benchmark == "loader"]
    parts = ["## Loader\n"]
    sizes = packed_sizes(own)
    for size in dict.fromkeys(sizes):
        part = [row for row, packed in zip(own, sizes, strict=True) if packed == size]
        resolutions = sorted({row.resolution_px for row in part if row.resolution_px}, reverse=True)
        parts += [f"### Packed at {size}\n"] if size else []
        parts.append("Images per second and CPU seconds per 1,000 images: median [interval].\n")
        across = []
        for px in resolutions:
            for metric, title in (("img_per_s", "img/s"), ("cpu_s_per_1000", "CPU s / 1,000")):
                across.append((f"{px} px, {title}", _is(px, metric)))
        parts.append(pivot([row for row in part if not row.beside], across))
        ratios = [row for row in part if row.beside]
        parts.append(busy_text(part))
        if ratios:
            parts.append("Ratios of images per second, taken within each round:\n")
            pairs = dict.fromkeys((row.system, row.beside) for row in ratios)
            lines = []
            for above, below in pairs:
                of_pair = [row for row in ratios if (row.system, row.beside) == (above, below)]
                found = (next(filter(_is(px, "img_per_s ratio"), of_pair), None) for px in resolutions)
                lines.append([f"{above} / {below}", *map(cell, found)])
            parts.append(table(["ratio", *(f"{px} px" for px in resolutions)], lines))
    parts += [targets_text(own), notes(own)]
    parts.append(machine_text(own))
    return "\n".join(part for part in parts if part)


def _is(px: int, metric: str) -> Callable[[Row], bool]:
    return lambda row: row.resolution_px == px and row.metric == metric


def packed_sizes(rows: Sequence[Row]) -> list[str]:
    """The packed size of each row's job, `341x256`, also for systems that read no packed images.

    The rows of a job stand together, those with packed images first. Empty text where a table has none of these.
    """
    found, size = [], ""
    for row in rows:
        packed = _SIZE.match(row.packed)
        size = packed.group() if packed else size
        found.append(size)
    return found
