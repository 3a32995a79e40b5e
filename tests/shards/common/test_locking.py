"""One process alone writes to a place, and where a file system cannot see to that, it is said."""

import errno
import fcntl

import pytest

from shards.common.errors import DataError
from shards.common.files import exclusive
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
    with pytest.raises(DataError, match="set: another process is packing"):
        ShardSetWriter(tmp_path / "set", EncodeSpec(), 1 << 20)
