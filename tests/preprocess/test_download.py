"""The downloader against a local server: every case ends with complete files, or with one clear line."""

import hashlib
import io
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from click.testing import CliRunner

from preprocess import download as dl
from preprocess import shard
from preprocess.ham10000 import read_source
from preprocess.isic2018 import read_test_source
from shards import ShardSet
from shards.common.errors import DataError, UsageError
from shards.common.files import exclusive
from tests.support.download_server import (
    FILES,
    WHOLE,
    WHOLE_TEST,
    items_of,
    picture,
    run,
    tree,
    zip_of,
)
from tests.support.rawdata import jpeg, rows, write_table


def test_everything_arrives_in_the_official_layout(server, tmp_path):
    run(server, tmp_path)
    assert tree(tmp_path) == WHOLE + WHOLE_TEST
    for i in range(5):
        assert next(tmp_path.glob(f"HAM*/ISIC_{i}.jpg")).read_bytes() == picture(f"{i}")
    source, test = read_source(tmp_path), read_test_source(tmp_path / dl.TEST_FOLDER)
    assert (len(source.records), source.rejected) == (5, [])
    assert (len(test.records), test.rejected) == (2, [])


def test_without_the_option_the_test_set_is_not_asked_for(server, tmp_path):
    run(server, tmp_path, test_set=False)
    assert tree(tmp_path) == WHOLE
    assert not [path for path, _ in server.seen if "Test" in path]


def test_what_is_finished_is_never_fetched_again(server, tmp_path):
    run(server, tmp_path)
    assert len(server.seen) == 5
    run(server, tmp_path)
    assert len(server.seen) == 5
    shutil.rmtree(tmp_path / "HAM10000_images_part_2")
    run(server, tmp_path)
    assert [path for path, _ in server.seen[5:]] == ["/HAM10000_images_part_2.zip"]


def test_an_archive_that_is_there_already_is_checked_and_used(server, tmp_path):
    name = "HAM10000_images_part_1.zip"
    (tmp_path / name).write_bytes(FILES[name])
    run(server, tmp_path)
    assert f"/{name}" not in [path for path, _ in server.seen]
    assert tree(tmp_path) == WHOLE + WHOLE_TEST


