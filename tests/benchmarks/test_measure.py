"""Timing, its summary, and the tables that keep it."""

import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from benchmarks.machine import Meter, environment, tree_cpu_s
from benchmarks.measure import (
    Row,
    Sample,
    interleave,
    median_interval,
    ratio_row,
    series_rows,
    summary_row,
    wait_row,
)
from benchmarks.tables import cell, machine_text, notes, number, pivot, read_csv, write_csv
from shards.common.errors import DataError
from tests.support.benchdata import measurement, series


@pytest.mark.parametrize("n", range(1, 40))
def test_the_interval_is_scipys_and_holds_the_median(n):
    values = np.random.default_rng(n).normal(size=n)
    with pytest.raises(ValueError):
        median_interval([])
    found = median_interval(list(values))
    assert found.median == pytest.approx(statistics.median(values))
    library = scipy.stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    if n < 6:  # no pair of values reaches 95 %
        assert np.isnan(library.low) and (found.low, found.high) == (min(values), max(values))
        assert found.coverage == pytest.approx(1 - 2 / 2**n)
    else:
        assert (found.low, found.high) == (library.low, library.high) and 0.95 <= found.coverage < 1


def test_systems_run_in_turn_and_warm_up_is_thrown_away():
    order = []

    def system(name: str):
        def once() -> Sample:
            order.append(name)
            return Sample(count=len(order), seconds=1, cpu_s=0)

        return once

    found = interleave({name: system(name) for name in "ABC"}, measurement(3))
    assert "".join(order) == "ABC" * 4
    assert [s.count for s in found["B"].samples] == [5, 8, 11]


def test_a_system_that_raises_keeps_its_reason_and_the_others_go_on():
    calls = []

    def breaks() -> Sample:
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the disk\nis gone")
        return Sample(1, 1, 0)

    found = interleave({"bad": breaks, "good": lambda: Sample(10, 1, 0)}, measurement(5))
    assert found["bad"].failed == "OSError: the disk is gone"
    assert len(calls) == 3
    assert len(found["good"].samples) == 5
    rows = series_rows(found["bad"], benchmark="loader", system="bad")
    assert [row.value for row in rows] == [None, None]
    assert all(row.failed == "OSError: the disk is gone" for row in rows)
    ratio = ratio_row(found["good"], found["bad"], benchmark="loader", system="good", beside="bad")
    assert ratio.value is None
    assert "the disk is gone" in ratio.failed


def test_ratios_are_taken_within_rounds_so_drift_cancels():
    # the machine gets four times slower, A stays exactly 1.5 times as fast as B
    rates = [400.0, 300, 200, 150, 120, 100]
    a, b = series(*(1.5 * r for r in rates)), series(*rates)
    row = ratio_row(a, b, benchmark="loader", system="A", beside="B")
    assert (row.value, row.low, row.high) == pytest.approx((1.5, 1.5, 1.5))


def test_figures_of_a_series():
    speed, cpu = series_rows(series(100, 200, 400), benchmark="loader", system="A")
    assert (speed.metric, speed.value, speed.other_cpu) == ("img_per_s", pytest.approx(200), pytest.approx(0.25))
    assert speed.values == pytest.approx((100, 200, 400))
    assert (cpu.metric, cpu.value) == ("cpu_s_per_1000", pytest.approx(10.0))
    wait = wait_row(series(100, 200, 400, wait=0.5), benchmark="training", system="A")
    assert (wait.value, wait.low, wait.high) == pytest.approx((0.5, 0.5, 0.5))


def test_csv_gives_back_the_rows(tmp_path: Path):
    machine = environment("python -m benchmarks.run loader --quick")
    rows = [
        summary_row([1.5, 2.25, 3], benchmark="loader", system="A, \"quoted\"", metric="img_per_s", unit="img/s",
                    packed="341x256 jpg", resolution_px=224, batch_size=64, workers=2, environment=machine),
        summary_row([], failed="ImportError: no ffcv, | pipes", benchmark="loader", system="B", metric="img_per_s",
                    unit="img/s", environment=machine),
        Row("pack", "C", "psnr_db", "dB", 41.0),
    ]  # fmt: skip
    write_csv(tmp_path / "out" / "loader.csv", rows)
    assert read_csv(tmp_path / "out" / "loader.csv") == rows


