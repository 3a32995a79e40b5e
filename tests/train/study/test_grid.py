"""The grid: its cells, its folder, its display, and that a finished cell is not trained twice."""

import csv
import io
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from shards.common.errors import DataError, UsageError
from tests.support import made_study
from train.config import Config, read_fraction
from train.record import RunFolder
from train.study.cells import (
    EIGHT,
    FRACTIONS,
    Cell,
    fitting_batch,
    grid_cells,
    parse_fractions,
    parse_models,
    parse_seeds,
)
from train.study.folder import LEAKAGE, UNWANTED, StudyFolder, read_journal
from train.study.grid import train_cells
from train.study.view import Forecast, LiveTable, duration
from train.study.worker import Ended

ROOT = Path(__file__).parents[3]
BASE = Config(model="resnet18", epochs=4, batch_size=32)


def whole(fraction: float, subset_seed: int) -> int:
    """A training split of 1,000 images, whose subsets differ a little with the seed."""
    return round(1000 * fraction) + (subset_seed if fraction < 1 else 0)


# ------------------------------------------------------------------ the cells


def test_every_model_meets_every_fraction_and_seed_once_model_by_model_and_large_fractions_first():
    found = grid_cells(BASE, ["resnet18", "alexnet"], [0.25, 1.0, 0.5], [0, 1], None, "epochs", whole)
    keys = [(c.config.model, c.config.fraction, c.config.seed) for c in found]
    assert keys == [(m, f, s) for m in ("resnet18", "alexnet") for f in (1.0, 0.5, 0.25) for s in (0, 1)]
    assert all(c.config.seed == c.config.subset_seed for c in found)
    assert len({c.name for c in found}) == 12


def test_named_subset_seeds_meet_every_seed_except_where_the_subset_is_everything():
    found = grid_cells(BASE, ["resnet18"], [0.5, 1.0], [0, 1], [5, 6, 7], "epochs", whole)
    half = {(c.config.seed, c.config.subset_seed) for c in found if c.config.fraction == 0.5}
    full = {(c.config.seed, c.config.subset_seed) for c in found if c.config.fraction == 1.0}
    assert half == {(s, d) for s in (0, 1) for d in (5, 6, 7)}
    assert full == {(0, 5), (1, 5)}


