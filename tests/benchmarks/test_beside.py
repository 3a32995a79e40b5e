"""Loaders beside a busy Python thread, and the latency of the native engine."""

import time
from dataclasses import replace

import pytest

from benchmarks import beside, latency
from benchmarks.beside import Counter
from benchmarks.datasets import Job
from benchmarks.worker import Running
from tests.support.benchdata import measurement, series


def test_the_thread_counts_only_during_the_work():
    counter = Counter()
    assert counter.during(lambda: time.sleep(0.05) or 7.0) == 7.0
    time.sleep(0.05)  # it notices within a switch interval
    stopped = counter.count
    assert stopped > 0
    time.sleep(0.05)
    assert counter.count == stopped


def test_what_a_loader_keeps_and_leaves_is_taken_within_rounds(monkeypatch, tmp_path):
    name = "dermscale native jpg"
    beside_it = series(80, 90)
    beside_it.samples = [replace(sample, beside=sample.seconds * 50) for sample in beside_it.samples]
    found = {name: series(100, 100), f"{name}{beside._BESIDE}": beside_it, beside.THREAD: series(100, 100)}
    monkeypatch.setattr(beside, "take_turns", lambda *_, **__: (found, {}))
    monkeypatch.setattr(beside, "stats", lambda job: ((0.0, 0.0, 0.0), "341x256"))
    rows = beside.measure([beside.systems.SYSTEMS[name]], Job(tmp_path, tmp_path), measurement())
    values = {row.metric: row.values for row in rows}
    assert values["kept"] == pytest.approx((0.8, 0.9))
    assert values["left_to_python"] == pytest.approx((0.5, 0.5))
    assert values["beside_img_per_s"] == pytest.approx((80, 90))


def test_the_thread_runs_beside_a_loader_in_its_rounds_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(beside.systems, "set_up", lambda name, job: Running(lambda: time.sleep(0.05) or 7.0))
    running = beside.set_up(f"any{beside._BESIDE}", Job(tmp_path, tmp_path))
    assert running.beside() == 0 and running.once() == 7.0 and running.beside() > 0


def test_every_metric_of_the_latency_is_measured(tiny_shards):
    from shards import ShardSet

    job = Job(tiny_shards, tiny_shards, resolution_px=16, batch_size=8, workers=1)
    with ShardSet(tiny_shards) as data:
        values = latency.one_round(data, job)
    assert list(values) == list(latency.METRICS)
    assert values["first_batch"] > 0 and values["consumer"] > 0
    assert 8 < values["plan_memory_1000000"] < 500  # the order alone is 8 MB