def test_licence_and_citation_are_printed_once(server, tmp_path, monkeypatch):
    monkeypatch.setattr(dl, "OFFICIAL", items_of(FILES))
    arguments = ["--out", str(tmp_path), "--base-url", server.url, "--test-set"]
    result = CliRunner().invoke(dl.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.count("CC BY-NC 4.0") == 1
    assert result.output.count("10.1038/sdata.2018.161") == 1
    assert result.output.count("1902.03368") == 1
    assert f"--source {tmp_path} --test-source {tmp_path / dl.TEST_FOLDER}" in result.output


def test_a_cut_download_of_everything_ends_whole(server, tmp_path):
    server.script = ["cut:100", "status:503", "", "cut:5000", "ignore-range", "status:502", "cut:3", "status:503"]
    run(server, tmp_path)
    assert tree(tmp_path) == WHOLE + WHOLE_TEST


def test_a_full_disk_is_foreseen(server, tmp_path, monkeypatch):
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
def test_what_stands_in_the_way_is_left_alone(server, tmp_path, place, reason):
    mine = tmp_path / place
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(DataError, match=f"{reason}.*move it away"):
        run(server, tmp_path)
    assert mine.read_text() == "mine"


def test_an_image_that_the_metadata_does_not_list_is_noticed(server, tmp_path):
    files = FILES | {
        "HAM10000_images_part_1.zip": zip_of({f"ISIC_{i}.jpg": picture(f"{i}") for i in (0, 1, 9)}),
    }
    server.files = files
    with pytest.raises(DataError, match=r"ISIC_\d\.jpg: "):
        run(server, tmp_path, files)


def test_two_downloads_do_not_write_to_one_folder(server, tmp_path):
    with exclusive(tmp_path, "downloading"), pytest.raises(DataError, match="another process"):
        run(server, tmp_path)


SCRIPT = """
from pathlib import Path
from preprocess import download
from shards.common import fetch
from tests.support.download_server import FILES, items_of
fetch._CHUNK_BYTES = 4096
download.download(items_of(FILES), Path({out!r}), {url!r}, pause_s=0)
"""


def test_a_killed_download_goes_on_where_it_was(server, tmp_path):
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


def test_the_command_ends_in_one_line(server, tmp_path):
    """The real table against a server that has other files."""
    command = [sys.executable, "-m", "preprocess.download", "--out", str(tmp_path / "out"), "--base-url", server.url]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: HAM10000_metadata.csv: the server's file has ")


def test_downloading_and_packing_work_without_any_option(server, tmp_path, monkeypatch):
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
        url, md5 = f"{server.url}/{item.name}", hashlib.md5(content).hexdigest()
        items.append(replace(item, url=url, bytes=len(content), md5=md5, images=item.images and 30))
    monkeypatch.setattr(dl, "OFFICIAL", tuple(items))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    fetched = CliRunner().invoke(dl.main, [])
    assert fetched.exit_code == 0, fetched.output
    assert fetched.output.endswith(
        "60 images in data/ham10000, complete and checked\nPack them: python -m preprocess.shard\n"
    )
    packed = CliRunner().invoke(shard.main, [])
    assert packed.exit_code == 0, packed.output
    assert "60 images packed in data/shards" in packed.output
    assert len(ShardSet(work / "data" / "shards")) == 60


def test_an_address_that_is_none_is_wrong_usage(tmp_path):
    result = CliRunner().invoke(dl.main, ["--out", str(tmp_path), "--base-url", "ftp://x"])
    assert isinstance(result.exception, UsageError)


def test_the_table_adds_up():
    """Against the counts of the publications: 10,015 images; 1,512 test labels, one of them without an image."""
    assert sum(item.images for item in dl.OFFICIAL if not item.test) == 10_015
    labels = next(item for item in dl.OFFICIAL if item.rows)
    images = next(item for item in dl.OFFICIAL if item.test and item.images)
    assert labels.rows is not None
    assert sum(labels.rows.values()) == images.images + 1 == 1_512
    assert [item.md5 is None for item in dl.OFFICIAL] == [False, False, False, False, True]


# ------------------------------------------------------------------ archives and test labels


def damaged(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[20_000] ^= 255
    return bytes(changed)


PART_1 = FILES["HAM10000_images_part_1.zip"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (damaged(PART_1), "is damaged"),
        (b"<html>please log in</html>", "not a zip archive"),
        (PART_1[:50_000], "not a zip archive"),
        (zip_of({"a/a.jpg": b"x", "b/a.jpg": b"y", "../../c.jpg": b"z"}), "holds 2 images, and the official one 3"),
        (zip_of({}), "holds 0 images"),
    ],
    ids=["damaged", "no zip", "truncated", "too few", "empty"],
)
def test_a_wrong_archive_leaves_nothing_and_ends_in_one_line(server, tmp_path, content, reason):
    """Although its hash is the published one."""
    files = FILES | {"HAM10000_images_part_1.zip": content}
    server.files = files
    with pytest.raises(DataError, match=reason) as caught:
        run(server, tmp_path / "out", files)
    assert "\n" not in str(caught.value) and "nothing was unpacked" in str(caught.value)
    assert tree(tmp_path) == ["out/HAM10000_metadata.csv"]


def packed(method: int = zipfile.ZIP_DEFLATED, name: str = "a.csv", content: bytes = b"image,NV\n" * 50) -> bytes:
    """An archive with one member."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def encrypted() -> bytes:
    content = bytearray(packed())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


NO_UTF8 = packed(zipfile.ZIP_STORED, "\u00e9.csv").replace(b"\xc3\xa9", b"\xff\xfe")
UNREADABLE = {
    "a name that is not UTF-8": (NO_UTF8, "is damaged or not a zip archive ('utf-8' codec"),
    "bzip2": (packed(zipfile.ZIP_BZIP2), "cannot be read, because it is neither stored nor deflated"),
    "encrypted": (encrypted(), "cannot be read, because it is encrypted"),
    "a bomb": (packed(content=bytes(20_000_000)), "cannot be read, because it would unpack to 20,000,000 bytes"),
    "its first bytes are lost": (packed()[20:], "cannot be read, because it begins outside the archive"),
    "its last bytes are lost": (packed()[:-30], "is damaged or not a zip archive (File is not a zip file)"),
    "two tables": (zip_of({"a.csv": b"", "b.csv": b""}), "holds 2 .csv files, and one is expected"),
}


def test_a_member_without_a_name_is_passed_over(tmp_path):
    nameless = zipfile.ZipInfo("x")
    nameless.filename = ""
    with zipfile.ZipFile(tmp_path / "labels.zip", "w") as archive:
        archive.writestr("a.csv", b"labels")
        archive.writestr(nameless, b"")
    assert dl.read_labels(tmp_path / "labels.zip") == b"labels"


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_archive_of_labels_that_cannot_be_read_is_one_line(tmp_path, kind):
    content, reason = UNREADABLE[kind]
    archive = tmp_path / "labels.zip"
    archive.write_bytes(content)
    with pytest.raises(DataError) as caught:
        dl.read_labels(archive)
    assert str(caught.value).startswith("labels.zip: ") and reason in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.zip"]


def test_an_archive_that_ends_within_a_member_says_so(tmp_path):
    archive = tmp_path / "labels.zip"
    archive.write_bytes(packed())
    with (
        mock.patch.object(zipfile.ZipFile, "read", side_effect=EOFError),
        pytest.raises(DataError, match=r"labels\.zip: is damaged or not a zip archive \(it ends too early\)"),
    ):
        dl.read_labels(archive)


def test_an_error_that_is_not_the_archives_stays(tmp_path):
    with pytest.raises(FileNotFoundError):
        dl.read_labels(tmp_path / "absent.zip")
    archive = tmp_path / "labels.zip"
    archive.write_bytes(packed())
    with mock.patch.object(dl, "_members", side_effect=ValueError("ours")), pytest.raises(ValueError, match="ours"):
        dl.read_labels(archive)


LABELS = b"image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"
ROW = b"%b,1.0,0.0,0.0,0.0,0.0,0.0,0.0\n"
WRONG_LABELS = {
    "no table": (b"\xff\xfe\0", "is not a CSV file"),
    "empty": (b"", "first line"),
    "another header": (b"image,NV,MEL\n", "first line"),
    "not one-hot": (LABELS + b"a,1.0,1.0,0.0,0.0,0.0,0.0,0.0\n", "line 2"),
    "no number": (LABELS + b"a,1.0,x,0.0,0.0,0.0,0.0,0.0\n", "line 2"),
    "short row": (LABELS + b"a,1.0\n", "line 2"),
    "too few rows": (LABELS + ROW % b"a", "images of NV, and the official table has 2"),
    "another class": (LABELS + ROW % b"a" + ROW % b"b" + ROW % b"c", "3 images of MEL"),
    "an image twice": (
        LABELS + ROW % b"a" + b"b,0.0,1.0,0.0,0.0,0.0,0.0,0.0\nb,0.0,1.0,0.0,0.0,0.0,0.0,0.0\n",
        "lists an image twice",
    ),
    "other images": (
        LABELS + ROW % b"x" + b"y,0.0,1.0,0.0,0.0,0.0,0.0,0.0\nz,0.0,1.0,0.0,0.0,0.0,0.0,0.0\n",
        "do not belong together",
    ),
}


@pytest.mark.parametrize("kind", WRONG_LABELS)
def test_test_labels_are_known_by_their_rows(server, tmp_path, kind):
    content, reason = WRONG_LABELS[kind]
    server.files["ISIC2018_Task3_Test_GroundTruth.zip"] = zip_of({"labels.csv": content})
    with pytest.raises(DataError, match=reason):
        run(server, tmp_path)
    assert not list(tmp_path.glob("*GroundTruth*"))


def test_a_killed_unpacking_is_done_again(server, tmp_path):
    left = tmp_path / ".HAM10000_images_part_1.partial"
    left.mkdir()
    (left / "ISIC_0.jpg").write_bytes(b"half")
    run(server, tmp_path)
    assert tree(tmp_path) == WHOLE + WHOLE_TEST
