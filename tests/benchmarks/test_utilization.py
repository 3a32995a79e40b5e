"""The utilization benchmark. Its GPU is a scripted stand-in for the driver: no figure here is a measurement of one."""

import itertools
import re
import time
from dataclasses import replace

import pytest

from benchmarks.gpu import UNITS, GpuSource
from benchmarks.machine import environment
from benchmarks.measure import Row
from benchmarks.monitor import CoreSource
from benchmarks.peers.system import Work
from benchmarks.report import markdown, page, read_results, read_timelines
from benchmarks.tables import read_csv, write_csv
from benchmarks.timeline import READINGS, START_UP, TRAINING, Moment, read_timeline, timeline_svg, write_timeline
from benchmarks.training import TrainingJob
from benchmarks.utilization import NO_GPU, NOT_READ, measure_utilization, systems, utilization_in_words
from benchmarks.utilization_page import utilization_text
from benchmarks.worker import Running
from shards.common.errors import DataError
from tests.benchmarks.test_monitor import STAND_IN, ScriptedDriver

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
    return TrainingJob(Work(folder, folder), "resnet18", "cpu")


@pytest.fixture(scope="module")
def machine():
    return replace(environment("test"), gpu="none")


def watch(job, machine, source, names=NAMES, rounds=2, seconds=1):
    return measure_utilization(
        job, names, machine, rounds=rounds, seconds=seconds, told=lambda _: None, source=source, set_up=pretend
    )


@pytest.fixture(scope="module")
def on_stand_in(job, machine):
    """Rows and readings with the scripted driver in the GPU's place."""
    return watch(job, replace(machine, gpu=STAND_IN), lambda: GpuSource(nvml=ScriptedDriver()))


@pytest.fixture(scope="module")
def on_cores(job, machine):
    """Rows and readings of this machine's cores."""
    return watch(job, machine, CoreSource)


def of(rows, system, metric) -> Row:
    (row,) = [row for row in rows if (row.system, row.metric) == (system, metric)]
    return row


def test_readings_stand_beside_speed_ceiling_and_wait(on_stand_in):
    rows, _ = on_stand_in
    for name in NAMES:
        for metric in UNITS:
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
    for metric in UNITS:
        row = of(rows, NATIVE, f"{metric} mean")
        assert row.value is None and row.failed == NO_GPU
    cores = {row.metric for row in rows if row.metric.startswith("core_")}
    assert {"core_0_percent mean", "core_0_percent max"} <= cores
    assert all(0 <= row.value <= 100 for row in rows if row.metric.startswith("core_"))
    text = utilization_text(rows)
    assert f"The GPU columns are empty: {NO_GPU}" in text
    header, _, first = [line for line in text.splitlines() if line.startswith("|")][:3]
    titles, cells = ([c.strip() for c in line.split("|")[1:-1]] for line in (header, first))
    shown = dict(zip(titles, cells, strict=True))
    assert shown["CPU cores, mean %, one by one"] and shown["img/s"]
    assert {shown[title] for title in titles if "SM" in title or "NVML" in title or "PCIe" in title} == {""}
    assert {m.device for m in moments} == {"CPU"}


def test_a_gpu_beside_a_run_on_the_cpu_is_not_denied(job, machine):
    rows, _ = watch(job, replace(machine, gpu="some GPU"), CoreSource, (CEILING,), rounds=1)
    assert of(rows, CEILING, "power_w mean").failed == NOT_READ
    assert NOT_READ in utilization_text(rows) and NO_GPU not in utilization_text(rows)


