"""The benchmark of grids, end to end on studies of one or two cells."""

import pytest

from benchmarks.datasets import Job
from benchmarks.grid import ALONE, PAGE, SHARED, GridJob, measure_grid
from tests.support.benchdata import measurement


@pytest.mark.slow
def test_each_way_to_run_a_study_has_its_figures(small_job):
    steps: list[str] = []
    job = GridJob(small_job, ("resnet18",), (0.5, 1.0), (0,), 1, "off", "cpu")
    rows = measure_grid(job, measurement(1, 0, steps.append))
    assert not [row.failed for row in rows if row.failed]
    found = {(row.system, row.metric): row.value or 0.0 for row in rows if not row.beside}
    for system in (SHARED, ALONE):
        assert found[system, "cells_per_s"] > 0 and found[system, "cpu_s_per_1000_cells"] > 0
        assert 0 < found[system, "overhead_share"] < 1
    assert 0 < found[SHARED, "later_cell_s"] < 30 and (ALONE, "later_cell_s") not in found
    assert all(row.value for row in rows if row.beside)
    assert len(steps) == 2 * 3


def test_a_study_that_cannot_run_is_a_failed_row(tmp_path):
    images = Job(tmp_path, tmp_path / "bench")
    rows = measure_grid(GridJob(images, ("resnet18",)), measurement())
    assert all(row.value is None and "HAM10000_metadata.csv" in row.failed for row in rows)
    assert "failed" in PAGE.text(rows)
