"""Where a set is written: links, mounted and current folders, folders in use, and what a crash leaves."""

import errno
import itertools
import json
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from preprocess import synthetic
from shards import place
from shards.common.errors import DataError
from shards.format import EncodeSpec
from shards.shardset import ShardSet
from shards.writer import PackedSample, ShardSetWriter
from tests.conftest import finish_set, little_metadata


def add(writer: ShardSetWriter, images: int = 1) -> None:
    for number in range(images):
        writer.add(PackedSample(b"x", "jpg", 1, 1, "train", little_metadata(f"A{number}", "nv")))


def pack(out: Path, images: int = 1, overwrite: bool = False) -> Path:
    with ShardSetWriter(out, EncodeSpec(), 1 << 20, overwrite) as writer:
        add(writer, images)
        finish_set(writer)
    return out


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def painted(monkeypatch):
    """Synthetic folders without their pictures."""
    monkeypatch.setattr(synthetic, "_write_lesion", lambda lesion, *_: len(lesion.rows))


# ------------------------------------------------------------------ links, mounted and current folders


def test_a_link_stays_and_the_set_goes_where_it_leads(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "data").mkdir()
    link = tmp_path / "data" / "shards"
    link.symlink_to("../scratch/shards")
    for images in (1, 2, 3):
        pack(link, images, overwrite=True)
        assert link.is_symlink() and len(ShardSet(link)) == images
        assert (names(tmp_path / "data"), names(tmp_path / "scratch")) == (["shards"], ["shards"])
    with pytest.raises(DataError, match=r"data/shards: already holds a shard set; add --overwrite"):
        pack(link)


def test_a_synthetic_folder_goes_where_a_link_leads(tmp_path, painted):
    (tmp_path / "scratch").mkdir()
    link = tmp_path / "link"
    link.symlink_to("scratch")
    synthetic.write_folder(link, images=40, seed=0, difficulty=0.5, workers=1)
    assert link.is_symlink() and "HAM10000_metadata.csv" in names(tmp_path / "scratch")
    assert names(tmp_path) == ["link", "scratch"]


@pytest.mark.parametrize("out", ["/", "/proc"])
def test_the_top_of_a_file_system_is_refused_in_one_line(out):
    text = f"{out}: is the top of a file system, .*; choose a folder inside it"
    for overwrite in (False, True):
        with pytest.raises(DataError, match=text):
            place.refuse_occupied(Path(out), overwrite)
    with pytest.raises(DataError, match=text):
        synthetic.write_folder(Path(out), images=40, seed=0, difficulty=0.5, workers=1)


def test_a_mounted_folder_is_refused_by_the_name_of_the_link_to_it(tmp_path):
    (tmp_path / "link").symlink_to("/proc")
    with pytest.raises(DataError, match=r"link: is the top of a file system"):
        ShardSetWriter(tmp_path / "link", EncodeSpec(), 1 << 20, overwrite=True)
    assert names(tmp_path) == ["link"]


def test_a_folder_mounted_from_the_same_file_system_is_refused(tmp_path, monkeypatch):
    """As containers mount them. Only the table of mounts shows such a folder."""
    out = tmp_path / "my data"
    out.mkdir()
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [SimpleNamespace(mountpoint=str(out))] if all else [])
    with pytest.raises(DataError, match="my data: is the top of a file system"):
        pack(out)
    assert len(ShardSet(pack(out / "set"))) == 1


def test_the_current_folder_is_filled(tmp_path, monkeypatch, painted):
    for name in ("set", "raw"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "set")
    pack(Path())
    monkeypatch.chdir(tmp_path / "raw")
    synthetic.write_folder(Path(), images=40, seed=0, difficulty=0.5, workers=1)
    assert len(ShardSet(tmp_path / "set")) == 1 and (tmp_path / "raw" / "HAM10000_metadata.csv").exists()
    assert names(tmp_path) == ["raw", "set"]


# ------------------------------------------------------------------ what others keep there


@pytest.mark.parametrize(
    "manifest", [{"manifest_version": 3, "name": "extension"}, ["index.js"], {"format_version": "1"}, None]
)
def test_a_manifest_of_something_else_is_no_reason_to_replace_a_folder(tmp_path, manifest):
    project = tmp_path / "project"
    project.mkdir()
    (project / "manifest.json").write_text("{" if manifest is None else json.dumps(manifest))
    (project / "index.html").write_text("precious")
    with pytest.raises(DataError, match=r"project: holds other files and no shard set"):
        pack(project, overwrite=True)
    assert names(project) == ["index.html", "manifest.json"] and names(tmp_path) == ["project"]


