"""The grid: which cells there are, what its folder and its screen tell, and that nothing is done twice."""

import csv
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from shards.common.errors import DataError, UsageError
from train.config import Config
from train.record import RunFolder
from train.study import cells
from train.study.cells import Cell, fitting_batch, grid_cells, parse_fractions, parse_models, parse_seeds
from train.study.folder import LEAKAGE, StudyFolder, read_journal
from train.study.view import Forecast, LiveTable, duration
from train.study.worker import Ended

ROOT = Path(__file__).parents[3]
BASE = Config(model="resnet18", epochs=4, batch_size=32)


def whole(fraction: float, subset_seed: int) -> int:
    """A training split of 1,000 images, whose subsets differ a little with the seed."""
    return round(1000 * fraction) + (subset_seed if fraction < 1 else 0)


# ------------------------------------------------------------------ which cells there are


def test_every_model_meets_every_fraction_and_seed_once():
    found = grid_cells(BASE, ["resnet18", "alexnet"], [0.25, 1.0], [0, 1, 2], None, "epochs", whole)
    keys = {(c.config.model, c.config.fraction, c.config.seed) for c in found}
    assert len(found) == len(keys) == 12
    assert all(c.config.seed == c.config.subset_seed for c in found)
    assert len({c.name for c in found}) == 12


def test_a_models_cells_come_together_and_its_large_fractions_first():
    found = grid_cells(BASE, ["resnet18", "alexnet"], [0.25, 1.0, 0.5], [0, 1], None, "epochs", whole)
    models = [c.config.model for c in found]
    assert models == sorted(models, reverse=True)
    fractions = [c.config.fraction for c in found if c.config.model == "alexnet"]
    assert fractions == sorted(fractions, reverse=True)


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


def test_a_cell_that_was_begun_with_more_evaluations_goes_on(tmp_path):
    (cell,) = grid_cells(BASE, ["resnet18"], [0.1], [0], None, "steps", whole)
    with RunFolder(tmp_path / "run", replace(cell.config, eval_epochs=1), resume=False):
        pass
    assert cell.config.eval_epochs > 1
    with RunFolder(tmp_path / "run", cell.config, resume=True):
        pass


def test_a_batch_that_a_fraction_cannot_fill_is_made_to_fit_and_noted():
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
    assert parse_models("all") == list(cells.EIGHT) and len(cells.EIGHT) == 8
    assert parse_seeds("3,1", "--seeds") == [3, 1]
    assert len(cells.FRACTIONS) == 7
    steps = {b / a for a, b in zip(cells.FRACTIONS, cells.FRACTIONS[1:], strict=False)}
    assert steps == {2.0} and cells.FRACTIONS[0] == 1 / 64 and cells.FRACTIONS[-1] == 1


@pytest.mark.parametrize("text", ["0", "1.5", "nan", "a", "1/0", "", "0.5,0.5", "-0.1"])
def test_wrong_fractions_are_refused(text):
    with pytest.raises(UsageError, match="--fractions"):
        parse_fractions(text)


@pytest.mark.parametrize(("text", "option"), [("", "--seeds"), ("1,1", "--seeds"), ("-1", "--seeds"), ("x", "--seeds")])
def test_wrong_seeds_are_refused(text, option):
    with pytest.raises(UsageError, match=option):
        parse_seeds(text, option)


# ------------------------------------------------------------------ the folder


def test_changed_settings_are_refused_with_the_difference_and_the_same_go_on(tmp_path):
    same = {"epochs": 4, "lr": None}
    with StudyFolder(tmp_path / "study", same) as folder:
        with pytest.raises(DataError, match="another grid is running"):
            StudyFolder(tmp_path / "study", same)
        leave(folder, "result.json")
    with pytest.raises(UsageError, match="epochs: 4, now 5"):
        StudyFolder(tmp_path / "study", {"epochs": 5, "lr": None})
    with StudyFolder(tmp_path / "study", {"epochs": 4, "lr": None}):
        pass


def leave(folder: StudyFolder, name: str) -> None:
    """Leave a file in a cell's run folder."""
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


def test_a_line_of_the_journal_that_was_cut_short_costs_only_itself(tmp_path):
    cell = Cell(BASE, 1000, 10)
    with StudyFolder(tmp_path / "s", {}) as folder:
        folder.ended(cell, "failed", "first", 1.0)
    with (tmp_path / "s" / "grid.jsonl").open("a") as file:
        file.write('{"cell": "resn')
    with StudyFolder(tmp_path / "s", {}) as folder:
        folder.ended(cell, "failed", "second", 1.0)
    assert read_journal(tmp_path / "s")[cell.name]["error"] == "second"


# ------------------------------------------------------------------ what a person sees


