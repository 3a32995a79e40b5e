"""The worker pool: one process per model and GPU, its replacement after a loss, and how it is stopped."""

import json
import multiprocessing
import re
import threading
import time
from pathlib import Path

import pytest

from tests.support import fake_worker
from tests.train.study.test_grid import BASE, whole
from train.study import table as results
from train.study.cells import Cell, grid_cells
from train.study.folder import UNWANTED, StudyFolder, read_journal
from train.study.pool import Pool
from train.study.process import Process, Slot
from train.study.view import Lines
from train.study.worker import Warned


def run_pool(path: Path, planned: list[Cell], gpus: list[str | None], stop=lambda: 0) -> tuple[list[str], list[dict]]:
    entries: list[dict] = []
    with StudyFolder(path, {}) as folder, Lines(planned, 0, len(gpus)) as view:
        workers = [Process(gpu, fake_worker.work) for gpu in gpus]
        pool = Pool(folder, view, workers, entries.append, UNWANTED["results"], len(gpus) // len(set(gpus)))
        failed = pool.run(planned, stop)
    return failed, entries


def trained(path: Path) -> dict[str, dict]:
    return {p.parent.name: json.loads(p.read_text()) for p in path.glob("cells/*/trained.json")}


def test_the_cells_of_a_model_share_a_process_and_another_model_gets_another(tmp_path):
    planned = grid_cells(BASE, ["resnet18", "alexnet"], [0.5, 1.0], [0, 1], None, "epochs", whole)
    failed, entries = run_pool(tmp_path / "s", planned, [None])
    records = trained(tmp_path / "s")
    assert not failed and len(entries) == len(records) == 8
    processes = {
        model: {t["pid"] for t in records.values() if t["model"] == model} for model in ("resnet18", "alexnet")
    }
    assert all(len(pids) == 1 for pids in processes.values())
    assert processes["resnet18"] != processes["alexnet"]
    assert all(t["unwanted"] == ["checkpoint.pt", "model.safetensors"] for t in records.values())
    ahead = [records[c.name]["ahead"] for c in planned if c.config.model == "resnet18"]
    assert ahead == sorted(ahead, reverse=True) and ahead[-1] == 0 and ahead[0] == sum(c.images for c in planned[1:4])


def test_every_gpu_has_a_worker_and_idle_ones_help_with_the_last_model(tmp_path):
    planned = grid_cells(BASE, ["resnet18"], [0.5, 1.0], list(range(4)), None, "epochs", whole)
    failed, _ = run_pool(tmp_path / "s", planned, ["0", "1"])
    records = trained(tmp_path / "s")
    assert not failed and len(records) == 8
    assert {t["gpu"] for t in records.values()} == {"0", "1"}
    assert len({(t["gpu"], t["pid"]) for t in records.values()}) == 2


def test_several_workers_share_each_gpu(tmp_path):
    planned = grid_cells(BASE, ["resnet18"], [0.25, 0.5, 1.0], list(range(4)), None, "epochs", whole)
    failed, _ = run_pool(tmp_path / "s", planned, ["0", "1"] * 2)
    records = trained(tmp_path / "s")
    assert not failed and len(records) == 12
    assert sorted(gpu for gpu, _ in {(t["gpu"], t["pid"]) for t in records.values()}) == ["0", "0", "1", "1"]
    assert {t["per_device"] for t in records.values()} == {2}


@pytest.mark.parametrize(
    ("seed", "words"),
    [
        (fake_worker.KILLED, "signal 9 .SIGKILL."),
        (fake_worker.CRASHED, "exit code 3"),
        (fake_worker.FAILED, "loss is nan"),
    ],
)
def test_a_lost_cell_is_recorded_its_worker_replaced_and_the_rest_goes_on(tmp_path, seed, words):
    planned = grid_cells(BASE, ["resnet18"], [1.0], [0, seed, 1], None, "epochs", whole)
    failed, entries = run_pool(tmp_path / "s", planned, [None])
    lost = planned[1].name
    assert failed == [lost]
    assert [e["outcome"] for e in entries] == ["finished", "failed", "finished"]
    records = trained(tmp_path / "s")
    assert set(records) == {planned[0].name, planned[2].name}
    assert records[planned[0].name]["pid"] != records[planned[2].name]["pid"]
    error = read_journal(tmp_path / "s")[lost]["error"]
    assert re.search(words, error)
    row = results.read_rows(tmp_path / "s")[lost]
    assert row["status"] == "failed" and row["error"] == error and row["seed"] == seed


def test_a_stop_ends_the_running_cells_and_starts_no_other(tmp_path):
    planned = grid_cells(BASE, ["resnet18"], [0.5, 1.0], [fake_worker.SLOW], None, "epochs", whole)
    planned += grid_cells(BASE, ["resnet18"], [1.0], [0], None, "epochs", whole)
    asked: list[int] = []
    threading.Timer(1.5, lambda: asked.append(15)).start()
    failed, entries = run_pool(tmp_path / "s", planned, [None, None], lambda: len(asked))
    assert not failed and [e["outcome"] for e in entries] == ["stopped"] * 2
    assert not trained(tmp_path / "s") and not multiprocessing.active_children()


def test_a_worker_that_ignores_the_stop_is_killed_at_the_second_request(tmp_path):
    planned = grid_cells(BASE, ["resnet18"], [1.0], [fake_worker.SILENT], None, "epochs", whole)
    began = time.monotonic()
    failed, entries = run_pool(tmp_path / "s", planned, [None], lambda: 2 if time.monotonic() - began > 1.5 else 0)
    assert not failed and [e["outcome"] for e in entries] == ["stopped"]
    assert time.monotonic() - began < 20


def test_a_warning_of_several_workers_is_shown_once(tmp_path, capsys):
    with StudyFolder(tmp_path, {}) as folder, Lines([], 0, 2) as view:
        pool = Pool(folder, view, [Process()], lambda entry: None)
        for model, text in (
            ("a", "others slow it: 1.0 of 2"),
            ("b", "others slow it: 1.2 of 2"),
            ("b", "crops shrink"),
        ):
            pool._warn(Slot(0, Process(), model), Warned(text))
    assert capsys.readouterr().err == "warning: a: others slow it: 1.0 of 2\nwarning: b: crops shrink\n"


def test_each_visible_gpu_gets_a_worker_and_the_cpu_one(monkeypatch):
    from train import device
    from train.study import pool

    monkeypatch.setattr(pool, "_has_driver", lambda: True)
    monkeypatch.setattr(device, "gpu_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert pool.visible_gpus("auto") == pool.visible_gpus("cuda") == ["0", "1", "2"]
    assert pool.visible_gpus("cpu") == pool.visible_gpus("cuda:1") == [None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,GPU-abc")
    assert pool.visible_gpus("auto") == ["4", "7", "GPU-abc"]
    monkeypatch.setattr(device, "gpu_count", lambda: 1)
    assert pool.visible_gpus("auto") == [None]
    monkeypatch.setattr(pool, "_has_driver", lambda: False)
    assert pool.visible_gpus("auto") == [None]
