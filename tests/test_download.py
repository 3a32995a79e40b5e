"""The downloader against a local HTTP server that misbehaves: every case ends whole, or in one clear line."""

import hashlib
import io
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from preprocess import download as dl
from preprocess import fetch as fe
from preprocess.ham10000 import read_source
from preprocess.isic2018 import read_test_source
from preprocess.locking import exclusive
from shards.errors import DataError, UsageError

HEADER = "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset\n"


def zip_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def picture(name: str) -> bytes:
    """Not a picture, but as incompressible as one."""
    return b"".join(hashlib.sha256(f"{name}{i}".encode()).digest() for i in range(1500))


FILES = {
    "HAM10000_metadata.csv": (
        HEADER + "".join(f"HAM_{i},ISIC_{i},nv,histo,45.0,male,back,rosendahl\n" for i in range(5))
    ).encode(),
    "HAM10000_images_part_1.zip": zip_of({f"ISIC_{i}.jpg": picture(f"{i}") for i in (0, 1, 2)}),
    "HAM10000_images_part_2.zip": zip_of(
        {"inside/": b"", "inside/LICENSE.txt": b"x", "__MACOSX/._ISIC_3.jpg": b"x"}
        | {f"inside/ISIC_{i}.jpg": picture(f"{i}") for i in (3, 4)}
    ),
    "ISIC2018_Task3_Test_Images.zip": zip_of({f"T/ISIC_{i}.jpg": picture(f"{i}") for i in (7, 8)}),
    "ISIC2018_Task3_Test_GroundTruth.zip": zip_of(
        {
            "T/ISIC2018_Task3_Test_GroundTruth.csv": b"image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"
            b"ISIC_7,1.0,0.0,0.0,0.0,0.0,0.0,0.0\nISIC_8,0.0,1.0,0.0,0.0,0.0,0.0,0.0\n"
            b"ISIC_0035068,0.0,1.0,0.0,0.0,0.0,0.0,0.0\n",
            "T/LICENSE.txt": b"x",
        }
    ),
}


def remote_file(name: str, url: str, content: bytes, **changes: object) -> fe.RemoteFile:
    return fe.RemoteFile(
        **{"name": name, "url": url, "bytes": len(content), "md5": hashlib.md5(content).hexdigest()} | changes
    )


def items_of(files: dict[str, bytes]) -> tuple[dl.Item, ...]:
    """The official table with the sizes and hashes of `files`."""
    images = {"HAM10000_images_part_1.zip": 3, "HAM10000_images_part_2.zip": 2, "ISIC2018_Task3_Test_Images.zip": 2}
    items = []
    for item in dl.OFFICIAL:
        name = item.remote.name
        md5 = hashlib.md5(files[name]).hexdigest() if item.remote.md5 else None
        rows = {"MEL": 1, "NV": 2, "BCC": 0, "AKIEC": 0, "BKL": 0, "DF": 0, "VASC": 0} if item.rows else None
        remote = fe.RemoteFile(name, item.remote.url, len(files[name]), md5, item.remote.exact)
        items.append(dl.Item(remote, item.target, images.get(name, 0), rows, item.test))
    return tuple(items)


