"""The `loader` benchmark: images per second and CPU seconds of every loader at equal work, beside the ceilings."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.datasets import stats
from benchmarks.machine import Environment
from benchmarks.measure import Row, ratio_row, series_rows
from benchmarks.peers.pytorch import set_up
from benchmarks.peers.system import System, Work
from benchmarks.tables import busy_text, grid, machine_text, notes, pivot
from benchmarks.targets import targets_text
from benchmarks.worker import Told, take_turns

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


def measure_loaders(
    systems: Sequence[System], work: Work, environment: Environment, *, rounds: int, seconds: float, told: Told
) -> list[Row]:
    """Time the systems in turn on one job. seconds: least length of a timed round. told: is given each step's name.

    Every system is set up, its first batch checked, its first epoch and its first round thrown away; then `rounds`
    rounds count.
    A system that cannot be set up, gives wrong images, fails or hangs has rows that say so.
    """
    _, size = stats(work)
    names = [system.name for system in systems]
    series, _ = take_turns(
        set_up, names, work, work.cache / "logs", rounds=rounds, seconds=seconds, told=told, at_once=2
    )
    rows: list[Row] = []
    for system in systems:
        rows += series_rows(series[system.name], note=system.note, **_columns(system, work, size, environment))
    known = {system.name: system for system in systems}
    for above, below in RATIOS:
        if above in known and below in known:
            columns = _columns(known[above], work, size, environment)
            rows.append(ratio_row(series[above], series[below], beside=below, **columns))
    return sorted(rows, key=lambda row: not _SIZE.match(row.packed))  # as `packed_sizes` wants them


def _columns(system: System, work: Work, size: str, environment: Environment) -> dict:
    packed = {"originals": "originals", "none": ""}.get(system.encoding, f"{size} {system.encoding}")
    return {
        "benchmark": "loader",
        "system": system.name,
        "packed": packed,
        "resolution_px": work.resolution_px,
        "batch_size": work.batch_size,
        "workers": work.workers,
        "page_cache": "" if system.ceiling else "warm",
        "environment": environment,
    }


def jobs(work: Work, packed_px: Sequence[int], resolutions_px: Sequence[int]) -> list[Work]:
    """One job per packed size and resolution."""
    return [replace(work, packed_px=p, resolution_px=r) for p in packed_px for r in resolutions_px]


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
                found = pivot(of_pair, [(f"{px} px", _is(px, "img_per_s ratio")) for px in resolutions])
                lines.append([f"{above} / {below}", *_last_cells(found)])
            parts.append(grid(["ratio", *(f"{px} px" for px in resolutions)], lines))
    parts += [targets_text(own), notes(own)]
    parts.append(machine_text(own))
    return "\n".join(part for part in parts if part)


def _is(px: int, metric: str) -> Callable[[Row], bool]:
    return lambda row: row.resolution_px == px and row.metric == metric


def packed_sizes(rows: Sequence[Row]) -> list[str]:
    """Of each row the size, `341x256`, that was packed for its job; systems that read no packed images take part too.

    Rows stand job by job, each job's with some of packed images first; empty where a table has none.
    """
    found, size = [], ""
    for row in rows:
        packed = _SIZE.match(row.packed)
        size = packed.group() if packed else size
        found.append(size)
    return found


def _last_cells(table: str) -> list[str]:
    return [text.strip() for text in table.strip().splitlines()[-1].strip("|").split("|")[1:]]
