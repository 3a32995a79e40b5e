"""The `grid` benchmark: a study whose cells share a worker process, beside one with a process per cell."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from benchmarks.datasets import Job, originals_in, prepared, sized
from benchmarks.machine import Environment
from benchmarks.measure import Row, ratio_row, series_rows, summary_row
from benchmarks.options import advance, check_models, common, measured_on, publish, rounds_option, training_options
from benchmarks.peers.ours import SHARDS_SPLIT
from benchmarks.tables import busy_text, cell, machine_text, notes, pivot, table
from benchmarks.targets import targets_text
from benchmarks.worker import SET_UP_LIMIT_S, Announce, Running, take_turns
from shards.common.errors import last_line

SHARED, ALONE = "one grid, shared worker", "one process per cell"


class CellFailedError(Exception):
    """A run of the study failed; the text is its last line."""


@click.command("grid")
@common
@rounds_option(6, quick=5)
@training_options(["resnet18"], resolution=64)
@click.option("--epochs", type=click.IntRange(1), help="Epochs of every cell.  [default: 20, quick 1]")
@click.option("--fractions", help="Fractions of every model and seed.  [default: 1/8,1/4,1/2,1, quick 1]")
@click.option("--compile", type=click.Choice(["on", "off"]), help="torch.compile.  [default: on, quick off]")
def command(
    quick: bool,
    out: Path,
    cache: Path,
    source: Path,
    rounds: int,
    models: tuple[str, ...],
    resolution: int,
    batch_size: int,
    epochs: int | None,
    fractions: str | None,
    compile: str | None,
    device: str,
) -> None:
    """A study whose cells share a worker process, beside one with a process per cell."""
    from shards.common.progress import Progress
    from train.study.cells import parse_fractions

    check_models(models, resolution)
    shares = tuple(parse_fractions(fractions or ("1" if quick else "1/8,1/4,1/2,1")))
    images = sized(Job(originals_in(source), cache, 200, resolution, batch_size), 96 if quick else 312)
    epochs = epochs or (1 if quick else 20)
    job = GridJob(images, tuple(models), shares, (0, 1), epochs, compile or ("off" if quick else "on"), device)
    machine = measured_on(images, device)
    with Progress("grid", 2 * (2 + rounds), "studies") as bar:
        rows = measure_grid(job, machine, rounds=rounds, announce=advance(bar))
    publish(out, "grid-quick" if quick else "grid", rows, grid_text)


@dataclass(frozen=True)
class GridJob:
    """The study: its cells are models × fractions × seeds. compile, device: as `train.run` takes them."""

    images: Job
    models: tuple[str, ...]
    fractions: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    seeds: tuple[int, ...] = (0, 1)
    epochs: int = 1
    compile: str = "off"
    device: str = "auto"

    @property
    def cells(self) -> int:
        """Runs of the study."""
        return len(self.models) * len(self.fractions) * len(self.seeds)


def _run(arguments: Sequence[str]) -> None:
    """Run a module of this project. Raises CellFailedError with its last line where it fails."""
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CellFailedError(last_line(done.stderr))


def set_up(name: str, job: GridJob) -> Running:
    """Pack the images, and train the largest cell of the study."""
    from shards import ShardSet
    from train.study.cells import fitting_batch

    images = job.images
    data = prepared(SHARDS_SPLIT, images) / "set"
    home = _home(name, job)
    options = {"--data": data, "--epochs": job.epochs, "--resolution": images.resolution_px}
    options |= {"--compile": job.compile, "--device": job.device}
    alike = [str(word) for pair in options.items() for word in pair]
    turn = iter(range(1_000_000))

    def clean() -> None:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)

    def one_grid(job: GridJob, out: Path) -> None:
        lists = {"--models": job.models, "--fractions": job.fractions, "--seeds": job.seeds}
        options = [text for option, values in lists.items() for text in (option, ",".join(map(str, values)))]
        _run(["train.grid", *options, "--batch-size", str(images.batch_size), "--out", str(out), *alike])

    def one_by_one(job: GridJob, out: Path) -> None:
        packed = ShardSet(data)
        for model in job.models:
            for fraction in job.fractions:
                for seed in job.seeds:  # as in the grid by default, the choice of lesions changes with the seed
                    cell_options = ["--model", model, "--fraction", str(fraction), "--seed", str(seed)]
                    cell_options += ["--subset-seed", str(seed), "--out", str(out / f"{model}-{fraction}-{seed}")]
                    batch = fitting_batch(images.batch_size, len(packed.select("train", fraction, seed)))
                    cell_options += ["--batch-size", str(batch)]
                    _run(["train.run", *cell_options, *alike])

    def study(job: GridJob) -> int:
        out = home / str(next(turn))
        started = time.perf_counter()
        (one_grid if name == SHARED else one_by_one)(job, out)
        wall_s = time.perf_counter() - started
        results = [json.loads(path.read_text(encoding="utf-8")) for path in out.rglob("result.json")]
        if len(results) != job.cells:
            raise CellFailedError(f"{len(results)} of {job.cells} cells have a result")
        busy_s = sum(result["seconds"]["train"] + result["seconds"]["eval"] for result in results)
        found = {"overhead_share": 1 - busy_s / wall_s}
        if name == SHARED:
            found |= _later_cells(out / "grid.jsonl", out)
        with _overheads(name, job).open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        return len(results)

    clean()
    # so that the compiler's cache has the same content for both systems
    study(replace(job, fractions=(max(job.fractions),), seeds=job.seeds[:1]))
    return Running(lambda: study(job), clean)


def _home(name: str, job: GridJob) -> Path:
    """The folder of a system's studies while it is measured."""
    return job.images.cache / "grid" / name.replace(" ", "-").replace(",", "")


