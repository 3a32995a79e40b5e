"""The benchmarks that train: their systems make steps, what is counted, their command lines and their tables."""

import mmap
import os
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from benchmarks import stalls
from benchmarks.datasets import Job, prepared
from benchmarks.machine import StillCachedError, cached_share, drop_from_cache, read_into_cache
from benchmarks.measure import Row, Series
from benchmarks.options import Settings
from benchmarks.run import main
from benchmarks.stalls import _stall, _utilization, agreement, by_engine, measure_stalls
from benchmarks.tables import read_csv
from benchmarks.training import (
    _LOADERS,
    CACHED,
    COLD,
    COLD_RAW,
    FOLDER,
    FP32,
    IN_FP32,
    NATIVE,
    PAGE,
    RATIOS,
    RAW,
    RESIDENT,
    SYSTEMS,
    TrainingJob,
    measure_training,
    precision_of,
    set_up,
    system_name,
    train_models,
)
from shards import ShardSet
from shards.common.errors import UsageError
from tests.support.benchdata import in_a_process_of_its_own, measurement, series
from train.device import Decision


@pytest.fixture(scope="module")
def job(small_job: Job) -> TrainingJob:
    return TrainingJob(replace(small_job, copies=2), "resnet18", "cpu")


def stepped(name: str, job: TrainingJob) -> tuple[float, bool, dict[str, float]]:
    """Images of a step, whether waiting was counted, and the figures found on the way."""
    running = set_up(name, job)
    running.before()
    before = running.waited()
    return running.once(), running.waited() >= before, running.about


def waited_s(name: str, job: TrainingJob) -> float:
    running = set_up(name, job)
    for _ in range(8):  # more than is read ahead
        running.once()
    return running.waited()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "batches"),
    [("eager NCHW", CACHED), (f"eager NCHW{FP32}", FOLDER), *(("channels-last", source) for source in _LOADERS)],
)
def test_every_way_to_train_makes_steps(job, style, batches):
    name = system_name(style, batches)
    found = in_a_process_of_its_own(stepped, name, job) if batches == FOLDER else stepped(name, job)
    assert found == (8, True, {})


@pytest.mark.slow
def test_a_round_starts_when_what_was_read_ahead_is_used_up(job, monkeypatch):
    """So that the counted steps wait as they would in the middle of a training."""
    running = set_up(system_name("channels-last", COLD), job)
    running.before()
    closed = []
    monkeypatch.setattr("shards.Loader.close", lambda loader: closed.append(loader))
    left = 0
    while running.once():
        left += 1
    assert not closed  # at the end of the epoch nobody had to wait for that
    images = len(ShardSet(prepared(_LOADERS[COLD][0], job.images) / "set").select("train"))
    assert left == images // 8 - 2


@pytest.mark.slow
def test_a_cached_batch_never_waits_and_a_loader_is_seen_waiting(job):
    cached = waited_s(system_name("channels-last", CACHED), job)
    assert in_a_process_of_its_own(waited_s, system_name("channels-last", FOLDER), job) > 10 * cached


def test_every_style_stands_beside_its_own_ceiling():
    known = {*SYSTEMS, *IN_FP32}
    styles = {name.partition(", ")[0] for name in known}
    assert {system_name(style, CACHED) for style in styles} <= known
    assert {name for pair in RATIOS for name in pair} <= known


def test_each_engine_is_told_from_the_others():
    """Rows of three engines: each keeps its own, and all stand beside the one cached batch."""
    rows = [Row("stalls", system_name("channels-last", CACHED), "img_per_s", "img/s", 50.0, model="resnet18")]
    for value, source in ((0.1, NATIVE), (0.2, RAW), (0.3, RESIDENT)):
        name = system_name("channels-last", source)
        rows.append(Row("stalls", name, "prep_stall", "1", value, model="resnet18", page_cache="warm"))
    found = {engine: own for _, engine, own in by_engine(rows)}
    assert list(found) == ["jpg", "raw", "resident"]
    assert [own["warm", "prep_stall"].value for own in found.values()] == [0.1, 0.2, 0.3]
    assert all(own["", "img_per_s"].value == 50.0 for own in found.values())
    assert "| resnet18 |  | raw | 50.0 | 20.0 |" in stalls.PAGE.text(rows)
    assert "| resnet18 | 4 | raw | 50.0 | 20.0 |" in stalls.PAGE.text([replace(row, batch_size=4) for row in rows])


