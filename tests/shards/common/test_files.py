"""Files are complete or absent; only one process writes to a place, or an error says why that cannot be ensured."""

import errno
import fcntl
import os

import pytest

from shards.common.errors import DataError
from shards.common.files import exclusive, full_disk_names, whole_file, write_durably
from shards.format import EncodeSpec
from shards.writer import ShardSetWriter
from tests.support.train_runs import small
from train.record import RunFolder


def test_a_file_system_without_locks_is_said_in_one_line(tiny_shards, tmp_path, monkeypatch):
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    words = r"its file system has no locks \(No locks available\).*; choose a folder on another file system"
    with pytest.raises(DataError, match=f"set: {words}"):
        ShardSetWriter(tmp_path / "set", EncodeSpec(), 1 << 20)
    with pytest.raises(DataError, match=f"raw: {words}"), exclusive(tmp_path / "raw", "downloading"):
        pass
    with pytest.raises(DataError, match=f"run: {words}"):
        RunFolder(tmp_path / "run", small(tiny_shards), resume=False)


def test_a_lock_file_that_the_last_packer_removed_meanwhile_locks_nothing(tmp_path, monkeypatch):
    take = fcntl.flock

    def removed(file, how) -> None:
        take(file, how)
        (tmp_path / ".set.lock").unlink()

    monkeypatch.setattr(fcntl, "flock", removed)
    with pytest.raises(DataError, match="set: another process is writing to this folder"):
        ShardSetWriter(tmp_path / "set", EncodeSpec(), 1 << 20)


def test_a_full_disk_leaves_nothing_aside(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*report\.md'"):
        write_durably(tmp_path / "report.md", b"x")
    assert not list(tmp_path.iterdir())


def test_what_stops_in_the_middle_leaves_the_old_file_and_nothing_aside(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_durably(path, b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"


def test_only_the_error_of_a_full_disk_gets_the_name_of_the_folder_and_keeps_a_better_one(tmp_path):
    for error, named in (
        (OSError(errno.ENOSPC, "No space left on device"), str(tmp_path)),
        (OSError(errno.ENOSPC, "No space left on device", "a.tar"), "a.tar"),
        (OSError(errno.ECONNRESET, "Connection reset by peer"), None),
    ):
        with pytest.raises(OSError, match=error.strerror) as raised, full_disk_names(tmp_path):
            raise error
        assert raised.value.filename == named
