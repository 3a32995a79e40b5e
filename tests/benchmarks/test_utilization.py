"""The utilization benchmark. Its GPU is a scripted stand-in for the driver: no figure here is a measurement of one."""

import time

import pytest

from benchmarks.datasets import Job
from benchmarks.measure import Row
from benchmarks.monitor import METRICS, CoreReader, GpuReader
from benchmarks.tables import read_csv, write_csv
from benchmarks.training import TrainingJob
from benchmarks.utilization import (
    PAGE,
    measure_utilization,
    systems,
)
from benchmarks.worker import Running
from tests.benchmarks.test_monitor import STAND_IN, ScriptedDriver
from tests.support.benchdata import measurement

NAMES = systems(gpu=False)
CEILING, NATIVE, BASELINE = NAMES
START_UP_S = 0.6
PACE = {CEILING: 100, NATIVE: 50, BASELINE: 25}
"""Images per second of the stand-ins for training."""


def pretend(name: str, job: TrainingJob) -> Running:
    """Stands in for training: steps that sleep, half of the time counted as waiting. What is asked to fail, fails."""
    time.sleep(START_UP_S)
    waited = 0.0
    if "broken" in name:
        raise RuntimeError("no such loader")

    def once() -> int:
        nonlocal waited
        begin = time.perf_counter()
        time.sleep(5 / PACE[name])
        waited += (time.perf_counter() - begin) / 2
        return 5

    return Running(once, waited=lambda: waited)


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> TrainingJob:
    folder = tmp_path_factory.mktemp("work")
    return TrainingJob(Job(folder, folder), "resnet18", "cpu")


def watch(job, reader, gpu="none", names=NAMES, rounds=2):
    return measure_utilization(job, names, measurement(rounds, 1.0, gpu=gpu), reader=reader, set_up=pretend)


@pytest.fixture(scope="module")
def on_stand_in(job):
    """Rows with the scripted driver in the GPU's place."""
    return watch(job, lambda: GpuReader(nvml=ScriptedDriver()), STAND_IN)


def of(rows, system, metric) -> Row:
    (row,) = [row for row in rows if (row.system, row.metric) == (system, metric)]
    return row


def test_readings_stand_beside_speed_ceiling_and_wait(on_stand_in):
    rows = on_stand_in
    for name in NAMES:
        for metric in METRICS:
            mean, median, low, high = (
                of(rows, name, f"{metric} {what}").value for what in ("mean", "median", "min", "max")
            )
            assert low <= mean <= high and low <= median <= high
            assert len(of(rows, name, f"{metric} mean").values) == 2
        assert 50 < of(rows, name, "busy_percent mean").value < 60
        assert (of(rows, name, "busy_percent min").value, of(rows, name, "busy_percent max").value) == (50, 60)
        assert of(rows, name, "power_w mean").value == 123
        assert of(rows, name, "data_wait").value == pytest.approx(0.5, abs=0.05)
        assert 0 < of(rows, name, "sampler_core_share").value < 0.2
        assert of(rows, name, "reached_hz").note == f"read from {STAND_IN}, driver 0.0"
    assert 0.2 < of(rows, BASELINE, "img_per_s ratio").value < of(rows, NATIVE, "img_per_s ratio").value < 0.8
    assert of(rows, NATIVE, "img_per_s ratio").beside == CEILING


def test_start_up_is_not_counted(on_stand_in):
    for name in NAMES:
        assert of(on_stand_in, name, "img_per_s").value > 0.5 * PACE[name], "start-up would take more than half"


def test_without_a_gpu_the_cores_are_read(job, tmp_path):
    write_csv(tmp_path / "x.csv", watch(job, CoreReader, names=(NATIVE,)))
    rows = read_csv(tmp_path / "x.csv")
    cores = [row for row in rows if row.metric.startswith("core_")]
    assert {"core_0_percent mean", "core_0_percent max"} <= {row.metric for row in cores}
    assert all(0 <= row.value <= 100 for row in cores)
    assert not {f"{metric} mean" for metric in METRICS} & {row.metric for row in rows}
    assert "read from CPU" in PAGE.text(rows)


def test_nvmls_utilization_is_never_the_headline(on_stand_in):
    text = PAGE.text(on_stand_in)
    titles = ("img/s", "with a cached batch", "data wait", "| SM busy |", "| NVML busy |")
    order = [text.index(title) for title in titles]
    assert order == sorted(order)
    assert "says only that some kernel ran" in text
    assert list(METRICS)[-1] == "busy_percent"
    assert STAND_IN in text and "| under 0.01 |" in text


def test_a_gpu_that_cannot_tell_something_says_so(job):
    driver = lambda: GpuReader(nvml=ScriptedDriver(gpm=False, refused={"power"}))  # noqa: E731
    rows = watch(job, driver, STAND_IN, (CEILING,), rounds=1)
    assert of(rows, CEILING, "sm_mhz mean").value == 1400
    note = of(rows, CEILING, "reached_hz").note
    assert "SM busy (this GPU has no GPM" in note and "power (Not Supported)" in note and note in PAGE.text(rows)


def test_what_fails_is_in_the_table_with_its_reason(job):
    lost = lambda: GpuReader(nvml=ScriptedDriver(lost_after=40))  # noqa: E731
    names = (CEILING, "broken, native loader")
    rows = watch(job, lost, STAND_IN, names, rounds=1)
    assert of(rows, CEILING, "img_per_s").value, "training goes on without its readings"
    assert "stopped answering" in of(rows, CEILING, "sampler_core_share").failed
    assert not [row for row in rows if row.metric.endswith(" mean")]
    assert "no such loader" in of(rows, "broken, native loader", "img_per_s").failed
    assert "no such loader" in of(rows, "broken, native loader", "img_per_s ratio").failed
    text = PAGE.text(rows)
    assert "stopped answering" in text and "no such loader" in text
