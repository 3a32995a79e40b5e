"""A disk that is full at any step of writing: one line says so, what was there is whole, and a rerun ends as if nothing
had been.

The disk is a tmpfs that is larger by a little each time. That needs the right to mount.
"""

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from preprocess import shard
from shards import ShardSet
from shards.common import cli
from shards.common.errors import DermscaleError
from tests.conftest import write_set
from tests.support import download_server
from tests.support.rawdata import write_raw
from tests.support.stores import s3_server
from tests.support.train_runs import assert_same_run, small
from tests.torture.victims import contents, table
from train import checkpoint, grid, predict, report, run
from train.loop import train_once

pytestmark = pytest.mark.slow
PAGE = os.sysconf("SC_PAGE_SIZE")
ROOM = 1 << 28
MANY = 8
"""Sizes of the disk at which a job must fail, in a full run."""
TRAINING = ("--epochs", 2, "--resolution", 32, "--batch-size", 16, "--device", "cpu", "--precision", "fp32")
TRAINING += ("--compile", "off", "--checkpoint-s", 0)


class Disk:
    """A small file system in memory."""

    def __init__(self, path: Path) -> None:
        """Mounts it, with room enough."""
        self.path = path
        path.mkdir()
        self._mount(f"size={ROOM}")

    def _mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", self.path]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here ({done.stderr.decode().strip()})")

    @property
    def used(self) -> int:
        """Bytes of all its files."""
        about = os.statvfs(self.path)
        return (about.f_blocks - about.f_bfree) * about.f_frsize

    def leave(self, free: int) -> None:
        """Make it as large as its files and `free` bytes."""
        self._mount(f"remount,size={max(self.used + free, PAGE)}")

    def clear(self) -> None:
        """Remove all files, and give it room."""
        self._mount(f"remount,size={ROOM}")
        for file in self.path.iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "-l", self.path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    found = Disk(tmp_path / "disk")
    yield found
    found.close()


@dataclass
class Job:
    """What is done on the disk. before: puts there what is there before. do: its exit code and what it says. kept,
    whole: check what is there if it failed, and if it ended well."""

    do: Callable[[], tuple[int, str]]
    whole: Callable[[], None]
    kept: Callable[[], None] = field(default=lambda: None)
    before: Callable[[], None] = field(default=lambda: None)