def test_time_left_is_learnt_from_the_cells_that_ended():
    forecast = Forecast()
    first = Cell(BASE, 1000, 100)
    assert forecast.seconds(first) is None
    forecast.learn(first, {"seconds": {"train": 64.0}}, 164.0)  # compiled: 100 s besides training
    forecast.learn(first, {"seconds": {"train": 64.0}}, 66.0)
    assert forecast.seconds(Cell(BASE, 1000, 50)) == pytest.approx(32 + 2)
    other = Cell(replace(BASE, model="vit_b16"), 1000, 100)
    assert forecast.seconds(other) == pytest.approx(66)


def test_the_live_table_tells_cells_done_running_left_and_time():
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


# ------------------------------------------------------------------ the whole of it, on tiny pictures


def grid(*arguments: str, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "train.grid", "--device", "cpu", "--compile", "off", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, **more)


def common(data: Path, out: Path) -> list[str]:
    options = {"data": data, "out": out, "models": "resnet18", "fractions": "0.3,1", "epochs": 1, "resolution": 32}
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def study(tiny_shards, tmp_path_factory) -> tuple[Path, list[str], subprocess.CompletedProcess]:
    out = tmp_path_factory.mktemp("grid") / "study"
    arguments = [*common(tiny_shards, out), "--seeds", "0,1", "--batch-size", "32"]
    return out, arguments, grid(*arguments)


@pytest.mark.slow
def test_a_grid_trains_every_cell_and_tells_all_of_it(study):
    out, _, done = study
    assert done.returncode == 0, done.stderr
    assert "4 of 4 cells finished" in done.stdout and "[4/4]" in done.stdout
    rows = list(csv.DictReader((out / "results.csv").open()))
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
    out, arguments, _ = study
    before = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/*")}
    again = grid(*arguments)
    assert again.returncode == 0 and "4 of 4 cells are finished already" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in out.glob("cells/*/*")} == before
    changed = grid(*arguments, "--lr", "0.5")
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
def test_a_failing_cell_is_told_and_the_exit_code_says_so(tiny_shards, tmp_path):
    arguments = common(tiny_shards, tmp_path / "s")
    broken = grid(*arguments, "--seeds", "0", "--lr", "1e30", "--batch-size", "16", "--checkpoint-s", "0")
    assert broken.returncode == 1, broken.stdout + broken.stderr
    rows = {row["cell"]: row for row in csv.DictReader((tmp_path / "s" / "results.csv").open())}
    assert set(rows) == {"resnet18_f1_s0_u0", "resnet18_f0.3_s0_u0"} and {row["status"] for row in rows.values()} == {
        "failed"
    }
    # one step leaves no later loss to tell: then the evaluation does
    assert all(row["error"].startswith(("the loss is", "logits of")) for row in rows.values())
    assert all("use a lower --lr" in row["error"] or "with a lower --lr" in row["error"] for row in rows.values())
    assert "cells failed" in broken.stderr and "Traceback" not in broken.stderr


def workers_of(process: subprocess.Popen) -> list[int]:
    """The processes that train for a grid."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_its_cell_alone(tiny_shards, tmp_path):
    arguments = [*common(tiny_shards, tmp_path / "s"), "--seeds", "0", "--batch-size", "16", "--eval-epochs", "20"]
    arguments[arguments.index("--epochs") + 1] = "20"
    command = [sys.executable, "-m", "train.grid", "--device", "cpu", "--compile", "off", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "s" / "cells" / "resnet18_f1_s0_u0" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    (worker,) = workers_of(process)
    os.kill(worker, signal.SIGKILL)  # after one of its twenty epochs
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1, output + errors
    assert "1 of 2 cells finished" in output and "1 cells failed (resnet18_f1_s0_u0)" in errors
    rows = {row["cell"]: row for row in csv.DictReader((tmp_path / "s" / "results.csv").open())}
    assert {name: row["status"] for name, row in rows.items()} == {
        "resnet18_f1_s0_u0": "failed",
        "resnet18_f0.3_s0_u0": "finished",
    }
    assert "signal 9 (SIGKILL)" in rows["resnet18_f1_s0_u0"]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_a_grid_goes_on_where_it_was(tiny_shards, tmp_path, number):
    arguments = [*common(tiny_shards, tmp_path / "s"), "--seeds", "0", "--batch-size", "16"]
    arguments[arguments.index("--epochs") + 1] = "400"
    arguments[arguments.index("0.3,1")] = "1"
    command = [sys.executable, "-m", "train.grid", "--device", "cpu", "--compile", "off", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "s" / "cells" / "resnet18_f1_s0_u0" / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and metrics.stat().st_size:
            break
        time.sleep(0.1)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output + errors
    assert (metrics.parent / "checkpoint.pt").exists() and not (metrics.parent / "result.json").exists()
    assert "goes on" in errors and "Traceback" not in errors
    assert not list(csv.DictReader((tmp_path / "s" / "results.csv").open()))
