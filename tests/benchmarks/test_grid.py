"""The benchmark of grids, end to end on studies of one or two cells."""

import json

import pytest

from benchmarks.datasets import Job
from benchmarks.grid import ALONE, SHARED, GridJob, grid_text, measure_grid, set_up
from benchmarks.machine import environment
from tests.support.benchdata import write_source


@pytest.mark.slow
def test_each_way_to_run_a_study_has_its_figures(tmp_path):
    source = tmp_path / "ham"
    source.mkdir()
    images = Job(write_source(source), tmp_path / "cache", 96, 32, batch_size=8, copies=1)
    job = GridJob(images, ("resnet18",), (1.0,), (0,), 1, "off", "cpu")
    steps: list[str] = []
    rows = measure_grid(job, environment("x"), rounds=1, announce=steps.append)
    assert not [row.failed for row in rows if row.failed]
    found = {(row.system, row.metric): row.value or 0.0 for row in rows if not row.beside}
    for system in (SHARED, ALONE):
        assert found[system, "cells_per_s"] > 0
        assert 0 < found[system, "overhead_share"] < 1
    assert all(row.value for row in rows if row.beside)
    assert len(steps) == 2 * 3


@pytest.mark.slow
def test_both_ways_to_train_a_study_finish_every_cell(tmp_path):
    source = write_source(tmp_path)
    images = Job(source, tmp_path / "bench", packed_px=64, resolution_px=32, batch_size=8, copies=1)
    for name, fractions in ((SHARED, (0.5, 1.0)), (ALONE, (1.0,))):
        job = GridJob(images, ("resnet18",), fractions, seeds=(0,), device="cpu")
        running = set_up(name, job)
        assert running.once() == job.cells == len(fractions)
        (overhead,) = (tmp_path / "bench/grid").glob(f"{name.replace(' ', '-').replace(',', '')}.overhead")
        _, line = overhead.read_text().splitlines()  # of the second study: the first was to warm up
        found = json.loads(line)
        assert 0 < found["overhead_share"] < 1
        assert ("later_cell_s" in found) == (name == SHARED)
        if name == SHARED:
            assert 0 < found["later_cell_s"] < 30


def test_a_study_that_cannot_run_is_a_failed_row(tmp_path):
    images = Job(tmp_path, tmp_path / "bench")
    rows = measure_grid(GridJob(images, ("resnet18",)), environment("x"), rounds=5, announce=lambda step: None)
    assert all(row.value is None for row in rows)
    assert all("HAM10000_metadata.csv" in row.failed for row in rows)
    assert "failed" in grid_text(rows)