def _later_cells(journal: Path, out: Path) -> dict[str, float]:
    """The overhead, s, of the slowest cell after its model's first one: all but training and evaluation. Empty without
    such a cell."""
    cells = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    seen: set[str] = set()
    beside = []
    for cell_ in cells:
        if cell_["model"] in seen:
            seconds = json.loads((out / "cells" / cell_["cell"] / "result.json").read_text(encoding="utf-8"))["seconds"]
            beside.append(cell_["wall_s"] - seconds["train"] - seconds["eval"])
        seen.add(cell_["model"])
    return {"later_cell_s": max(beside)} if beside else {}


def _overheads(name: str, job: GridJob) -> Path:
    """A file with a line for each study, also the untimed ones: `overhead_share`, the share of its wall time that is
    neither training nor evaluation, and `later_cell_s`."""
    return _home(name, job).with_suffix(".overhead")


def measure_grid(job: GridJob, environment: Environment, *, rounds: int, announce: Announce) -> list[Row]:
    """Time whole studies with their start-up, in turn; a round is one study."""
    series, _ = take_turns(
        set_up,
        [SHARED, ALONE],
        job,
        job.images.cache / "logs",
        rounds=rounds,
        seconds=0.0,
        announce=announce,
        limit_s=SET_UP_LIMIT_S * job.cells,
    )
    overheads = {
        name: [json.loads(line) for line in _overheads(name, job).read_text(encoding="utf-8").splitlines()[-rounds:]]
        for name in (SHARED, ALONE)
        if not series[name].failed
    }
    shutil.rmtree(job.images.cache / "grid", ignore_errors=True)
    columns: dict[str, Any] = {
        "benchmark": "grid",
        "model": " ".join(job.models),
        "resolution_px": job.images.resolution_px,
        "batch_size": job.images.batch_size,
        "page_cache": "warm",
        "environment": environment,
    }
    note = f"{job.cells} cells of {job.epochs} epoch(s), torch.compile {job.compile}"
    rows: list[Row] = []
    for name in (SHARED, ALONE):
        speed, cpu = series_rows(series[name], system=name, note=note if name == SHARED else "", **columns)
        rows += [_renamed(speed, "cells_per_s", "cells/s"), _renamed(cpu, "cpu_s_per_1000_cells", "s")]
        failed = series[name].failed
        for metric, unit in (("overhead_share", "1"), ("later_cell_s", "s")):
            values = [found[metric] for found in overheads.get(name, []) if metric in found]
            if values or (failed and metric == "overhead_share"):
                noted = columns | {"note": note if name == SHARED else ""}
                rows.append(summary_row(values, failed, system=name, metric=metric, unit=unit, **noted))
    ratio = ratio_row(series[SHARED], series[ALONE], system=SHARED, beside=ALONE, **columns)
    return [*rows, _renamed(ratio, "cells_per_s ratio", ratio.unit)]


def _renamed(row: Row, metric: str, unit: str) -> Row:
    return replace(row, metric=metric, unit=unit)


def grid_text(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    own = [row for row in rows if row.benchmark == "grid"]
    across = [("cells / s", lambda row: row.metric == "cells_per_s")]
    across.append(("overhead, share of the wall time", lambda row: row.metric == "overhead_share"))
    across.append(("overhead of the slowest later cell, s", lambda row: row.metric == "later_cell_s"))
    across.append(("CPU s / 1,000 cells", lambda row: row.metric == "cpu_s_per_1000_cells"))
    parts = ["## Grid\n", pivot([row for row in own if not row.beside], across)]
    ratios = [[f"{row.system} / {row.beside}", cell(row)] for row in own if row.beside]
    parts += [table(["ratio", "cells/s"], ratios), targets_text(own), busy_text(own), notes(own)]
    parts.append(machine_text(own))
    return "\n".join(part for part in parts if part)
