"""The run folder's own files: what TensorBoard reads of a resumed run, and what remains after a full disk."""

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from shards.common.errors import DataError, UsageError
from tests.support.train_runs import at, small
from train.config import read_config
from train.inference.predictor import Predictor
from train.loop import train_once
from train.record import RunFolder


def full_disk(folder: Path) -> None:
    """From now on every write to a file of `folder` fails as on a full disk, to files opened before and after."""
    descriptors = list(Path("/proc/self/fd").iterdir())
    with Path("/dev/full").open("wb") as full:
        for descriptor in descriptors:
            with suppress(FileNotFoundError):  # the one that listed them
                if descriptor.readlink().is_relative_to(folder):
                    os.dup2(full.fileno(), int(descriptor.name))
    for file in [file for file in folder.iterdir() if file.is_file()]:
        file.unlink()
        file.symlink_to("/dev/full")


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of each point that TensorBoard shows, by the name of its curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {name: [(p.step, p.value) for p in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_reads_each_step_of_a_run_that_went_on_once(tiny_shards, tmp_path):
    config, out = small(tiny_shards), tmp_path / "run"
    with RunFolder(out, config, resume=False) as folder:
        folder.rewind(0, 0)
        folder.steps(0, 0, [4.0, 3.5, 3.0], [0.5, 0.25, 0.125])
        kept = folder.metrics_bytes()
        folder.epoch(3, {"epoch": 1, "loss": 3.5})
        folder.steps(3, 1, [2.5, 9.0], [0.5, 0.5])
    with RunFolder(out, config, resume=True) as folder:
        folder.rewind(kept, 3)
        folder.steps(3, 1, [2.5, 2.0], [0.25, 0.25])
        folder.epoch(5, {"epoch": 1, "loss": 3.0})
        expected = [(0, 4.0), (1, 3.5), (2, 3.0), (3, 2.5), (4, 2.0)]
        found = events(out)  # while the run goes on
        assert found["loss/step"] == expected
        assert found["lr"] == [(0, 0.5), (1, 0.25), (2, 0.125), (3, 0.25), (4, 0.25)]
        assert found["epoch/loss"] == [(5, 3.0)]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines if line["kind"] == "step"] == expected
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [5]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_for_events_loses_no_metrics_and_closes_every_file(tiny_shards, tmp_path):
    out = tmp_path / "run"
    folder = RunFolder(out, small(tiny_shards), resume=False)
    folder.rewind(0, 0)
    assert folder._events is not None
    with Path("/dev/full").open("wb") as full:
        os.dup2(full.fileno(), folder._events._file.fileno())
    with pytest.raises(OSError, match="No space left") as error, folder:
        folder.steps(0, 0, [4.0, 3.5], [0.5, 0.25])
    assert error.value.errno == errno.ENOSPC
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [0, 1]
    assert all(file.closed for file in (folder._metrics, folder._log, folder._lock, folder._events._file))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_line_for_a_full_disk_names_the_run_where_the_system_names_no_file(tiny_shards, tmp_path):
    out = tmp_path / "run"

    def fill_up() -> bool:
        full_disk(out)
        return True  # so a checkpoint is written: first, metrics.jsonl is flushed

    with pytest.raises(OSError, match="No space left") as error:
        train_once(small(tiny_shards, checkpoint_s=1e6), out, stop=at(2, fill_up))
    assert str(error.value.filename).startswith(str(out))


def test_a_start_that_is_refused_leaves_no_folder_and_one_that_goes_on_loses_nothing(whole, tiny_shards, tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"nonsense")
    refused = small(tiny_shards, weights=str(tmp_path / "weights.pt"))
    for out in (tmp_path / "new", tmp_path / "empty"):
        if out.name == "empty":
            out.mkdir()
            (out / ".mine").touch()
        with pytest.raises(DataError, match="no readable weights"):
            train_once(refused, out)
    assert not (tmp_path / "new").exists() and [path.name for path in (tmp_path / "empty").iterdir()] == [".mine"]
    old = Path(shutil.copytree(whole, tmp_path / "old"))
    with pytest.raises(DataError), RunFolder(old, read_config(old / "config.json"), resume=True):
        raise DataError("refused")
    assert {path.name: path.read_bytes() for path in old.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_the_layout_is_logged_recorded_and_part_of_what_a_run_was_started_with(tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setattr("train.models._unsafe_convolution", lambda body: "conv1")
    train_once(small(tiny_shards, epochs=1), tmp_path / "run")
    decided = json.loads((tmp_path / "run" / "environment.json").read_text())["decisions"]["memory_format"]
    assert decided["value"] == "contiguous" and "conv1" in decided["reason"]
    told = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "memory_format: " in line]
    assert len(told) == 1 and f"contiguous ({decided['reason']})" in told[0]
    predictor = Predictor(tmp_path / "run", "cpu")
    assert predictor.memory_format.value == "contiguous"
    assert Predictor(tmp_path / "run", "cpu", "channels-last").memory_format.value == "channels-last"
    with pytest.raises(UsageError, match="memory_format: auto, now channels-last"):
        train_once(small(tiny_shards, epochs=1, memory_format="channels-last"), tmp_path / "run", resume=True)


def test_a_run_of_before_the_option_goes_on(tmp_path):
    config = small(tmp_path)
    old = config.to_dict()
    del old["memory_format"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert read_config(tmp_path / "config.json") == config
