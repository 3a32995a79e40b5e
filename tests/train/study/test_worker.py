"""A worker whose grid has died: nobody hears it any more, and what it trained must not be lost."""

import multiprocessing
import time
from pathlib import Path

import pytest

from tests.support.train_runs import small
from train.study.worker import Order, _serve, _Voice


def test_what_nobody_hears_is_no_error():
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    voice = _Voice(theirs)
    voice.at("start", 0, 1)
    voice.warn("to nobody")


def test_a_worker_whose_grid_has_died_stops_with_a_checkpoint(tiny_shards: Path, tmp_path: Path):
    ours, theirs = multiprocessing.Pipe()
    ours.send(Order(small(tiny_shards, checkpoint_s=1e6), tmp_path / "run"))
    ours.close()
    with pytest.raises(OSError, match="pipe"):  # how the cell ended: `work` leaves with this
        _serve(theirs, _Voice(theirs), time.perf_counter(), lambda: True)
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert not (tmp_path / "run" / "result.json").exists()