def test_equal_epochs_and_equal_steps_are_two_budgets():
    by_epochs = grid_cells(BASE, ["resnet18"], [0.25, 1.0], [0], None, "epochs", whole)
    assert [c.steps for c in by_epochs] == [4 * (1000 // 32), 4 * (250 // 32)]
    assert all(c.config.steps is None for c in by_epochs)
    by_steps = grid_cells(BASE, ["resnet18"], [0.25, 1.0], [0], None, "steps", whole)
    assert {c.steps for c in by_steps} == {c.config.steps for c in by_steps} == {4 * (1000 // 32)}
    with pytest.raises(UsageError, match="epochs, steps"):
        grid_cells(BASE, ["resnet18"], [1.0], [0], None, "hours", whole)


def test_equal_steps_are_evaluated_about_equally_often():
    for every in (1, 3):
        base = replace(BASE, epochs=12, eval_epochs=every)
        found = grid_cells(base, ["resnet18"], [0.013, 0.1, 0.25, 0.9, 1.0], [0], None, "steps", whole)
        for cell in found:
            epochs = cell.steps / (cell.n_train // cell.config.batch_size)
            assert epochs / cell.config.eval_epochs == pytest.approx(12 / every, rel=0.15), cell.name
        assert found[0].config.eval_epochs == every and found[-1].n_train == 13
    by_epochs = grid_cells(replace(BASE, eval_epochs=3), ["resnet18"], [0.1, 1.0], [0], None, "epochs", whole)
    assert {cell.config.eval_epochs for cell in by_epochs} == {3}


def test_a_cell_that_was_started_with_more_evaluations_is_continued(tmp_path):
    (cell,) = grid_cells(BASE, ["resnet18"], [0.1], [0], None, "steps", whole)
    with RunFolder(tmp_path / "run", replace(cell.config, eval_epochs=1), resume=False):
        pass
    assert cell.config.eval_epochs > 1
    with RunFolder(tmp_path / "run", cell.config, resume=True):
        pass


def test_a_batch_larger_than_a_fraction_is_made_smaller_and_noted():
    small, large = grid_cells(BASE, ["resnet18"], [0.01, 1.0], [3], None, "epochs", whole)[::-1]
    assert (small.n_train, small.config.batch_size) == (13, 8)
    assert "32 → 8" in small.note and "13 images" in small.note
    assert large.config.batch_size == 32 and not large.note
    with pytest.raises(UsageError, match="1 training image"):
        grid_cells(BASE, ["resnet18"], [0.001], [0], None, "epochs", whole)
    (cell,) = grid_cells(replace(BASE, batch_size=1), ["vit_b16"], [0.01], [0], None, "epochs", whole)
    assert (cell.config.batch_size, cell.steps, cell.note) == (1, 40, "")


@pytest.mark.parametrize("images", range(1, 40))
def test_a_fitting_batch_is_the_largest_power_of_two_or_the_one_wanted(images):
    found = fitting_batch(16, images)
    assert found <= images and (found == 16 or (found & (found - 1) == 0 and 2 * found > images))


def test_lists_are_parsed():
    assert parse_fractions("1, 1/4,0.5") == [0.25, 0.5, 1.0]
    assert parse_fractions("1/3") == [read_fraction("1/3")]  # a single run trains on the lesions of the grid's cell
    assert parse_models("all") == list(EIGHT) and len(EIGHT) == 8
    assert parse_seeds("3,1", "--seeds") == [3, 1]
    assert FRACTIONS == (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)


@pytest.mark.parametrize("text", ["0", "1.5", "nan", "a", "1/0", "", "0.5,0.5", "-0.1"])
def test_wrong_fractions_and_seeds_are_refused(text):
    with pytest.raises(UsageError, match="--fractions"):
        parse_fractions(text)
    if text != "0":
        with pytest.raises(UsageError, match="--seeds"):
            parse_seeds("1,1" if text == "0.5,0.5" else text, "--seeds")


# ------------------------------------------------------------------ the folder


def leave(folder: StudyFolder, name: str) -> None:
    """Write a file into a cell's run folder."""
    run = folder.cell(Cell(BASE, 1000, 10).name)
    run.mkdir(parents=True)
    (run / name).write_text("{}")


def test_a_folder_with_other_things_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not a study"):
        StudyFolder(tmp_path, {})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_grid_may_come_after_what_leakage_left_in_its_folder(tmp_path):
    out = tmp_path / "study"
    with StudyFolder(out / LEAKAGE, {"model": "resnet18"}):
        pass
    with StudyFolder(out, {"epochs": 4}) as folder:
        leave(folder, "result.json")
    with pytest.raises(UsageError, match="epochs: 4, now 5"), StudyFolder(out, {"epochs": 5}):
        pass
    with StudyFolder(out / LEAKAGE, {"model": "resnet18"}):
        pass


def test_a_study_goes_on_only_with_the_normalisation_that_it_began_with(tmp_path):
    for name, before in (("new", {"packed": {"mean": "[0.7]"}}), ("older", {})):
        with StudyFolder(tmp_path / name, {"epochs": 4} | before) as folder:
            leave(folder, "result.json")
    with pytest.raises(UsageError, match=r"packed: .*0\.7.*, now .*0\.6"):
        StudyFolder(tmp_path / "new", {"epochs": 4, "packed": {"mean": "[0.6]"}})
    with StudyFolder(tmp_path / "older", {"epochs": 4, "packed": {"mean": "[0.6]"}}):
        pass


def test_a_truncated_line_of_the_journal_is_skipped(tmp_path):
    cell = Cell(BASE, 1000, 10)
    with StudyFolder(tmp_path / "s", {}) as folder:
        folder.ended(cell, "failed", "first", 1.0)
    with (tmp_path / "s" / "grid.jsonl").open("a") as file:
        file.write('{"cell": "resn')
    with StudyFolder(tmp_path / "s", {}) as folder:
        folder.ended(cell, "failed", "second", 1.0)
    assert read_journal(tmp_path / "s")[cell.name]["error"] == "second"


# ------------------------------------------------------------------ the display


def test_the_time_left_is_predicted_from_the_cells_that_ended():
    first, second, third, other = (
        Cell(replace(BASE, model=model, seed=seed), 1000, steps)
        for model, seed, steps in (("resnet18", 0, 100), ("resnet18", 1, 100), ("resnet18", 2, 50), ("vit_b16", 0, 100))
    )
    forecast = Forecast([first, second, third, other], 0, 1)
    assert forecast.seconds(first) is None and forecast.left_s([]) is None
    forecast.end(first, Ended("finished", {"seconds": {"train": 64.0}}), 164.0)  # compiled: 100 s besides training
    forecast.end(second, Ended("finished", {"seconds": {"train": 64.0}}), 66.0)
    assert forecast.seconds(third) == pytest.approx(32 + 2)
    assert forecast.seconds(other) == pytest.approx(66)
    assert forecast.left_s([]) == pytest.approx(34 + 66) and forecast.left_s([], "resnet18") == pytest.approx(34)


def test_the_live_table_shows_cells_done_running_left_and_time():
    from rich.console import Console

    planned = grid_cells(BASE, ["resnet18", "alexnet"], [0.5, 1.0], [0], None, "epochs", whole)
    view = LiveTable(planned, 3, 1)
    console = Console(width=100, record=True, file=io.StringIO())
    result = {"seconds": {"train": 60.0}, "test": {"balanced_accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}}
    view.count.end(planned[0], Ended("finished", result), 61.0)
    console.print(view._table())
    text = console.export_text()
    assert "4 of 7 cells done" in text and "0 running" in text and "3 left" in text
    assert "min left" in text and "resnet18" in text and "alexnet" in text
    assert [duration(s) for s in (45, 720, 11100)] == ["45 s", "12 min", "3 h 05 min"]


# ------------------------------------------------------------------ the whole command, on tiny pictures


@pytest.mark.parametrize("keep", UNWANTED)
def test_a_cell_that_finished_after_its_grid_was_killed_is_recorded_and_its_files_are_deleted(
    tmp_path, keep, monkeypatch
):
    monkeypatch.setattr("train.study.grid.asked_to_stop", lambda second_ends: [])
    cell = Cell(BASE, 1000, 124)
    with StudyFolder(tmp_path, {}) as folder:
        run = folder.cell(cell.name)
        result = made_study.write_run(run, BASE, 1000, made_study.test_set(np.random.default_rng(0), 30))
        for name in ("checkpoint.pt", "model.safetensors"):
            (run / name).touch()
        folder.ended(cell, "stopped", "stopped", 1.0)
        assert train_cells([cell], folder, "cpu", keep) == 0
        entry = read_journal(tmp_path)[cell.name]
        assert entry["outcome"] == "finished"
        assert float(rows_of(tmp_path)[cell.name]["wall_s"]) == pytest.approx(sum(result["seconds"].values()))
        left = {"all": {"checkpoint.pt", "model.safetensors"}, "weights": {"model.safetensors"}, "results": set()}
        assert {path.name for path in run.iterdir()} & left["all"] == left[keep]
        assert train_cells([cell], folder, "cpu", keep) == 0
        assert read_journal(tmp_path)[cell.name] == entry  # it is recorded once


def command(
    data: Path,
    out: Path,
    *more: object,
    model: str = "resnet18",
    epochs: int = 1,
    fractions: str = "0.3,1",
    per_device: object = 1,
) -> list[str]:
    options = ["--data", data, "--out", out, "--models", model, "--fractions", fractions, "--epochs", epochs]
    options += ["--per-device", per_device, "--resolution", 32, "--device", "cpu", "--compile", "off", *more]
    return [sys.executable, "-m", "train.grid", *map(str, options)]


def grid(line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=300)


def rows_of(out: Path) -> dict[str, dict[str, str]]:
    return {row["cell"]: row for row in csv.DictReader((out / "results.csv").open())}


@pytest.fixture(scope="module")
def study(tiny_shards, tmp_path_factory) -> tuple[Path, list[str], subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("grid") / "study"
    line = command(tiny_shards, out, "--seeds", "0,1", "--batch-size", 32)
    return out, line, grid(line)


@pytest.mark.slow
def test_a_grid_trains_every_cell_and_records_it(study):
    out, _, done = study
    assert done.returncode == 0, done.stderr
    assert "4 of 4 cells finished" in done.stdout and "[4/4]" in done.stdout
    rows = list(rows_of(out).values())
    assert len(rows) == 4 and {row["status"] for row in rows} == {"finished"}
    for row in rows:
        for key in ("balanced_accuracy", "balanced_accuracy_low", "balanced_accuracy_high", "recall_mel", "n_train"):
            assert row[key] != ""
        assert float(row["parameters"]) > 1e7 and float(row["flops_per_image"]) > 1e6
        assert float(row["img_per_s"]) > 0 and float(row["peak_memory_bytes"]) > 1e6
        assert all(float(row[f"{phase}_s"]) >= 0 for phase in ("start", "compile", "train", "eval"))
    small = [row for row in rows if row["fraction"] == "0.3"]
    assert all(row["batch_size"] == "16" and "32 → 16" in row["note"] for row in small)
    assert not list(out.glob("cells/*/checkpoint.pt")) and len(list(out.glob("cells/*/model.safetensors"))) == 4


@pytest.mark.slow
def test_run_again_finished_cells_are_skipped_and_changed_options_refused(study):
    out, line, _ = study
    before = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/*")}
    again = grid(line)
    assert again.returncode == 0 and "4 of 4 cells are finished already" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in out.glob("cells/*/*")} == before
    changed = grid([*line, "--lr", "0.5"])
    assert changed.returncode == 2 and "lr: None, now 0.5" in changed.stderr
    assert len(changed.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_cell_of_a_shared_worker_equals_its_run_alone_bit_for_bit(study, tiny_shards, tmp_path):
    out, _, _ = study
    last = "resnet18_f0.3_s1_u1"
    alone = [sys.executable, "-m", "train.run", "--model", "resnet18", "--data", str(tiny_shards), "--fraction", "0.3"]
    alone += ["--seed", "1", "--subset-seed", "1", "--epochs", "1", "--resolution", "32", "--batch-size", "16"]
    alone += ["--device", "cpu", "--compile", "off", "--out", str(tmp_path / "alone")]
    subprocess.run(alone, check=True, capture_output=True, cwd=ROOT, timeout=300)
    for name in ("model.safetensors", "predictions.parquet"):
        assert (tmp_path / "alone" / name).read_bytes() == (out / "cells" / last / name).read_bytes()


@pytest.mark.slow
def test_a_failing_cell_is_recorded_and_the_exit_code_is_1(tiny_shards, tmp_path):
    more = ("--seeds", 0, "--lr", "1e30", "--batch-size", 16, "--checkpoint-s", 0)
    broken = grid(command(tiny_shards, tmp_path / "s", *more))
    assert broken.returncode == 1, broken.stdout + broken.stderr
    rows = rows_of(tmp_path / "s")
    assert set(rows) == {"resnet18_f1_s0_u0", "resnet18_f0.3_s0_u0"}
    for row in rows.values():
        assert row["status"] == "failed"
        assert row["error"].startswith(("the loss is", "logits of"))  # after a single step only evaluation notices
        assert "use a lower --lr" in row["error"] or "with a lower --lr" in row["error"]
    assert "cells failed" in broken.stderr and "Traceback" not in broken.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_stops_a_grid_with_a_checkpoint(tiny_shards, tmp_path, number):
    more = ("--seeds", "0,1", "--batch-size", 16)
    line = command(tiny_shards, tmp_path / "s", *more, epochs=400, fractions="1", per_device=2)
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = [tmp_path / "s" / "cells" / f"resnet18_f1_s{seed}_u{seed}" / "metrics.jsonl" for seed in (0, 1)]
    while process.poll() is None and not all(file.exists() and file.stat().st_size for file in metrics):
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output + errors
    assert len(workers) >= 2 and not psutil.wait_procs(workers, timeout=5)[1]
    for file in metrics:
        assert (file.parent / "checkpoint.pt").exists() and not (file.parent / "result.json").exists()
    assert "run the same command to continue" in errors and "Traceback" not in errors
    assert not rows_of(tmp_path / "s")