def test_a_set_that_somebody_keeps_other_files_in_is_not_replaced(tmp_path):
    out = pack(tmp_path / "set")
    (out / "quarantine.csv").write_text("image_id,file,reason\n")
    pack(out, overwrite=True)
    (out / "thesis").mkdir()
    with pytest.raises(DataError, match="holds 'thesis', which is not part of a shard set and would be lost"):
        pack(out, overwrite=True)
    assert (out / "thesis").is_dir()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_was_filled_meanwhile_is_not_replaced(tmp_path, overwrite):
    out = tmp_path / "set"
    with (
        pytest.raises(DataError, match="holds other files and no shard set"),
        ShardSetWriter(out, EncodeSpec(), 1 << 20, overwrite) as writer,
    ):
        add(writer)
        out.mkdir()
        (out / "thesis.txt").write_text("precious")
        finish_set(writer)
    assert (names(tmp_path), names(out)) == (["set"], ["thesis.txt"])


# ------------------------------------------------------------------ what a crash leaves


class Killed(BaseException):
    """What nothing catches, as SIGKILL."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the program at the given call, from 0, of those that change a folder."""
    calls = itertools.count()

    def watch(function):
        def call(*args, **options):
            if next(calls) == step:
                raise Killed
            return function(*args, **options)

        return call

    for name in ("rename", "unlink", "rmdir", "fsync"):
        monkeypatch.setattr(os, name, watch(getattr(os, name)))


def test_a_kill_at_any_step_leaves_the_old_or_the_new_set_or_what_the_next_packing_repairs(tmp_path, monkeypatch):
    for step in itertools.count():
        folder = tmp_path / str(step)
        out, new = pack(folder / "set"), pack(folder / "new", 2)
        with monkeypatch.context() as patch, suppress(Killed):
            kill_at(step, patch)
            place.replace(out, new)
            break
        if step != 1:  # between the two renames
            assert len(ShardSet(out)) == (2 if step > 1 else 1)
        place.recover(out)
        assert len(ShardSet(out)) == (2 if step > 1 else 1)
        pack(out, 3, overwrite=True)
        assert len(ShardSet(out)) == 3 and set(names(folder)) <= {"set", "new"}
    assert step > 6 and names(folder) == ["set"] and len(ShardSet(out)) == 2


def test_a_set_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    out = pack(tmp_path / "set")
    rename = Path.rename

    def failing(path: Path, target: Path) -> None:
        if path.name == ".set.partial":
            raise OSError(errno.EIO, "Input/output error", str(path))
        rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        pack(out, 2, overwrite=True)
    assert len(ShardSet(out)) == 1 and names(tmp_path) == ["set"]


@pytest.mark.parametrize("empty_folder", [False, True])
def test_a_set_that_a_crash_left_aside_is_put_back(tmp_path, empty_folder):
    out = pack(tmp_path / "set", 2)
    out.rename(tmp_path / ".set.old")  # as after the first of the two renames
    if empty_folder:
        out.mkdir()
    with pytest.raises(DataError, match="already holds a shard set; add --overwrite"):
        pack(out)
    assert len(ShardSet(out)) == 2 and names(tmp_path) == ["set"]


def test_what_nfs_keeps_of_an_old_set_is_cleared_by_the_next_packing(tmp_path, monkeypatch):
    out, old = pack(tmp_path / "set"), tmp_path / ".set.old"
    remove = place.shutil.rmtree

    def still_read(folder: Path, ignore_errors: bool = False) -> None:
        """As rmtree on NFS, where another process has a file of the folder open."""
        remove(folder, ignore_errors=ignore_errors)
        if folder == old:
            folder.mkdir()
            (folder / ".nfs000000000001").touch()
            if not ignore_errors:
                raise OSError(16, "Device or resource busy", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(place.shutil, "rmtree", still_read)
        pack(out, 2, overwrite=True)
        assert len(ShardSet(out)) == 2 and names(tmp_path) == [".set.old", "set"]
        with pytest.raises(
            DataError, match=r"\.set\.old: is the rest of .*\(Device or resource busy\); end the process that reads it"
        ):
            pack(out, 3, overwrite=True)
    pack(out, 3, overwrite=True)
    assert len(ShardSet(out)) == 3 and names(tmp_path) == ["set"]


def test_what_is_in_the_way_and_no_shard_set_is_left_alone(tmp_path):
    mine = tmp_path / ".set.old"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"\.set\.old: is in the way of set and not a shard set; move it away"):
        pack(tmp_path / "set")
    assert names(tmp_path) == [".set.old"] and names(mine) == ["thesis.txt"]
