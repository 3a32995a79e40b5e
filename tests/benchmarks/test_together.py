"""Two trainings at once: their speeds are added, and beside one alone they are judged."""

import pytest

from benchmarks import together
from benchmarks.measure import Sample
from benchmarks.targets import verdict
from benchmarks.together import ADVISED, ALONE, DEFAULT, PAGE, TrainingJob, at_once, measure_together, threads_of
from tests.support.benchdata import measurement, series


def test_speeds_of_runs_at_the_same_time_are_added():
    samples = [Sample(100, 10.0, 4.0, 0.3), Sample(60, 12.0, 6.0, 0.4)]
    found = at_once([lambda seconds, one=one: one for one in samples], 10.0)
    assert found.per_s == pytest.approx(10 + 5)
    assert found.cpu_s == pytest.approx(0.4 + 0.5)
    assert 0 <= found.other_cpu <= 1


def test_two_runs_are_judged_beside_one(monkeypatch, job):
    rates = {ALONE: 100.0, DEFAULT: 10.0, ADVISED: 120.0}
    monkeypatch.setattr(together, "Worker", FakeWorker)
    monkeypatch.setattr(together, "start_server", lambda: None)
    monkeypatch.setattr(
        together, "interleave", lambda running, _: {name: series(*[rates[name]] * 6) for name in running}
    )
    rows = measure_together(TrainingJob(job, "resnet18", "cpu"), measurement())
    ratios = {row.system: row for row in rows if row.beside}
    assert {name: row.value for name, row in ratios.items()} == pytest.approx({DEFAULT: 0.1, ADVISED: 1.2})
    assert verdict(ratios[ADVISED]) == "at least 1: met" and verdict(ratios[DEFAULT]) == ""
    text = PAGE.text(rows)
    assert f"| {DEFAULT} | 10.0 [10.0, 10.0]" in text
    assert f"{ADVISED}: {threads_of(ADVISED)}." in text


class FakeWorker:
    """A run that is set up at once."""

    def __init__(self, *_: object, **__: object) -> None:
        self.run = None

    def __enter__(self) -> "FakeWorker":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def ready(self) -> dict[str, float]:
        return {}


@pytest.mark.slow
def test_two_real_runs_train_at_the_same_time(small_job):
    rows = measure_together(TrainingJob(small_job, "test_resnet", "cpu"), measurement(1, 0.2))
    assert not [row.failed for row in rows if row.failed]
    assert all(row.value for row in rows) and {row.system for row in rows} == {ALONE, DEFAULT, ADVISED}
