"""The `grid` benchmark: a study whose cells share a worker process, against one process per cell."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.datasets import prepared
from benchmarks.machine import Environment
from benchmarks.measure import Row, ratio_row, series_rows, summary_row
from benchmarks.peers.system import Work
from benchmarks.tables import busy_text, cell, grid, machine_text, notes, pivot
from benchmarks.targets import targets_text
from benchmarks.worker import SET_UP_LIMIT_S, Running, Told, take_turns

SHARED, ALONE = "one grid, shared worker", "one process per cell"


class CellFailedError(Exception):
    """A run of the study failed; the text is its last line."""


@dataclass(frozen=True)
class GridJob:
    """The study: cells are models × fractions × seeds. compile, device: as `train.run` takes them."""

    work: Work
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
        raise CellFailedError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])


def set_up(name: str, job: GridJob) -> Running:
    """Pack the images, and train the largest cell of the study."""
    from shards import ShardSet
    from train.study.cells import fitting_batch

    work = job.work
    data = prepared("shards-split", work) / "set"
    home = _home(name, job)
    common = [
        "--data",
        str(data),
        "--epochs",
        str(job.epochs),
        "--resolution",
        str(work.resolution_px),
        "--compile",
        job.compile,
        "--device",
        job.device,
    ]
    turn = iter(range(1_000_000))

    def clean() -> None:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)

    def one_grid(job: GridJob, out: Path) -> None:
        lists = {"--models": job.models, "--fractions": job.fractions, "--seeds": job.seeds}
        options = [text for option, values in lists.items() for text in (option, ",".join(map(str, values)))]
        _run(["train.grid", *options, "--batch-size", str(work.batch_size), "--out", str(out), *common])

    def one_by_one(job: GridJob, out: Path) -> None:
        packed = ShardSet(data)
        for model in job.models:
            for fraction in job.fractions:
                for seed in job.seeds:  # as the grid does by default, lesions vary together with the seed
                    cell_options = ["--model", model, "--fraction", str(fraction), "--seed", str(seed)]
                    cell_options += ["--subset-seed", str(seed), "--out", str(out / f"{model}-{fraction}-{seed}")]
                    batch = fitting_batch(work.batch_size, len(packed.select("train", fraction, seed)))
                    cell_options += ["--batch-size", str(batch)]
                    _run(["train.run", *cell_options, *common])

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
    # so that the compiler's cache is as full for one system as for the other
    study(replace(job, fractions=(max(job.fractions),), seeds=job.seeds[:1]))
    return Running(lambda: study(job), clean)


def _home(name: str, job: GridJob) -> Path:
    """Where a system keeps its studies while it is measured."""
    return job.work.cache / "grid" / name.replace(" ", "-").replace(",", "")


def _later_cells(journal: Path, out: Path) -> dict[str, float]:
    """What the dearest cell after its model's first one took beside training and evaluation, s; empty without one."""
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
    """A line a study, the untimed ones too: `overhead_share` of its wall time, neither training nor evaluation, and
    `later_cell_s`."""
    return _home(name, job).with_suffix(".overhead")


def measure_grid(job: GridJob, environment: Environment, *, rounds: int, told: Told) -> list[Row]:
    """Time whole studies, start-up included, in turn; a study is a round."""
    series, _ = take_turns(
        set_up,
        [SHARED, ALONE],
        job,
        job.work.cache / "logs",
        rounds=rounds,
        seconds=0.0,
        told=told,
        limit_s=SET_UP_LIMIT_S * job.cells,
    )
    overheads = {
        name: [json.loads(line) for line in _overheads(name, job).read_text(encoding="utf-8").splitlines()[-rounds:]]
        for name in (SHARED, ALONE)
        if not series[name].failed
    }
    shutil.rmtree(job.work.cache / "grid", ignore_errors=True)
    columns: dict[str, Any] = {
        "benchmark": "grid",
        "model": " ".join(job.models),
        "resolution_px": job.work.resolution_px,
        "batch_size": job.work.batch_size,
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
    across.append(("dearest cell after the first, s beside training", lambda row: row.metric == "later_cell_s"))
    across.append(("CPU s / 1,000 cells", lambda row: row.metric == "cpu_s_per_1000_cells"))
    parts = ["## Grid\n", pivot([row for row in own if not row.beside], across)]
    ratios = [[f"{row.system} / {row.beside}", cell(row)] for row in own if row.beside]
    parts += [grid(["ratio", "cells/s"], ratios), targets_text(own), busy_text(own), notes(own)]
    parts.append(machine_text(own))
    return "\n".join(part for part in parts if part)
