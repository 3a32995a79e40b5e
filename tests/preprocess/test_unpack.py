"""What archives hold is not believed: hostile ones write nothing, and test labels are known by their rows."""

import io
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from preprocess.unpack import read_only_member
from shards.common.errors import DataError
from tests.support.download_server import FILES, WHOLE, WHOLE_TEST, Server, run, serving, tree, zip_of


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def linked(name: str, target: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, target)
    return buffer.getvalue()


def twice(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"a/{name}", b"x")
        archive.writestr(f"b/{name}", b"y")
    return buffer.getvalue()


def encrypted() -> bytes:
    content = bytearray(zip_of({"a.jpg": b"x", "b.jpg": b"x", "c.jpg": b"x"}))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def damaged() -> bytes:
    content = bytearray(FILES["HAM10000_images_part_1.zip"])
    content[20_000] ^= 255
    return bytes(content)


HOSTILE = {
    "absolute": (zip_of({"/etc/cron.jpg": b"x"}), "leaves the folder"),
    "parent": (zip_of({"../../evil.jpg": b"x"}), "leaves the folder"),
    "parent in the middle": (zip_of({"a/../../evil.txt": b"x"}), "leaves the folder"),
    "backslash": (zip_of({"..\\evil.jpg": b"x"}), "leaves the folder"),
    "drive": (zip_of({"C:evil.jpg": b"x"}), "leaves the folder"),
    "null": (zip_of({"evilAjpg": b"x"}).replace(b"evilAjpg", b"evil\0jpg"), "leaves the folder"),
    "link": (linked("evil.jpg", "/etc/passwd"), "link"),
    "folder link": (linked("HAM10000_images_part_1", "/tmp"), "link"),
    "bomb": (zip_of({"a.jpg": b"\0" * 5_000_000}), "would unpack to 5,000,000"),
    "long name": (zip_of({"a" * 300 + ".jpg": b"x"}), "longer than 200"),
    "same name twice": (twice("a.jpg"), "two members named 'a.jpg'"),
    "encrypted": (encrypted(), "encrypted"),
    "damaged": (damaged(), "damaged"),
    "no zip": (b"<html>please log in</html>", "no zip archive"),
    "truncated": (FILES["HAM10000_images_part_1.zip"][:50_000], "no zip archive"),
    "too few": (zip_of({"a.jpg": b"x"}), "holds 1 images, and the official one 3"),
    "empty": (zip_of({}), "holds 0 images"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_writes_nothing_and_ends_in_one_line(server: Server, tmp_path: Path, kind: str) -> None:
    content, reason = HOSTILE[kind]
    files = FILES | {
        "HAM10000_images_part_1.zip": content
    }  # the table's hash is that of the hostile file: it gets past
    server.files = files
    out = tmp_path / "a" / "b" / "out"
    with pytest.raises(DataError, match=reason) as caught:
        run(server, out, files)
    assert "\n" not in str(caught.value)
    assert "nothing was unpacked" in str(caught.value)
    assert tree(tmp_path) == ["a/b/out/HAM10000_metadata.csv"]


def packed(method: int = zipfile.ZIP_DEFLATED, name: str = "a.csv", content: bytes = b"image,NV\n" * 50) -> bytes:
    """An archive with one member."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


NAMED = packed(zipfile.ZIP_STORED, "\u00e9.csv")
UNREADABLE = {
    "a name that is no UTF-8": (NAMED.replace(b"\xc3\xa9", b"\xff\xfe"), "is damaged or no zip archive ('utf-8' codec"),
    "bzip2": (packed(zipfile.ZIP_BZIP2), "'a.csv', and it is neither stored nor deflated"),
    "lzma": (packed(zipfile.ZIP_LZMA), "'a.csv', and it is neither stored nor deflated"),
    "its first bytes are lost": (packed()[20:], "'a.csv', and it begins outside the archive"),
    "its last bytes are lost": (packed()[:-30], "is damaged or no zip archive (File is not a zip file)"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_archive_that_cannot_be_read_is_one_line(tmp_path: Path, kind: str) -> None:
    content, reason = UNREADABLE[kind]
    archive = tmp_path / "labels.zip"
    archive.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_only_member(archive, ".csv")
    assert str(caught.value).startswith("labels.zip: ") and reason in str(caught.value)


def test_an_archive_that_ends_within_a_member_says_so(tmp_path: Path) -> None:
    archive = tmp_path / "labels.zip"
    archive.write_bytes(packed())
    with (
        mock.patch.object(zipfile.ZipFile, "read", side_effect=EOFError),
        pytest.raises(DataError, match=r"labels\.zip: is damaged or no zip archive \(it ends too early\)"),
    ):
        read_only_member(archive, ".csv")


@pytest.mark.parametrize("error", [ValueError("ours"), OSError("ours")])
def test_an_error_of_our_own_is_no_fault_of_the_archive(tmp_path: Path, error: Exception) -> None:
    archive = tmp_path / "labels.zip"
    archive.write_bytes(packed())
    with mock.patch("preprocess.unpack.members", side_effect=error), pytest.raises(type(error), match="ours"):
        read_only_member(archive, ".csv")


def test_an_error_of_the_system_is_no_fault_of_the_archive(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_only_member(tmp_path / "absent.zip", ".csv")


LABELS = b"image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"
ROW = b"%b,1.0,0.0,0.0,0.0,0.0,0.0,0.0\n"
WRONG_LABELS = {
    "no table": (b"\xff\xfe\0", "is no CSV"),
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
def test_test_labels_are_known_by_their_rows(server: Server, tmp_path: Path, kind: str) -> None:
    content, reason = WRONG_LABELS[kind]
    server.files["ISIC2018_Task3_Test_GroundTruth.zip"] = zip_of({"labels.csv": content})
    with pytest.raises(DataError, match=reason):
        run(server, tmp_path)
    assert not list(tmp_path.glob("*GroundTruth*"))


def test_labels_that_are_no_archive_are_fetched_anew_next_time(server: Server, tmp_path: Path) -> None:
    name = "ISIC2018_Task3_Test_GroundTruth.zip"
    server.files[name] = b"<html>maintenance</html>"
    with pytest.raises(DataError, match="no zip archive"):
        run(server, tmp_path)
    server.files[name] = FILES[name]
    run(server, tmp_path)
    assert tree(tmp_path) == WHOLE + WHOLE_TEST


def test_a_killed_unpacking_is_done_again(server: Server, tmp_path: Path) -> None:
    left = tmp_path / ".HAM10000_images_part_1.partial"
    left.mkdir()
    (left / "ISIC_0.jpg").write_bytes(b"half")
    run(server, tmp_path)
    assert tree(tmp_path) == WHOLE + WHOLE_TEST
