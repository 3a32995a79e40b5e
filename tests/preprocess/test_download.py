"""The downloader as a whole against a local server: every case ends whole, or in one clear line."""

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from preprocess import download as dl
from preprocess import shard
from preprocess.fetch import RemoteFile
from preprocess.ham10000 import read_source
from preprocess.isic2018 import read_test_source
from shards import ShardSet
from shards.common.errors import DataError, UsageError
from shards.common.files import exclusive
from tests.support.download_server import (
    FILES,
    WHOLE,
    WHOLE_TEST,
    Server,
    items_of,
    picture,
    run,
    serving,
    tree,
    zip_of,
)
from tests.support.rawdata import jpeg, rows, write_table


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def test_everything_arrives_in_the_official_layout(server: Server, tmp_path: Path) -> None:
    run(server, tmp_path)
    assert tree(tmp_path) == WHOLE + WHOLE_TEST
    for i in range(5):
        assert next(tmp_path.glob(f"HAM*/ISIC_{i}.jpg")).read_bytes() == picture(f"{i}")
    source, test = read_source(tmp_path), read_test_source(tmp_path / dl.TEST_FOLDER)
    assert (len(source.records), source.rejected) == (5, [])
    assert (len(test.records), test.rejected) == (2, [])


def test_without_the_option_the_test_set_is_not_asked_for(server: Server, tmp_path: Path) -> None:
    run(server, tmp_path, test_set=False)
    assert tree(tmp_path) == WHOLE
    assert not [path for path, _ in server.seen if "Test" in path]


def test_what_is_finished_is_never_fetched_again(server: Server, tmp_path: Path) -> None:
    run(server, tmp_path)
    assert len(server.seen) == 5
    run(server, tmp_path)
    assert len(server.seen) == 5
    shutil.rmtree(tmp_path / "HAM10000_images_part_2")
    run(server, tmp_path)
    assert [path for path, _ in server.seen[5:]] == ["/HAM10000_images_part_2.zip"]


def test_an_archive_that_is_there_already_is_checked_and_used(server: Server, tmp_path: Path) -> None:
    name = "HAM10000_images_part_1.zip"
    (tmp_path / name).write_bytes(FILES[name])
    run(server, tmp_path)
    assert f"/{name}" not in [path for path, _ in server.seen]
    assert tree(tmp_path) == WHOLE + WHOLE_TEST


def test_licence_and_citation_are_printed_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dl, "OFFICIAL", items_of(FILES))
    arguments = ["--out", str(tmp_path), "--base-url", server.url, "--test-set"]
    result = CliRunner().invoke(dl.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.count("CC BY-NC 4.0") == 1
    assert result.output.count("10.1038/sdata.2018.161") == 1
    assert result.output.count("1902.03368") == 1
    assert f"--source {tmp_path} --test-source {tmp_path / dl.TEST_FOLDER}" in result.output


def test_a_cut_download_of_everything_ends_whole(server: Server, tmp_path: Path) -> None:
    server.script = ["cut:100", "status:503", "", "cut:5000", "ignore-range", "status:502", "cut:3", "status:503"]
    run(server, tmp_path)
    assert tree(tmp_path) == WHOLE + WHOLE_TEST


def test_a_full_disk_is_foreseen(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {name: len(content) for name, content in FILES.items()}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=sum(sizes.values())))
    with pytest.raises(DataError, match=r"GB are needed .* free"):
        run(server, tmp_path)
    assert server.seen == []
    enough = sum(sizes.values()) + max(sizes.values()) + 7 * 4096
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=enough))
    run(server, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    run(server, tmp_path)  # nothing is to come, so nothing is needed


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("HAM10000_metadata.csv", "bytes, and the official one"),
        ("HAM10000_images_part_1", "holds 0 images"),
        ("HAM10000_images_part_1/ISIC_0.jpg", "holds 1 images"),
        ("ISIC2018_Task3_Test/ISIC2018_Task3_Test_GroundTruth.csv", "first line"),
    ],
)
def test_what_stands_in_the_way_is_left_alone(server: Server, tmp_path: Path, place: str, reason: str) -> None:
    mine = tmp_path / place
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(DataError, match=f"{reason}.*move it away"):
        run(server, tmp_path)
    assert mine.read_text() == "mine"