def torment(disk: Disk, job: Job, tries: int) -> dict[str, int]:
    """Do the job with ever more room, and once more with enough after each failure."""
    job.before()
    first = disk.used
    assert job.do()[0] == 0
    needed, failed, rooms = disk.used - first, 0, set()
    job.whole()
    for number in range(tries):
        disk.clear()
        job.before()
        room = PAGE * (number * needed // (tries * PAGE))
        disk.leave(room)
        code, said = job.do()
        if code:
            failed += 1
            rooms.add(room)
            assert code == 1 and "Traceback" not in said, said
            # of a grid, the lines of its cells say what it was
            reasons = [line for line in said.splitlines() if re.match(r"error: |\[.*FAILED: ", line)]
            assert re.search("the disk is full|No space left", "\n".join(reasons)), said
            assert sum(line.startswith("error: ") for line in reasons) == 1, said
            job.kept()
            disk.leave(ROOM)
            assert job.do()[0] == 0
        job.whole()
    assert failed > tries // 3 and len(rooms) >= min(tries // 3, MANY)
    return {"tries": tries, "failed": failed, "rooms": len(rooms)}


def full_disk(error: OSError) -> str:
    """What the command would say of it; fails for another error, and for one that names no file."""
    assert error.errno == errno.ENOSPC and error.filename, error
    return f"error: {cli.system_error(error)}"


@pytest.fixture
def doing(command: Callable[..., tuple[int, str, str]]) -> Callable[..., Callable[[], tuple[int, str]]]:
    """Makes the `do` of a job that is a command."""

    def make(module: ModuleType, *arguments: object) -> Callable[[], tuple[int, str]]:
        def do() -> tuple[int, str]:
            code, out, err = command(module.main, *arguments)
            return code, out + err

        return do

    return make


def test_packing(disk, tmp_path, doing, times, record):
    raw, out, new = write_raw(tmp_path / "raw", images=60), disk.path / "set", tmp_path / "new"
    assert doing(shard, "--source", raw, "--out", new)()[0] == 0
    old = write_set(tmp_path / "old", images=40)

    def same_as(folder: Path) -> None:
        assert contents(out) == contents(folder)

    job = Job(
        doing(shard, "--source", raw, "--out", out, "--overwrite"),
        whole=lambda: same_as(new),
        kept=lambda: same_as(old),
        before=lambda: shutil.copytree(old, out) and None,
    )
    record(**torment(disk, job, times(4, 100)))
    assert [file.name for file in disk.path.iterdir()] == ["set"]


def test_training(disk, tiny_shards, tmp_path, doing, times, record):
    out = disk.path / "run"
    train_once(small(tiny_shards), tmp_path / "whole")
    do = doing(run, "--model", "test_resnet", "--data", tiny_shards, "--out", out, "--resume", *TRAINING)
    job = Job(do, whole=lambda: assert_same_run(tmp_path / "whole", out), kept=lambda: checkpoint.load(out) and None)
    record(**torment(disk, job, times(3, 60)))


def test_a_grid(disk, tiny_shards, tmp_path, doing, times, record):
    options = ("--models", "test_resnet", "--fractions", "0.5,1", "--seeds", 0, "--data", tiny_shards, *TRAINING)
    options += ("--threads", 1, "--per-device", 1)
    assert doing(grid, *options, "--out", tmp_path / "whole")()[0] == 0

    def whole() -> None:
        assert table(disk.path / "study") == table(tmp_path / "whole")

    def kept() -> None:
        for cell in (disk.path / "study").glob("cells/*"):
            checkpoint.load(cell)

    record(**torment(disk, Job(doing(grid, *options, "--out", disk.path / "study"), whole, kept), times(2, 30)))


def test_a_report(disk, tiny_shards, tmp_path, doing, times, record):
    train_once(small(tiny_shards), tmp_path / "run")
    page, pictures = disk.path / "report.html", disk.path / "pictures"

    def whole() -> None:
        assert page.read_text().rstrip().endswith("</html>") and page.stat().st_size > 10_000
        assert contents(pictures) == contents(undisturbed)

    def kept() -> None:
        assert page.read_text() == "the old page" or page.read_text().rstrip().endswith("</html>")

    undisturbed = tmp_path / "pictures"
    options = ("--resamples", 200)
    assert doing(report, tmp_path / "run", "--out", tmp_path / "page", "--pictures", undisturbed, *options)()[0] == 0
    do = doing(report, tmp_path / "run", "--out", page, "--pictures", pictures, *options)
    record(**torment(disk, Job(do, whole, kept, lambda: page.write_text("the old page") and None), times(2, 30)))


def test_predictions(disk, tiny_shards, tmp_path, doing, times, record):
    train_once(small(tiny_shards, epochs=1), tmp_path / "run")
    raw, out = write_raw(tmp_path / "raw", images=400), disk.path / "answers.csv"
    do = doing(predict, "--run", tmp_path / "run", raw, "--out", out, "--device", "cpu")
    assert do()[0] == 0
    expected = out.read_bytes()

    def old() -> None:
        out.write_text("the old answers")

    def whole() -> None:
        assert out.read_bytes() == expected

    def kept() -> None:
        assert out.read_text() == "the old answers"

    record(**torment(disk, Job(do, whole, kept, old), times(3, 30)))


def test_a_download(disk, times, record, server, monkeypatch):
    """Others fill the disk after the download has seen that there is room."""
    folder = disk.path / "ham10000"
    monkeypatch.setattr("preprocess.download.check_space", lambda *_: None)

    def do() -> tuple[int, str]:
        try:
            download_server.run(server, folder)
        except OSError as error:
            return 1, full_disk(error)
        return 0, ""

    def whole() -> None:
        assert download_server.tree(folder) == download_server.WHOLE + download_server.WHOLE_TEST

    record(**torment(disk, Job(do, whole), times(4, 60)))


def test_the_cache_of_a_store(disk, tmp_path, times, record, monkeypatch):
    packed = write_set(tmp_path / "set", images=400)
    with s3_server(monkeypatch) as s3:
        address = s3.put_set(packed)

        def do() -> tuple[int, str]:
            try:
                with ShardSet(address, cache=disk.path) as data:
                    for number in range(4):
                        data.shard(number)
            except OSError as error:
                return 1, full_disk(error)
            except DermscaleError as error:
                return error.exit_code, f"error: {error}"
            return 0, ""

        expected = {file.name: file.read_bytes() for file in packed.glob("*.tar")}

        def tars() -> dict[str, bytes]:
            return {file.name: file.read_bytes() for file in disk.path.glob("*/*.tar")}

        def whole() -> None:
            assert tars() == expected

        def kept() -> None:
            assert tars().items() <= expected.items()

        record(**torment(disk, Job(do, whole, kept), times(4, 60)))
