"""The `loader` benchmark: images per second and CPU seconds of every loader at equal work, beside the ceilings."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import click

from benchmarks import beside
from benchmarks.datasets import Job, stats
from benchmarks.measure import Measurement, Row, ratio_rows, series_rows
from benchmarks.options import ONLY, WORKERS, Settings, benchmark, packed_option, quick_option
from benchmarks.pages import Page, packed_sizes, ratios
from benchmarks.peers.system import System
from benchmarks.systems import SYSTEMS, set_up
from benchmarks.tables import pivot
from benchmarks.worker import take_turns

NOT_IN_QUICK = (
    "dermscale native proportion",
    "dermscale dali jpg (on the CPU)",
    "dermscale resident (on the CPU)",
    "FFCV proportion",
)
"""Not in the quick benchmark: sets that are half raw, and engines for a GPU on a CPU."""

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
    ("dermscale native jpg, 16 threads", "dermscale native jpg"),
    ("dermscale native raw, 16 threads", "dermscale native raw"),
    ("dermscale native jpg", "ceiling: decode only"),
    ("dermscale native raw", "ceiling: memory copy only"),
    ("dermscale dali jpg, on the GPU", "dermscale native jpg, to the GPU"),
    ("dermscale resident, on the GPU", "dermscale native jpg, to the GPU"),
)
"""Pairs whose ratio of images per second is in the table."""


@benchmark("loader", ONLY, WORKERS, rounds=(9, 5), seconds=(2, 0.5))
@packed_option(default=[341, 400], quick=[341])
@quick_option(
    "--resolution",
    "resolutions_px",
    kind=click.IntRange(1),
    text="Side of the images that come out, px. Each is timed for itself. Repeatable.",
    default=(224, 128),
    quick=(224,),
    multiple=True,
)
@click.option(
    "--beside-python",
    is_flag=True,
    help="Instead, loaders on one thread, each alone and beside a Python thread that never waits.",
)
def command(settings: Settings, packed_px: Sequence[int], resolutions_px: Sequence[int], beside_python: bool) -> None:
    """Images per second and CPU seconds of loaders that do the same job.

    --quick does not measure half-raw sets and GPU engines on a CPU, unless --only names them.
    """
    from train import device as devices

    if beside_python:
        beside.run(replace(settings, name=beside.NAME, workers=1), packed_px[0], resolutions_px[0])
        return
    here = {name: system for name, system in SYSTEMS.items() if devices.gpu_count() or not system.on_gpu}
    systems = settings.chosen(here, NOT_IN_QUICK)
    job = settings.job(341, 2496, quick=624, whole_batches=True)
    todo = jobs(job, packed_px, resolutions_px)
    rows = []
    with settings.measurement(job, len(todo) * len(systems) * (2 + settings.rounds)) as measurement:
        for one in todo:
            rows += measure_loaders(systems, one, measurement)
            settings.publish(PAGE, rows, show=one is todo[-1])


def jobs(job: Job, packed_px: Sequence[int], resolutions_px: Sequence[int]) -> list[Job]:
    """One job per packed size and resolution."""
    return [replace(job, packed_px=p, resolution_px=r) for p in packed_px for r in resolutions_px]


def measure_loaders(systems: Sequence[System], job: Job, measurement: Measurement) -> list[Row]:
    """Time the systems in turn on one job.

    Every system is set up and its first batch is checked. Its first epoch and its first round do not count. A system
    that cannot be set up, gives wrong images, fails or hangs has rows that say so.
    """
    _, size = stats(job)
    known = {system.name: system for system in systems}
    series, _ = take_turns(set_up, list(known), job, job.cache / "logs", measurement, at_once=2)

    def columns(name: str) -> dict[str, Any]:
        system = known[name]
        packed = {"originals": "originals", "none": ""}.get(system.encoding, f"{size} {system.encoding}")
        warm = "" if system.ceiling else "warm"
        return measurement.columns("loader", job, system=name, packed=packed, page_cache=warm)

    rows: list[Row] = []
    for name, system in known.items():
        rows += series_rows(series[name], note=system.note, **columns(name))
    rows += ratio_rows(RATIOS, series, columns)
    return sorted(rows, key=lambda row: row.packed in ("originals", ""))  # in the order that `packed_sizes` needs


def tables(rows: Sequence[Row]) -> list[str]:
    """A table per packed size, and its ratios."""
    parts = ["Images per second and CPU seconds per 1,000 images: median [interval].\n"]
    sizes = packed_sizes(rows)
    for size in dict.fromkeys(sizes):
        part = [row for row, packed in zip(rows, sizes, strict=True) if packed == size]
        resolutions = sorted({row.resolution_px for row in part if row.resolution_px}, reverse=True)
        across = [
            (f"{px} px, {title}", _is(px, metric))
            for px in resolutions
            for metric, title in (("img_per_s", "img/s"), ("cpu_s_per_1000", "CPU s / 1,000"))
        ]
        parts += [f"### Packed at {size}\n"] if size else []
        parts.append(pivot([row for row in part if not row.beside], across))
        parts += ratios(part, [(f"{px} px", _is(px, "img_per_s ratio")) for px in resolutions])
    return parts


def _is(px: int, metric: str) -> Callable[[Row], bool]:
    return lambda row: row.resolution_px == px and row.metric == metric


PAGE = Page("loader", "Loading", tables)
