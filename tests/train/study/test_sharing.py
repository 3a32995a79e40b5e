"""How many cells share a device: what is decided and recorded, and that the results are those of one cell at a time."""

import json
import multiprocessing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.common import machine
from shards.common.errors import UsageError
from tests.support import made_study
from tests.support.train_runs import small, step_of
from tests.train.study.test_grid import BASE, command, grid, rows_of, whole
from train import compiling
from train import device as devices
from train.distributed import World
from train.study import sharing
from train.study.cells import Cell, grid_cells
from train.study.folder import STUDY, StudyFolder
from train.study.grid import train_cells
from train.study.sharing import Sharing, Trial, decide, parse_per_device


def test_the_number_is_auto_or_a_whole_number():
    assert parse_per_device("auto") is None and parse_per_device("3") == 3
    for text in ("0", "-1", "1.5", "two", "", "²"):
        with pytest.raises(UsageError, match=r"--per-device .* neither auto nor a whole number"):
            parse_per_device(text)


# ------------------------------------------------------------------ the decision


def planned(models: list[str], seeds: int, **changes: object) -> list[Cell]:
    return grid_cells(replace(BASE, **changes), models, [1.0], list(range(seeds)), None, "epochs", whole)


class Machine:
    """16 cores, `free` bytes, and trials of what is in `answers`, by number of cells; `tried` has their settings."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, kind: str, free: float, answers: dict[int, Trial | str]
    ) -> None:
        self.tried = []
        monkeypatch.setattr(sharing, "available_cores", lambda: 16)
        monkeypatch.setattr(sharing, "free_bytes", lambda device: int(free))
        monkeypatch.setattr(devices, "choose", lambda name: torch.device(kind))

        def train(config, ahead, gpu, number, *_):
            self.tried.append((number, config.model, config.threads, config.compile, gpu, ahead))
            return answers[number]

        monkeypatch.setattr(sharing, "train", train)

    def decide(self, wanted: int | None, cells: list[Cell], gpus=(None,), earlier: Sharing | None = None):
        found = decide(wanted, cells, gpus, earlier, Path("log"), lambda: 0)
        return found.per_device, found.threads, found.reason


@pytest.mark.parametrize(
    ("cells", "threads", "free", "expected"),
    [
        (20, None, 1e12, (16, 1)),
        (5, None, 1e12, (5, 3)),
        (20, 4, 1e12, (4, 4)),
        (20, None, 11e9, (4, 4)),  # four of 2 GB in 80 % of it
        (20, None, 1e9, (1, None)),
    ],
)
def test_auto_on_a_cpu_takes_a_cell_for_each_core_if_the_largest_fits(monkeypatch, cells, threads, free, expected):
    here = Machine(monkeypatch, "cpu", free, {1: Trial("resnet50", 0.0, 2_000_000_000)})
    models = ["resnet18", "resnet50"] if cells > 5 else ["resnet50"]
    found = here.decide(None, planned(models, cells // len(models), threads=threads))
    assert found[:2] == expected and "resnet50 takes 2 GB" in found[2]
    assert [one[:4] for one in here.tried] == [(1, "resnet50", threads, "off")]


def test_nothing_is_tried_for_one_cell_or_one_core_for_each_device(monkeypatch):
    here = Machine(monkeypatch, "cpu", 1e12, {})
    assert here.decide(None, planned(["resnet18"], 1))[:2] == (1, None)
    assert here.decide(None, planned(["resnet18"], 3, threads=16))[:2] == (1, 16)
    assert here.decide(None, planned(["resnet18"], 2), ["0", "1"])[:2] == (1, None)


def test_auto_on_a_gpu_doubles_the_cells_as_long_as_that_trains_more_images(monkeypatch):
    speeds = {1: 100.0, 2: 180.0, 4: 200.0, 8: 205.0}
    here = Machine(monkeypatch, "cuda", 0, {number: Trial("alexnet", speed, 1) for number, speed in speeds.items()})
    found = here.decide(None, planned(["alexnet"], 40), ["3", "4"])
    assert found[:2] == (4, 2) and "4 at once: 200 img/s of alexnet; 8 at once: 205 img/s" in found[2]
    assert [(number, threads, gpu) for number, _, threads, _, gpu, _ in here.tried] == [
        (1, None, "3"),
        (2, 4, "3"),
        (4, 2, "3"),
        (8, 1, "3"),
    ]
    images = planned(["alexnet"], 1)[0].images
    assert [one[-1] for one in here.tried] == [39 * images // number for number in (1, 2, 4, 8)]


def test_a_trial_that_fails_leaves_the_number_before(monkeypatch):
    here = Machine(monkeypatch, "cuda", 0, {1: Trial("alexnet", 100.0, 1), 2: "OutOfMemoryError: no room"})
    found = here.decide(None, planned(["alexnet"], 4))
    assert found[:2] == (1, None) and "2 at once failed: OutOfMemoryError: no room" in found[2]
    assert Machine(monkeypatch, "cpu", 1e12, {1: "no room"}).decide(None, planned(["alexnet"], 4))[0] == 1


def test_a_number_that_was_asked_for_shares_out_the_cores(monkeypatch):
    here = Machine(monkeypatch, "cpu", 0, {})
    assert here.decide(4, planned(["resnet18"], 9)) == (4, 4, "asked for")
    assert here.decide(4, planned(["resnet18"], 2)) == (2, 8, "asked for")
    assert here.decide(4, planned(["resnet18"], 9, threads=1)) == (4, 1, "asked for")
    assert here.decide(1, planned(["resnet18"], 9)) == (1, None, "asked for")


def test_a_study_keeps_its_number_and_its_threads(monkeypatch):
    here, cells = Machine(monkeypatch, "cpu", 1e12, {}), planned(["resnet18"], 9)
    assert here.decide(None, cells, earlier=Sharing(3, 5, "before")) == (3, 5, "before")
    assert here.decide(None, cells[:1], earlier=Sharing(3, 5, "before")) == (3, 5, "before")  # others may come back
    assert here.decide(1, cells, earlier=Sharing(3, 5, "before")) == (1, 5, "asked for")
    assert here.decide(None, planned(["resnet18"], 9, threads=2), earlier=Sharing(3, 5))[:2] == (3, 2)
    assert here.decide(None, planned(["resnet18"], 9, threads=8), earlier=Sharing(3, 5))[:2] == (2, 8)  # of 16 cores
    assert here.decide(None, cells, earlier=Sharing())[:2] == (1, None)  # of an older release


@pytest.mark.parametrize("known", [Sharing(2, 1, "before"), None])
def test_a_study_that_goes_on_with_other_threads_says_so(tmp_path, monkeypatch, capsys, known):
    monkeypatch.setattr("train.study.grid.asked_to_stop", lambda second_ends: [])
    cell = Cell(replace(BASE, threads=4), 1000, 124)
    with StudyFolder(tmp_path, {}) as folder:
        run = folder.cell(cell.name)
        made_study.write_run(run, BASE, 1000, made_study.test_set(np.random.default_rng(0), 30))
        if known is not None:
            folder.record_sharing(asdict(known))
        assert train_cells([cell], folder, "cpu", per_device=2) == 0
        assert f"--threads 4, and {1 if known else 'the default'} until now" in capsys.readouterr().err
        assert folder.sharing() == {"per_device": 1, "threads": 4, "reason": "asked for"}  # there is one cell
        assert train_cells([cell], folder, "cpu", per_device=None) == 0
        assert "until now" not in capsys.readouterr().err


# ------------------------------------------------------------------ the memory of a GPU


def test_the_processes_of_a_gpu_share_its_memory_and_each_counts_its_share_alone(monkeypatch):
    shares: list[float] = [1.0]
    fakes = {
        "set_device": lambda device: None,
        "set_per_process_memory_fraction": lambda share, device: shares.append(share),
        "get_per_process_memory_fraction": lambda device: shares[-1],
        "mem_get_info": lambda device: (60, 80),
        "memory_reserved": lambda device: 12,
        "memory_allocated": lambda device: 10,
        "memory_stats": lambda device: {"inactive_split_bytes.all.current": 1},
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
    devices.prepare(torch.device("cuda:0"))
    assert machine.free_bytes("cuda:0") == 60 + 12 - 10 - 1
    devices.prepare(torch.device("cuda:0"), processes=4)
    assert shares[1:] == [0.25] and machine.free_bytes("cuda:0") == 80 / 4 - 10 - 1


def test_what_compiling_saves_is_measured_anew_for_another_number_of_cells(tiny_shards, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, alone, two = small(tiny_shards), World(), World(per_device=2)
    step = step_of(config)
    compiling.tried(step, config, two, 1.0)
    assert compiling.recall(step, config, 16, two) is not None
    assert compiling.recall(step, config, 16, alone) is None


# ------------------------------------------------------------------ real processes


def test_a_trial_that_is_stopped_leaves_no_process(tiny_shards, tmp_path):
    log = tmp_path / "logs" / "trial.log"
    assert sharing.train(small(tiny_shards), 0, None, 2, 60.0, log, lambda: 1) == "stopped"
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_two_processes_of_a_trial_train_at_the_same_time_and_a_failure_is_one_line(tiny_shards, tmp_path):
    config, log = small(tiny_shards, threads=1), tmp_path / "logs" / "trial.log"
    found = sharing.train(config, 0, None, 2, 0.2, log, lambda: 0)
    assert isinstance(found, Trial), found
    assert found.model == config.model and found.img_per_s > 0 and found.memory_bytes > 1e8
    failed = sharing.train(replace(config, data=str(tmp_path)), 0, None, 2, 0.2, log, lambda: 0)
    assert isinstance(failed, str) and "DataError" in failed and str(tmp_path) in failed
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_cells_at_the_same_time_equal_those_one_after_the_other_bit_for_bit(tiny_shards, tmp_path, monkeypatch):
    outs = {1: tmp_path / "one", 2: tmp_path / "two", "auto": tmp_path / "auto"}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    for number, out in outs.items():
        more = ("--seeds", "0,1", "--batch-size", 16, *(() if number == "auto" else ("--threads", 1)))
        done = grid(command(tiny_shards, out, *more, model="test_resnet", fractions="0.5", per_device=number))
        assert done.returncode == 0, done.stderr
    decided = {number: json.loads((out / STUDY).read_text())["sharing"] for number, out in outs.items()}
    assert [(decided[n]["per_device"], decided[n]["threads"]) for n in (1, 2)] == [(1, 1), (2, 1)]
    rows = {number: rows_of(out) for number, out in outs.items()}
    scores = [key for key in next(iter(rows[1].values())) if not key.endswith(("_s", "_bytes", "_fraction"))]
    assert "balanced_accuracy" in scores and "train_loss" in scores and "threads" in scores
    same = [2, "auto"] if decided["auto"]["threads"] == 1 else [2]  # a machine with two cores
    for other in same:
        assert len(rows[other]) == 2
        for cell, row in rows[other].items():
            assert row["per_device"] == "2" and rows[1][cell]["per_device"] == "1"
            alike = [key for key in scores if key != "per_device"]
            assert {key: row[key] for key in alike} == {key: rows[1][cell][key] for key in alike}
            for name in ("model.safetensors", "predictions.parquet"):
                one, two = (outs[number] / "cells" / cell / name for number in (1, other))
                assert one.read_bytes() == two.read_bytes()
            taken = json.loads((outs[other] / "cells" / cell / "environment.json").read_text())["decisions"]
            assert (taken["threads"]["value"], taken["per_device"]["value"]) == ("1", "2")
