"""The utilization benchmark. Its GPU is a scripted stand-in for the driver: no figure here is a measurement of one."""

import itertools
import re
import time

import pytest

from benchmarks.datasets import Job
from benchmarks.measure import Row
from benchmarks.monitor import METRICS, CoreReader, GpuReader
from benchmarks.report import draw, markdown, read_results, read_timelines, timeline
from benchmarks.tables import read_csv, write_csv
from benchmarks.training import TrainingJob
from benchmarks.utilization import (
    NO_GPU,
    NOT_READ,
    PAGE,
    START_UP,
    TRAINING,
    Moment,
    measure_utilization,
    read_timeline,
    systems,
    write_timeline,
)
from benchmarks.worker import Running
from shards.common.errors import DataError
from tests.benchmarks.test_monitor import STAND_IN, ScriptedDriver
from tests.support.benchdata import measurement

NAMES = systems("channels-last")
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
    """Rows and readings with the scripted driver in the GPU's place."""
    return watch(job, lambda: GpuReader(nvml=ScriptedDriver()), STAND_IN)


@pytest.fixture(scope="module")
def on_cores(job):
    """Rows and readings of this machine's cores."""
    return watch(job, CoreReader)


def of(rows, system, metric) -> Row:
    (row,) = [row for row in rows if (row.system, row.metric) == (system, metric)]
    return row


def test_readings_stand_beside_speed_ceiling_and_wait(on_stand_in):
    rows, _ = on_stand_in
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


def test_start_up_is_read_but_not_counted(on_stand_in):
    rows, moments = on_stand_in
    assert {(m.system, m.round) for m in moments} == set(itertools.product(NAMES, (1, 2)))
    for name in NAMES:
        assert of(rows, name, "set_up_s").value >= START_UP_S
        assert of(rows, name, "img_per_s").value > 0.5 * PACE[name], "start-up would take more than half"
        own = [m for m in moments if m.system == name and m.round == 1]
        assert [m.at_s for m in own] == sorted(m.at_s for m in own)
        assert all((m.at_s < 0) == (m.phase == START_UP) for m in own)
        assert {m.phase for m in own} == {START_UP, TRAINING}
        assert min(m.at_s for m in own) >= -5 and max(m.at_s for m in own) < 5
        counted = [m.values["busy_percent"] for m in own if m.phase == TRAINING]
        assert of(rows, name, "busy_percent mean").values[0] == pytest.approx(sum(counted) / len(counted))


def test_without_a_gpu_its_columns_are_empty_and_it_says_why(on_cores, tmp_path):
    rows, moments = on_cores
    write_csv(tmp_path / "x.csv", rows)
    rows = read_csv(tmp_path / "x.csv")
    for metric in METRICS:
        row = of(rows, NATIVE, f"{metric} mean")
        assert row.value is None and row.failed == NO_GPU
    cores = {row.metric for row in rows if row.metric.startswith("core_")}
    assert {"core_0_percent mean", "core_0_percent max"} <= cores
    assert all(0 <= row.value <= 100 for row in rows if row.metric.startswith("core_"))
    assert f"The GPU columns are empty: {NO_GPU}" in PAGE.text(rows)
    assert {m.device for m in moments} == {"CPU"}


def test_a_gpu_beside_a_run_on_the_cpu_is_not_denied(job):
    rows, _ = watch(job, CoreReader, "some GPU", (CEILING,), rounds=1)
    assert of(rows, CEILING, "power_w mean").failed == NOT_READ
    assert NOT_READ in PAGE.text(rows) and NO_GPU not in PAGE.text(rows)


def test_nvmls_utilization_is_never_the_headline(on_stand_in):
    rows, moments = on_stand_in
    text = PAGE.text(rows)
    header = next(line for line in text.splitlines() if line.startswith("| model"))
    order = [header.index(title) for title in ("img/s", "with a cached batch", "data wait", "SM busy", "NVML busy")]
    assert order == sorted(order)
    assert "says only that some kernel ran" in text
    assert list(METRICS)[-1] == "busy_percent"
    drawn = [axes.get_ylabel() for axes in timeline([m for m in moments if m.round == 1]).axes]
    assert drawn.index("SM busy, %") < drawn.index("power, W") < drawn.index("NVML busy, %")
    assert STAND_IN in text and re.search(r"took [\d.]+ to [\d.]+ % of a core", text)