def test_every_command_of_a_table_is_listed_and_its_machine_once():
    first = replace(environment("run training --model resnet18"), date="2026-01-01")
    second = replace(first, command="run training --add --model alexnet")
    row = Row("training", "x", "img_per_s", "img/s", 1.0, environment=first)
    text = machine_text([row, row, replace(row, environment=second)])
    assert [line.count("Command") for line in text.splitlines()] == [1, 1, 0, 0]
    assert first.command in text and second.command in text
    assert machine_text([replace(row, environment=None)]) == ""


def test_csv_of_another_shape_or_with_damage_is_refused(tmp_path: Path):
    path = tmp_path / "x.csv"
    with pytest.raises(DataError, match="no such table"):
        read_csv(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="columns"):
        read_csv(path)
    write_csv(path, [Row("pack", "C", "psnr_db", "dB", 41.0)])
    path.write_text(path.read_text().replace("41", "forty"))
    with pytest.raises(DataError, match="damaged"):
        read_csv(path)


def test_environment_names_the_machine():
    machine = environment("x")
    assert machine.cores >= 1 and machine.ram_gib > 0 and machine.cpu and "torch " in machine.versions


def test_cpu_time_counts_workers_alive_and_dead():
    import os
    import subprocess
    import sys

    burn = """import time
while time.process_time() < 0.3:
    pass
print(1, flush=True)
input()"""
    before = tree_cpu_s(os.getpid())
    with subprocess.Popen(
        [sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert tree_cpu_s(os.getpid()) - before > 0.25, "a living worker"
        child.communicate("\n")
    assert tree_cpu_s(os.getpid()) - before > 0.25, "a worker that ended and was waited for"


def test_meter_tells_own_work_from_others(monkeypatch):
    busy_s, clock_s = iter([100.0, 103.0, 103.0, 103.0]), iter([50.0, 52.0, 52.0, 52.0])
    monkeypatch.setattr(Meter, "_now", staticmethod(lambda: next(busy_s)))
    monkeypatch.setattr("benchmarks.machine.time.perf_counter", lambda: next(clock_s))
    monkeypatch.setattr("benchmarks.machine.os.cpu_count", lambda: 4)
    meter = Meter()  # then 3 of 2 s × 4 cores are busy
    assert meter.other_cpu(1.0) == pytest.approx(2 / 8)
    assert meter.other_cpu(3.0) == 0
    assert meter.other_cpu(3.1) == 0  # counters have steps


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.012"), (0, "0"), (None, "")],
)
def test_figures_for_people(value, text):
    assert number(value) == text


def test_markdown_shows_failures_with_their_reasons():
    good = summary_row([1, 2, 3, 4, 5, 6], benchmark="loader", system="A", metric="m", unit="img/s")
    bad = summary_row([], failed="no | luck", benchmark="loader", system="B", metric="m", unit="img/s", note="differs")
    table = pivot([good, bad], {"m": "img/s"})
    assert "| A | 3.50 [1.00, 6.00] |" in table
    assert "| B | failed |" in table
    assert "B: failed, no \\| luck" in notes([good, bad])
    assert "B: differs" in notes([good, bad])
    assert cell(None) == ""


def test_notes_name_the_models_where_they_are_not_the_same_in_all():
    rows = [
        summary_row([1.0], benchmark="training", system="A", metric="m", unit="s", model=model, note=note)
        for model, note in (("x", "old"), ("y", "new"), ("z", "old"))
    ]
    assert notes(rows) == "- A (x, z): old\n- A (y): new\n"
    assert notes([rows[0], rows[2]]) == "- A: old\n"
    failed = summary_row([], failed="no luck", benchmark="training", system="A", metric="m", unit="s", model="y")
    assert notes([failed]) == "- y, A: failed, no luck\n"


def test_a_row_without_an_interval_ends_at_its_value():
    row = summary_row([1.0, 2.0, 3.0], benchmark="x", system="A", metric="m", unit="s")
    assert row.ends == (1.0, 3.0)
    assert replace(row, low=None, high=None).ends == (2.0, 2.0)
    with pytest.raises(ValueError, match="A, m: no value"):
        _ = replace(row, value=None).ends