def test_files_leave_the_page_cache_and_come_back_but_not_while_they_are_mapped(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert len(bytes(view)) == 1 << 20  # touch every page
        assert cached_share(path) == 1.0
        with pytest.raises(StillCachedError, match="file: "):
            drop_from_cache(tmp_path)
    try:
        drop_from_cache(tmp_path)
    except StillCachedError:
        pytest.skip("this file system keeps its files in memory")
    assert cached_share(path) <= 0.02
    read_into_cache(tmp_path)
    assert cached_share(path) == 1.0


def test_stalls_are_shares_of_the_slower_ones_time():
    columns = {"benchmark": "stalls", "system": "x"}
    cached, warm = series(100, 100, 100), series(80, 75, 80)
    assert _stall(warm, cached, metric="prep_stall", **columns).value == pytest.approx(0.2)
    assert _utilization(warm, cached, **columns).value == pytest.approx(0.8)
    failed = _stall(warm, Series(failed="no disk"), metric="prep_stall", **columns)
    assert failed.value is None and "no disk" in failed.failed


@pytest.mark.parametrize("benchmark", ["stalls", "training"])
def test_systems_stand_still_while_others_have_their_turn(job, monkeypatch, benchmark):
    def recorded(set_up, names, *_, frozen=False, **__):
        assert frozen
        order.extend(names)
        return {name: series(10.0, 11.0, wait=0.1) for name in names}, {}

    order: list[str] = []
    if benchmark == "stalls":
        monkeypatch.setattr("benchmarks.stalls.take_turns", recorded)
        measure_stalls(job, ["jpg", "raw", "resident"], measurement(2, 1.0))
        sources = [name.partition(", ")[2] for name in order]
        assert sources == [COLD, NATIVE, RESIDENT, CACHED, RAW, COLD_RAW]  # what is compared stands side by side
    else:
        monkeypatch.setattr("benchmarks.training.take_turns", recorded)
        measure_training(job, SYSTEMS, measurement(2, 1.0))
        assert tuple(order) == SYSTEMS


def test_no_other_process_has_the_files_mapped_that_are_dropped():
    cold = [kind.name for source, (kind, _) in _LOADERS.items() if source.endswith("cold files")]
    warm = [kind.name for source, (kind, _) in _LOADERS.items() if not source.endswith("cold files")]
    assert len({*cold}) == len(cold) and not {*cold} & {*warm}


@pytest.mark.parametrize(
    ("ends", "wait", "said"),
    [
        ((0.20, 0.20), 0.17, "3.0 points apart: they agree"),
        ((0.19, 0.21), 0.17, "3.0 points apart: they agree"),
        ((0.20, 0.20), 0.10, "10.0 points apart: they do not agree"),
        ((0.28, 0.31), 0.17, "3.0 points apart: they do not agree"),
        ((-0.1, 0.3), 0.17, "3.0 points apart; not clear whether they agree"),
        ((0.20, 0.20), None, ""),
    ],
)
def test_agreement_is_said_in_points(ends, wait, said):
    stall = Row("stalls", "x", "prep_stall", "1", 0.20, *ends)
    assert agreement(stall, Row("stalls", "x", "data_wait", "1", wait)).startswith(said)


def test_the_table_of_stalls_shows_failures_and_the_target_of_mlperf():
    columns = {"system": system_name("channels-last", NATIVE), "model": "resnet18", "page_cache": "warm"}
    rows = [
        Row("stalls", metric="accelerator_utilization", unit="1", value=0.8, low=0.7, high=0.85, **columns),
        Row("stalls", metric="prep_stall", unit="1", value=None, failed="no disk", **columns),
    ]
    text = stalls.PAGE.text(rows)
    assert "| at least 0.9 | not met |" in text and "no disk" in text


def test_the_name_of_a_style_says_its_precision(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr("train.device.precision", lambda device, choice: Decision("bf16", "a device that has it"))
    assert precision_of(system_name("compiled", CACHED), device) == "bf16"
    assert precision_of(system_name(f"compiled{FP32}", CACHED), device) == "fp32"


# ------------------------------------------------------------------ the command lines


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("training", ["--model", "resnet19"], "resnet19"),
        ("training", ["--only", "nothing"], "eager"),
        ("grid", ["--model", "resnet19"], "resnet19"),
    ],
)
def test_wrong_choices_are_named(command, options, said, tmp_path):
    found = CliRunner().invoke(main, [command, *options, "--source", str(tmp_path), "--cache", str(tmp_path)])
    assert isinstance(found.exception, UsageError)
    assert said in str(found.exception)


@pytest.mark.parametrize("command", ["training", "stalls", "utilization", "grid"])
@pytest.mark.parametrize(("option", "value"), [("--batch-size", "0"), ("--rounds", "4")])
def test_values_out_of_range_are_refused_before_a_table_is_touched(command, option, value, tmp_path):
    found = CliRunner().invoke(
        main, [command, option, value, "--source", str(tmp_path), "--out", str(tmp_path / "out")]
    )
    assert found.exit_code == 2 and option in found.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["training", "stalls", "utilization"])
def test_a_batch_that_the_images_do_not_fill_is_refused_at_once(command, source, tmp_path):
    options = ["--source", str(source), "--cache", str(tmp_path), "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(main, [command, "--quick", "--batch-size", "601", *options])
    assert isinstance(found.exception, UsageError)
    assert "--batch-size 601: an epoch has 600 samples" in str(found.exception)
    assert not (tmp_path / "out").exists()


def test_models_are_added_to_the_table_that_is_there(source, tmp_path):
    def run(model: str, value: float, add: bool, batch_size: int = 2) -> None:
        def measure(one, measurement):
            return [Row(metric="img_per_s", unit="img/s", value=value, **one.columns("training", measurement, "x"))]

        settings = Settings("training", False, tmp_path, tmp_path, source, 5, models=(model,), device="cpu", add=add)
        train_models(replace(settings, batch_size=batch_size), PAGE, 1, measure)

    def found() -> dict:
        return {row.model: row.value for row in read_csv(tmp_path / "training.csv")}

    run("alexnet", 1.0, add=True)  # there is no table yet
    run("resnet18", 2.0, add=True)
    assert found() == {"alexnet": 1.0, "resnet18": 2.0}
    run("alexnet", 3.0, add=True)  # measured again: its old rows go
    assert found() == {"resnet18": 2.0, "alexnet": 3.0}
    run("alexnet", 3.0, add=True, batch_size=1)  # each model's own batch size stands beside it
    text = (tmp_path / "training.md").read_text()
    assert "| resnet18 | 2 | x |" in text and "| alexnet | 1 | x |" in text
    run("resnet34", 4.0, add=False)
    assert found() == {"resnet34": 4.0}