def test_a_gpu_that_cannot_tell_something_says_so(job):
    driver = lambda: GpuReader(nvml=ScriptedDriver(gpm=False, refused={"power"}))  # noqa: E731
    rows, _ = watch(job, driver, STAND_IN, (CEILING,), rounds=1)
    assert "GPM" in of(rows, CEILING, "sm_percent mean").failed
    assert "Not Supported" in of(rows, CEILING, "power_w mean").failed
    assert of(rows, CEILING, "sm_mhz mean").value == 1400
    assert "power (Not Supported)" in PAGE.text(rows)


def test_what_fails_is_in_the_table_with_its_reason(job):
    lost = lambda: GpuReader(nvml=ScriptedDriver(lost_after=40))  # noqa: E731
    names = (CEILING, "broken, native loader")
    rows, moments = watch(job, lost, STAND_IN, names, rounds=1)
    assert of(rows, CEILING, "img_per_s").value, "training goes on without its readings"
    for metric in ("busy_percent mean", "sampler_core_share"):
        row = of(rows, CEILING, metric)
        assert row.value is None and "stopped answering" in row.failed
    assert "no such loader" in of(rows, "broken, native loader", "img_per_s").failed
    assert "no such loader" in of(rows, "broken, native loader", "img_per_s ratio").failed
    text = PAGE.text(rows)
    assert "stopped answering" in text and "no such loader" in text
    assert {m.system for m in moments} <= {CEILING}


def test_timelines_come_back_as_they_were_written(on_stand_in, tmp_path):
    _, moments = on_stand_in
    write_timeline(tmp_path / "t.csv", moments)
    back = read_timeline(tmp_path / "t.csv")
    assert [(m.system, m.round, m.phase, m.device) for m in back] == [
        (m.system, m.round, m.phase, STAND_IN) for m in moments
    ]
    for ours, read in zip(moments, back, strict=True):
        assert read.at_s == pytest.approx(ours.at_s, abs=1e-4)
        assert read.values == pytest.approx(dict(ours.values))


@pytest.mark.parametrize(
    "text", ["", "system,at_s\nx,1\n", "model,system,round,phase,device,at_s,a\nm,s,one,p,d,1,2\n"]
)
def test_a_damaged_timeline_is_named(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=r"t\.csv"):
        read_timeline(tmp_path / "t.csv")


def test_a_timeline_draws_values_at_their_time():
    values = ((-2.0, 10.0), (-1.0, 80.0), (0.0, 0.0), (1.5, 50.0), (3.0, 100.0))
    moments = [
        Moment("m", system, 1, START_UP if at < 0 else TRAINING, "d", at, {"sm_percent": v, "power_w": 2 * v})
        for system in ("a, x", "b, y")
        for at, v in values
    ]
    panels = timeline(moments).axes
    assert len(panels) == 4, "a row per reading, a column per system"
    for axes, scale in zip(panels, (1, 1, 2, 2), strict=True):
        start_up, training, _ = axes.lines
        assert list(start_up.get_xydata().flat) == [-1.0, 80.0 * scale]  # at most a third of the training after it
        assert list(training.get_xydata().flat) == [0.0, 0.0, 1.5, 50.0 * scale, 3.0, 100.0 * scale]
        assert axes.get_title(loc="right") == f"mean {50 * scale}{'.0 %' if scale == 1 else ' W'}"
    assert panels[0].get_ylim() == (0, 100) and panels[2].get_ylim() == panels[3].get_ylim()
    with pytest.raises(ValueError, match="no readings"):
        timeline([])


def test_the_report_shows_summary_and_timeline(on_stand_in, tmp_path):
    rows, moments = on_stand_in
    write_csv(tmp_path / "utilization-quick.csv", rows)
    with pytest.raises(DataError, match="utilization-quick-timeline"):
        read_timelines(tmp_path)
    write_timeline(tmp_path / "utilization-quick-timeline.csv", moments)
    results = read_results(tmp_path)
    charts = draw(results, read_timelines(tmp_path))
    assert set(charts) == {"utilization.svg", "utilization-resnet18.svg"}
    text = markdown(results, charts)
    assert "## Utilization" in text and all(f"({name})" in text for name in charts)
    assert STAND_IN.encode() in charts["utilization-resnet18.svg"]