class Server(ThreadingHTTPServer):
    """Serves `files`; each request first takes the next word of `script`, which says how to misbehave."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.script = dict(files), []
        self.seen: list[tuple[str, str | None]] = []
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news here."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.seen.append((self.path, wanted))
        word, _, value = (self.server.script.pop(0) if self.server.script else "").partition(":")
        content = self.server.files.get(self.path.lstrip("/"))
        if word == "status" or content is None:
            self.send_response(int(value or 404))
            if value == "503":
                self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if word == "wrong":
            content = bytes(255 - byte for byte in content)
        start, ranged = 0, False
        match = re.fullmatch(r"bytes=(\d+)-", wanted or "")
        if match and word != "ignore-range":
            start, ranged = int(match[1]), True
        if ranged and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[start:]
        self.send_response(206 if ranged else 200)
        if ranged:
            first = start + 1 if word == "foreign-range" else start
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if word == "endless":
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            while True:
                self.wfile.write(b"x" * 65536)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if word in ("cut", "stall"):
            self.wfile.write(body[: int(value)])
            self.wfile.flush()
            if word == "stall":
                self.server.release.wait(20)
            self.close_connection = True
            return
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(FILES) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.release.set()
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fe, "_CHUNK_BYTES", 4096)


def run(server: Server, out: Path, files: dict[str, bytes] = FILES, test_set: bool = True) -> None:
    items = [item for item in items_of(files) if test_set or not item.test]
    dl.download(items, out, server.url, pause_s=0)


def bring(server: Server, folder: Path, name: str = "HAM10000_images_part_1.zip", **changes: object) -> Path:
    """Fetch one file alone."""
    remote = remote_file(name, f"{server.url}/{name}", FILES[name], **changes)
    with fe.open_session(0) as session:
        return fe.fetch(session, remote, folder, pause_s=0)


def tree(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


WHOLE = [
    "HAM10000_images_part_1/ISIC_0.jpg",
    "HAM10000_images_part_1/ISIC_1.jpg",
    "HAM10000_images_part_1/ISIC_2.jpg",
    "HAM10000_images_part_2/ISIC_3.jpg",
    "HAM10000_images_part_2/ISIC_4.jpg",
    "HAM10000_metadata.csv",
]
WHOLE_TEST = [
    "ISIC2018_Task3_Test/ISIC2018_Task3_Test_GroundTruth.csv",
    "ISIC2018_Task3_Test/ISIC2018_Task3_Test_Images/ISIC_7.jpg",
    "ISIC2018_Task3_Test/ISIC2018_Task3_Test_Images/ISIC_8.jpg",
]


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


def test_a_connection_that_is_cut_again_and_again_is_taken_up_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.script = ["cut:1000", "cut:20000", "cut:1", "cut:0", "cut:30000"]
    path = bring(server, tmp_path)
    assert path.read_bytes() == FILES[path.name]
    assert [wanted for _, wanted in server.seen] == [
        None,
        *(f"bytes={at}-" for at in (1000, 21000, 21001, 21001, 51001)),
    ]
    assert tree(tmp_path) == [path.name]


def test_a_cut_download_of_everything_ends_whole(server: Server, tmp_path: Path) -> None:
    server.script = ["cut:100", "status:503", "", "cut:5000", "ignore-range", "status:502", "cut:3", "status:503"]
    run(server, tmp_path)
    assert tree(tmp_path) == WHOLE + WHOLE_TEST


def test_a_server_that_stalls_is_asked_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fe, "_TIMEOUT_S", (5, 0.3))
    server.script = ["stall:8192"]
    path = bring(server, tmp_path)
    assert path.read_bytes() == FILES[path.name]
    assert server.seen[1][1] == "bytes=8192-"


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.script = ["status:503", "status:503", "status:429", "status:500"]
    assert bring(server, tmp_path).read_bytes() == FILES["HAM10000_images_part_1.zip"]
    assert len(server.seen) == 5


def test_no_server_may_make_anyone_wait_for_hours() -> None:
    import urllib3

    with fe.open_session() as session:
        retry = session.get_adapter("https://example.org").max_retries
        answer = urllib3.HTTPResponse(headers={"Retry-After": "7200"}, status=503)
        assert retry.get_retry_after(answer) == 60
        answer = urllib3.HTTPResponse(headers={"Retry-After": "7"}, status=503)
        assert retry.get_retry_after(answer) == 7


def test_a_server_that_stays_busy_ends_in_one_line_and_keeps_what_came(server: Server, tmp_path: Path) -> None:
    server.script = ["cut:9000", *["status:503"] * 100]
    with pytest.raises(DataError, match=r"gave up.*503.*9,000 bytes that came are kept: start again") as caught:
        bring(server, tmp_path)
    assert "\n" not in str(caught.value)
    server.script, server.seen = [], []
    assert bring(server, tmp_path).read_bytes() == FILES["HAM10000_images_part_1.zip"]
    assert [wanted for _, wanted in server.seen] == ["bytes=9000-"]


def test_no_server_at_all_ends_in_one_line(tmp_path: Path) -> None:
    with Server({}) as gone:
        url = gone.url
    remote = remote_file("a.zip", f"{url}/a.zip", b"abc")
    with fe.open_session(0) as session, pytest.raises(DataError, match=r"a\.zip: gave up .*refused") as caught:
        fe.fetch(session, remote, tmp_path, pause_s=0)
    assert "\n" not in str(caught.value)


def test_wrong_bytes_are_never_unpacked(server: Server, tmp_path: Path) -> None:
    server.script = ["", "wrong"]
    with pytest.raises(DataError, match=r"part_1\.zip: .*MD5 .*nothing was unpacked"):
        run(server, tmp_path)
    assert tree(tmp_path) == ["HAM10000_metadata.csv"]
    assert len(server.seen) == 2  # a whole file in one piece with another MD5 is another file: no use to ask again
    run(server, tmp_path)
    assert tree(tmp_path) == WHOLE + WHOLE_TEST


def test_pieces_of_two_files_are_noticed_and_fetched_anew(server: Server, tmp_path: Path) -> None:
    server.script = ["wrong", "cut:40000"]
    (tmp_path / ".HAM10000_images_part_1.zip.part").write_bytes(b"of an older version")
    assert bring(server, tmp_path).read_bytes() == FILES["HAM10000_images_part_1.zip"]


def test_pieces_that_never_fit_end_in_one_line(server: Server, tmp_path: Path) -> None:
    server.script = ["cut:50", "wrong", "cut:50", "wrong"]
    with pytest.raises(DataError, match="MD5"):
        bring(server, tmp_path)
    assert tree(tmp_path) == []


def test_a_server_that_ignores_range_sends_it_all_again(server: Server, tmp_path: Path) -> None:
    server.script = ["cut:30000", "ignore-range"]
    assert bring(server, tmp_path).read_bytes() == FILES["HAM10000_images_part_1.zip"]
    assert server.seen[1][1] == "bytes=30000-"


def test_a_server_that_sends_another_range_is_asked_for_all(server: Server, tmp_path: Path) -> None:
    server.script = ["cut:30000", "foreign-range"]
    assert bring(server, tmp_path).read_bytes() == FILES["HAM10000_images_part_1.zip"]
    assert [wanted for _, wanted in server.seen] == [None, "bytes=30000-", None]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("extra", [0, 5, 3_000_000])
def test_a_left_part_as_long_as_the_file_or_longer(server: Server, tmp_path: Path, extra: int, exact: bool) -> None:
    name = "HAM10000_images_part_1.zip"
    (tmp_path / f".{name}.part").write_bytes(FILES[name] + b"x" * extra)
    assert bring(server, tmp_path, exact=exact).read_bytes() == FILES[name]
    assert [wanted for _, wanted in server.seen if not wanted] == ([None] if extra else [])


def test_a_file_of_another_size_is_refused_before_it_is_fetched(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the official one 200"):
        bring(server, tmp_path, bytes=200)
    assert tree(tmp_path) == []


def test_a_server_that_never_ends_is_cut_off(server: Server, tmp_path: Path) -> None:
    server.script = ["endless"]
    with pytest.raises(DataError, match="sends more than"):
        bring(server, tmp_path, exact=False, md5=None)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_is_not_repeated(server: Server, tmp_path: Path, status: int) -> None:
    server.script = [f"status:{status}"]
    with pytest.raises(DataError, match=f"answers {status}"):
        bring(server, tmp_path)
    assert len(server.seen) == 1


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
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from preprocess import download, fetch
from test_download import FILES, items_of
fetch._CHUNK_BYTES = 4096
download.download(items_of(FILES), Path({out!r}), {url!r}, pause_s=0)
"""


