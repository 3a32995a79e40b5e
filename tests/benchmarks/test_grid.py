"""The benchmark of grids, end to end on a study of one cell."""

import pytest

from benchmarks.grid import ALONE, SHARED, GridJob, measure_grid
from benchmarks.machine import environment
from benchmarks.peers.system import Work
from tests.support.benchdata import write_source


@pytest.mark.slow
def test_each_way_to_run_a_study_has_its_figures(tmp_path):
    source = tmp_path / "ham"
    source.mkdir()
    work = Work(write_source(source), tmp_path / "cache", 96, 32, batch_size=8, copies=1)
    job = GridJob(work, ("resnet18",), (1.0,), (0,), 1, "off", "cpu")
    steps: list[str] = []
    rows = measure_grid(job, environment("x"), rounds=1, told=steps.append)
    assert not [row.failed for row in rows if row.failed]
    found = {(row.system, row.metric): row.value or 0.0 for row in rows if not row.beside}
    for system in (SHARED, ALONE):
        assert found[system, "cells_per_s"] > 0
        assert 0 < found[system, "overhead_share"] < 1
    assert all(row.value for row in rows if row.beside)
    assert len(steps) == 2 * 3
