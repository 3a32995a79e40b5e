"""What a worker tells its grid about a cell; a worker whose grid has died, which stops with a checkpoint."""

import multiprocessing
import time
from pathlib import Path

import pytest

from tests.support.train_runs import small
from train.study.worker import Ended, Job, PipeConsole, train_jobs


def test_messages_to_a_grid_that_has_died_are_no_error():
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    console = PipeConsole(theirs)
    console.at("start", 0, 1)
    console.warn("nobody receives this")


def test_a_worker_whose_grid_has_died_stops_with_a_checkpoint(tiny_shards: Path, tmp_path: Path):
    ours, theirs = multiprocessing.Pipe()
    ours.send(Job(small(tiny_shards, checkpoint_s=1e6), tmp_path / "run"))
    ours.close()
    with pytest.raises(OSError, match="pipe"):  # when it sends how the cell ended
        train_jobs(theirs, PipeConsole(theirs), time.perf_counter(), lambda: True)
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_full_disk_is_the_line_of_all_commands(tiny_shards: Path, tmp_path: Path):
    ours, theirs = multiprocessing.Pipe()
    out = tmp_path / "run"
    out.mkdir()
    (out / ".checkpoint.pt.partial").symlink_to("/dev/full")  # every write to it fails as on a full disk
    for job in (Job(small(tiny_shards), out), None):
        ours.send(job)
    train_jobs(theirs, PipeConsole(theirs), time.perf_counter(), lambda: False)
    while not isinstance(ended := ours.recv(), Ended):
        pass
    written = out / "checkpoint.pt"
    assert ended == Ended("failed", error=f"the disk is full while writing {written}: free some space and start again")
