"""The `grid` benchmark: a study whose cells share a worker process, beside one with a process per cell."""

import itertools
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.datasets import Job, prepared
from benchmarks.measure import Measurement, Row, ratio_row, series_row, summary_row
from benchmarks.options import Settings, benchmark, training_options
from benchmarks.pages import Page
from benchmarks.peers.ours import SHARDS_SPLIT
from benchmarks.tables import pivot, ratios
from benchmarks.worker import SET_UP_LIMIT_S, Running, SystemFailedError, run_module, take_turns

SHARED, ALONE = "one grid, shared worker", "one process per cell"


@benchmark("grid", *training_options(["resnet18"]), rounds=(6, 5))
def command(settings: Settings) -> None:
    """A study at 64 px whose cells share a worker process, beside one with a process per cell.

    --quick trains each cell for one epoch on all images, and does not compile.
    """
    settings.check_models()
    images = replace(settings.job(200, 312, quick=96), resolution_px=64)
    study = {"fractions": (1.0,), "epochs": 1, "compile": "off"} if settings.quick else {}
    job = GridJob(images, settings.models, device=settings.device, **study)
    with settings.measurement(images, 2 * (2 + settings.rounds)) as measurement:
        rows = measure_grid(job, measurement)
    settings.publish(PAGE, rows)


@dataclass(frozen=True)
class GridJob:
    """The study: its cells are models × fractions × seeds. compile, device: as `train.run` takes them."""

    images: Job
    models: tuple[str, ...]
    fractions: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    seeds: tuple[int, ...] = (0, 1)
    epochs: int = 20
    compile: str = "on"
    device: str = "auto"

    @property
    def cells(self) -> int:
        """Runs of the study."""
        return len(self.models) * len(self.fractions) * len(self.seeds)


def set_up(name: str, job: GridJob) -> Running:
    """Pack the images, and train the largest cell of the study."""
    from shards import ShardSet
    from train.study.cells import fitting_batch

    images = job.images
    data = prepared(SHARDS_SPLIT, images) / "set"
    home = _home(name, job)
    alike = {"--data": data, "--epochs": job.epochs, "--resolution": images.resolution_px}
    alike |= {"--compile": job.compile, "--device": job.device}
    turn = itertools.count()

    def clean() -> None:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)

    def one_grid(job: GridJob, out: Path) -> None:
        lists = {"--models": job.models, "--fractions": job.fractions, "--seeds": job.seeds}
        options = {option: ",".join(map(str, values)) for option, values in lists.items()} | {"--per-device": 1}
        run_module("train.grid", options | {"--batch-size": images.batch_size, "--out": out} | alike)

    def one_by_one(job: GridJob, out: Path) -> None:
        packed = ShardSet(data)
        for model, fraction, seed in itertools.product(job.models, job.fractions, job.seeds):
            batch = fitting_batch(images.batch_size, len(packed.select("train", fraction, seed)))
            own = {"--model": model, "--fraction": fraction, "--seed": seed, "--batch-size": batch}
            # as in the grid by default, the choice of lesions changes with the seed
            own |= {"--subset-seed": seed, "--out": out / f"{model}-{fraction}-{seed}"}
            run_module("train.run", own | alike)

    def study(job: GridJob) -> int:
        out = home / str(next(turn))
        started = time.perf_counter()
        (one_grid if name == SHARED else one_by_one)(job, out)
        wall_s = time.perf_counter() - started
        results = [json.loads(path.read_text(encoding="utf-8")) for path in out.rglob("result.json")]
        if len(results) != job.cells:
            raise SystemFailedError(f"{len(results)} of {job.cells} cells have a result")
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


def measure_grid(job: GridJob, measurement: Measurement) -> list[Row]:
    """Time whole studies with their start-up, in turn; a round is one study."""
    systems, logs = [SHARED, ALONE], job.images.cache / "logs"
    series, _ = take_turns(set_up, systems, job, logs, measurement, limit_s=SET_UP_LIMIT_S * job.cells)
    note = f"{job.cells} cells of {job.epochs} epoch(s), torch.compile {job.compile}"
    models = " ".join(job.models)
    columns: dict[str, Any] = measurement.columns("grid", job.images, model=models, workers=None, page_cache="warm")
    rows: list[Row] = []
    for name in systems:
        own = columns | {"system": name, "note": note if name == SHARED else ""}
        done = series[name]
        rows.append(series_row(done, lambda study: study.per_s, metric="cells_per_s", unit="cells/s", **own))
        rows.append(
            series_row(done, lambda study: study.cpu_s_per_1000, metric="cpu_s_per_1000_cells", unit="s", **own)
        )
        overheads = [] if done.failed else _overheads(name, job).read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in overheads[-measurement.rounds :]]
        for metric, unit in (("overhead_share", "1"), ("later_cell_s", "s")):
            values = [study[metric] for study in found if metric in study]
            if values or (done.failed and metric == "overhead_share"):
                rows.append(summary_row(values, done.failed, metric=metric, unit=unit, **own))
    shutil.rmtree(job.images.cache / "grid", ignore_errors=True)
    ratio = {"system": SHARED, "beside": ALONE, "metric": "cells_per_s ratio"}
    return [*rows, ratio_row(series[SHARED], series[ALONE], **ratio, **columns)]


def tables(rows: Sequence[Row]) -> list[str]:
    """Speed and overhead of both ways, and the ratio of their speeds."""
    titles = {
        "cells_per_s": "cells / s",
        "overhead_share": "overhead, share of the wall time",
        "later_cell_s": "overhead of the slowest later cell, s",
        "cpu_s_per_1000_cells": "CPU s / 1,000 cells",
    }
    return [pivot(rows, titles), ratios(rows, "cells/s")]


PAGE = Page("grid", "Grid", tables, chart=("cells_per_s", "cells per second"))
