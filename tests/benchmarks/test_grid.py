"""The benchmark of grids, end to end on studies of one or two cells."""

import json

import pytest

from benchmarks.datasets import Job
from benchmarks.grid import ALONE, PAGE, SHARED, GridJob, measure_grid, set_up
from tests.support.benchdata import measurement


@pytest.mark.slow
def test_each_way_to_run_a_study_has_its_figures(small_job):
    steps: list[str] = []
    rows = measure_grid(
        GridJob(small_job, ("resnet18",), (1.0,), (0,), 1, "off", "cpu"), measurement(1, 0, steps.append)
    )
    assert not [row.failed for row in rows if row.failed]
    found = {(row.system, row.metric): row.value or 0.0 for row in rows if not row.beside}
    for system in (SHARED, ALONE):
        assert found[system, "cells_per_s"] > 0 and found[system, "cpu_s_per_1000_cells"] > 0
        assert 0 < found[system, "overhead_share"] < 1
    assert all(row.value for row in rows if row.beside)
    assert len(steps) == 2 * 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fractions"), [(SHARED, (0.5, 1.0)), (ALONE, (1.0,))])
def test_both_ways_to_train_a_study_finish_every_cell(small_job, name, fractions):
    job = GridJob(small_job, ("resnet18",), fractions, (0,), 1, "off", "cpu")
    assert set_up(name, job).once() == job.cells == len(fractions)
    (overhead,) = (small_job.cache / "grid").glob(f"{name.replace(' ', '-').replace(',', '')}.overhead")
    found = json.loads(overhead.read_text().splitlines()[-1])  # of the second study: the first was to warm up
    assert 0 < found["overhead_share"] < 1
    assert ("later_cell_s" in found) == (name == SHARED)
    assert 0 < found.get("later_cell_s", 1.0) < 30


def test_a_study_that_cannot_run_is_a_failed_row(tmp_path):
    images = Job(tmp_path, tmp_path / "bench")
    rows = measure_grid(GridJob(images, ("resnet18",)), measurement())
    assert all(row.value is None and "HAM10000_metadata.csv" in row.failed for row in rows)
    assert "failed" in PAGE.text(rows)