def test_a_killed_download_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent), out=str(tmp_path), url=server.url)
    server.script = ["", "stall:20480"]
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[1])
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


def test_a_killed_unpacking_is_done_again(server: Server, tmp_path: Path) -> None:
    left = tmp_path / ".HAM10000_images_part_1.partial"
    left.mkdir()
    (left / "ISIC_0.jpg").write_bytes(b"half")
    run(server, tmp_path)
    assert tree(tmp_path) == WHOLE + WHOLE_TEST


def test_the_command_ends_in_one_line(server: Server, tmp_path: Path) -> None:
    """The real table against a server that has other files."""
    command = [sys.executable, "-m", "preprocess.download", "--out", str(tmp_path / "out"), "--base-url", server.url]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: HAM10000_metadata.csv: the server's file has ")


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


def test_the_official_metadata_passes(server: Server, tmp_path: Path) -> None:
    sample = os.environ.get("HAM10000_SAMPLE")
    if not sample:
        pytest.skip("HAM10000_SAMPLE does not name the real files")
    name = "HAM10000_metadata.csv"
    server.files[name] = (Path(sample) / name).read_bytes()
    official = dl.OFFICIAL[0].remote
    with fe.open_session(0) as session:
        remote = fe.RemoteFile(name, f"{server.url}/{name}", official.bytes, official.md5)
        assert fe.fetch(session, remote, tmp_path).read_bytes() == server.files[name]
