"""The `loader` benchmark: images per second and CPU seconds of every loader at equal work, beside the ceilings."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click

from benchmarks import beside
from benchmarks.datasets import Job, stats
from benchmarks.measure import Measurement, Row, ratio_rows, series_rows
from benchmarks.options import ONLY, WORKERS, Settings, benchmark
from benchmarks.pages import Page, place
from benchmarks.peers.system import System
from benchmarks.systems import SYSTEMS, set_up
from benchmarks.tables import pivot, ratios
from benchmarks.worker import take_turns

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

_SIDE = click.IntRange(1)


@benchmark("loader", ONLY, WORKERS, rounds=(9, 5), seconds=(2, 0.5))
@click.option(
    "--packed", "packed_px", type=_SIDE, default=341, show_default=True, help="Longer side of the packed images, px."
)
@click.option("--resolution", type=_SIDE, default=224, show_default=True, help="Side of the images that come out, px.")
@click.option(
    "--beside-python",
    is_flag=True,
    help="Instead, loaders on one thread, each alone and beside a Python thread that never waits.",
)
def command(settings: Settings, packed_px: int, beside_python: bool) -> None:
    """Images per second and CPU seconds of loaders that do the same job."""
    from train import device as devices

    if beside_python:
        beside.run(replace(settings, name=beside.NAME, workers=1), packed_px)
        return
    here = {name: system for name, system in SYSTEMS.items() if devices.gpu_count() or not system.on_gpu}
    systems = settings.chosen(here)
    job = settings.job(packed_px, 2496, quick=624, whole_batches=True)
    with settings.measurement(job, len(systems) * (2 + settings.rounds)) as measurement:
        settings.publish(PAGE, measure_loaders(systems, job, measurement))


def measure_loaders(systems: Sequence[System], job: Job, measurement: Measurement) -> list[Row]:
    """Time the systems in turn on one job.

    Every system is set up and its first batch is checked. Its first epoch and its first round do not count. A system
    that cannot be set up, gives wrong images, fails or hangs has rows that say so.
    """
    _, size = stats(job)
    known = {system.name: system for system in systems}
    series, _ = take_turns(set_up, list(known), job, job.cache / "logs", measurement)

    def columns(name: str) -> dict[str, Any]:
        system = known[name]
        packed = {"originals": "originals", "none": ""}.get(system.encoding, f"{size} {system.encoding}")
        warm = "" if system.ceiling else "warm"
        return measurement.columns("loader", job, system=name, packed=packed, page_cache=warm)

    rows: list[Row] = []
    for name, system in known.items():
        rows += series_rows(series[name], note=system.note, **columns(name))
    return rows + ratio_rows(RATIOS, series, columns)


def tables(rows: Sequence[Row]) -> list[str]:
    """The speeds, and their ratios."""
    return [
        f"Images per second and CPU seconds per 1,000 images, {place(rows)}: median [interval].\n",
        pivot(rows, {"img_per_s": "img/s", "cpu_s_per_1000": "CPU s / 1,000"}),
        ratios(rows, "img/s"),
    ]


PAGE = Page("loader", "Loading", tables)