def test_an_image_that_the_metadata_does_not_list_is_noticed(server: Server, tmp_path: Path) -> None:
    files = FILES | {
        "HAM10000_images_part_1.zip": zip_of({f"ISIC_{i}.jpg": picture(f"{i}") for i in (0, 1, 9)}),
    }
    server.files = files
    with pytest.raises(DataError, match=r"ISIC_\d\.jpg: "):
        run(server, tmp_path, files)


def test_two_downloads_do_not_write_to_one_folder(server: Server, tmp_path: Path) -> None:
    with exclusive(tmp_path, "downloading"), pytest.raises(DataError, match="another process"):
        run(server, tmp_path)


SCRIPT = """
from pathlib import Path
from preprocess import download, fetch
from tests.support.download_server import FILES, items_of
fetch._CHUNK_BYTES = 4096
download.download(items_of(FILES), Path({out!r}), {url!r}, pause_s=0)
"""


def test_a_killed_download_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    script = SCRIPT.format(out=str(tmp_path), url=server.url)
    server.script = ["", "stall:20480"]
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    part = tmp_path / ".HAM10000_images_part_1.zip.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size >= 16384) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    have = part.stat().st_size
    assert have >= 16384
    assert not (tmp_path / "HAM10000_images_part_1").exists()
    server.release.set()
    server.seen.clear()
    run(server, tmp_path)
    assert server.seen[0] == ("/HAM10000_images_part_1.zip", f"bytes={have}-")
    assert tree(tmp_path) == WHOLE + WHOLE_TEST


def test_the_command_ends_in_one_line(server: Server, tmp_path: Path) -> None:
    """The real table against a server that has other files."""
    command = [sys.executable, "-m", "preprocess.download", "--out", str(tmp_path / "out"), "--base-url", server.url]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: HAM10000_metadata.csv: the server's file has ")


def test_downloading_and_packing_work_without_any_option(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The official layout with real JPEGs, in an empty working folder."""
    table = rows(60)
    write_table(tmp_path / "table.csv", table)
    names = ["HAM10000_metadata.csv", "HAM10000_images_part_1.zip", "HAM10000_images_part_2.zip"]
    archives = [
        zip_of({f"{row['image_id']}.jpg": jpeg(n) for n, row in enumerate(p)}) for p in (table[:30], table[30:])
    ]
    contents = [(tmp_path / "table.csv").read_bytes(), *archives]
    server.files = dict(zip(names, contents, strict=True))
    items = []
    for item, content in zip(dl.OFFICIAL, contents, strict=False):
        remote = RemoteFile(
            item.remote.name, f"{server.url}/{item.remote.name}", len(content), hashlib.md5(content).hexdigest()
        )
        items.append(replace(item, remote=remote, images=item.images and 30))
    monkeypatch.setattr(dl, "OFFICIAL", tuple(items))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    fetched = CliRunner().invoke(dl.main, [])
    assert fetched.exit_code == 0, fetched.output
    assert fetched.output.endswith(
        "60 images in data/ham10000, whole and checked\nPack them: python -m preprocess.shard\n"
    )
    packed = CliRunner().invoke(shard.main, [])
    assert packed.exit_code == 0, packed.output
    assert "60 images packed in data/shards" in packed.output
    assert len(ShardSet(work / "data" / "shards")) == 60


def test_an_address_that_is_none_is_wrong_usage(tmp_path: Path) -> None:
    result = CliRunner().invoke(dl.main, ["--out", str(tmp_path), "--base-url", "ftp://x"])
    assert isinstance(result.exception, UsageError)


def test_the_table_adds_up() -> None:
    """Against the counts of the publications: 10,015 images; 1,512 test labels, one of them without an image."""
    assert sum(item.images for item in dl.OFFICIAL if not item.test) == 10_015
    labels = next(item for item in dl.OFFICIAL if item.rows)
    images = next(item for item in dl.OFFICIAL if item.test and item.images)
    assert labels.rows is not None
    assert sum(labels.rows.values()) == images.images + 1 == 1_512
    assert [item.remote.md5 is None for item in dl.OFFICIAL] == [False, False, False, False, True]