def test_nvmls_utilization_is_never_the_headline(on_stand_in):
    rows, moments = on_stand_in
    text = utilization_text(rows)
    header = next(line for line in text.splitlines() if line.startswith("| model"))
    order = [header.index(title) for title in ("img/s", "cached-batch ceiling", "data wait", "SM busy", "NVML busy")]
    assert order == sorted(order)
    assert "says only that some kernel ran" in text
    assert set(READINGS) == set(UNITS) and list(READINGS)[-1] == "busy_percent"
    drawn = timeline_svg("t", moments)
    assert drawn.index(">SM busy<") < drawn.index(">power<") < drawn.index(">NVML busy<")
    assert STAND_IN in text and re.search(r"took [\d.]+ to [\d.]+ % of a core", text)
    for line in utilization_in_words(rows):
        assert line.index("img/s") < line.index("waiting for data") < line.index("(NVML)")
    assert len(utilization_in_words(rows)) == 2


def test_on_a_gpu_both_decoding_loaders_are_watched():
    assert set(systems("compiled", gpu=True)) - set(systems("compiled")) == {"compiled, dali loader"}


def test_a_gpu_that_cannot_tell_something_says_so(job, machine):
    driver = lambda: GpuSource(nvml=ScriptedDriver(gpm=False, refused={"power"}))  # noqa: E731
    rows, _ = watch(job, replace(machine, gpu=STAND_IN), driver, (CEILING,), rounds=1)
    assert "GPM" in of(rows, CEILING, "sm_percent mean").failed
    assert "Not Supported" in of(rows, CEILING, "power_w mean").failed
    assert of(rows, CEILING, "sm_mhz mean").value == 1400
    assert "power (Not Supported)" in utilization_text(rows)


def test_what_fails_is_in_the_table_with_its_reason(job, machine):
    lost = lambda: GpuSource(nvml=ScriptedDriver(lost_after=40))  # noqa: E731
    names = (CEILING, "broken, native loader")
    rows, moments = watch(job, replace(machine, gpu=STAND_IN), lost, names, rounds=1)
    assert of(rows, CEILING, "img_per_s").value, "training goes on without its readings"
    for metric in ("busy_percent mean", "sampler_core_share"):
        row = of(rows, CEILING, metric)
        assert row.value is None and "stopped answering" in row.failed
    assert "no such loader" in of(rows, "broken, native loader", "img_per_s").failed
    assert "no such loader" in of(rows, "broken, native loader", "img_per_s ratio").failed
    text = utilization_text(rows)
    assert "stopped answering" in text and "no such loader" in text
    assert {m.system for m in moments} <= {CEILING}
    (said,) = utilization_in_words(rows)
    assert "no such loader" in said


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


def test_the_picture_draws_values_at_their_place():
    values = ((-1.0, 80.0), (0.0, 0.0), (1.5, 50.0), (3.0, 100.0))
    moments = [
        Moment("m", system, 1, START_UP if at < 0 else TRAINING, "<d>", at, {"sm_percent": v, "power_w": 2 * v})
        for system in ("a, x", "b, y")
        for at, v in values
    ]
    svg = timeline_svg("t", moments)
    lines = re.findall(r'<polyline class="bar c0" points="([^"]*)"', svg)
    assert len(lines) == 4, "a lane a metric, a column a system"
    for line in lines:
        (x0, low), (x1, half), (x2, high) = (map(float, point.split(",")) for point in line.split())
        assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
        assert low - half == pytest.approx(half - high, abs=0.2) and low - high == pytest.approx(40, abs=0.2)
    assert svg.count(">start-up<") == svg.count(">training, counted<") == 2
    assert svg.count(">mean 50.0 %<") == 2 and ">200 W<" in svg
    assert "&lt;d&gt;" in svg and "<d>" not in svg


def test_the_report_shows_summary_and_timeline(on_stand_in, tmp_path):
    rows, moments = on_stand_in
    write_csv(tmp_path / "utilization-quick.csv", rows)
    with pytest.raises(DataError, match="utilization-quick-timeline"):
        read_timelines(tmp_path)
    write_timeline(tmp_path / "utilization-quick-timeline.csv", moments)
    results = read_results(tmp_path)
    assert "## Utilization" in markdown(results)
    html = page(results, read_timelines(tmp_path))
    assert html.count("<svg") == 1 + 2, "the bars, and a timeline for each of two rounds"
    assert STAND_IN in html and "<script" not in html
