"""One file over a bad network: cuts, stalls, busy servers, wrong ranges and wrong bytes."""

import hashlib
import os
from pathlib import Path

import pytest
import requests

from preprocess import download as dl
from shards.common import fetch as fe
from shards.common.errors import DataError
from tests.support.download_server import FILES, WHOLE, WHOLE_TEST, Server, run, tree


def remote_file(name: str, url: str, content: bytes, **changes: object) -> fe.RemoteFile:
    return fe.RemoteFile(
        **{"name": name, "url": url, "bytes": len(content), "md5": hashlib.md5(content).hexdigest()} | changes
    )


def bring(server: Server, folder: Path, name: str = "HAM10000_images_part_1.zip", **changes: object) -> Path:
    """Fetch one file alone."""
    remote = remote_file(name, f"{server.url}/{name}", FILES[name], **changes)
    with fe.open_session(0) as session:
        return fe.fetch(session, remote, folder, pause_s=0)


def test_a_connection_that_is_cut_again_and_again_is_taken_up_where_it_ended(server, tmp_path):
    server.script = ["cut:1000", "cut:20000", "cut:1", "cut:0", "cut:30000"]
    path = bring(server, tmp_path)
    assert path.read_bytes() == FILES[path.name]
    assert [wanted for _, wanted in server.seen] == [
        None,
        *(f"bytes={at}-" for at in (1000, 21000, 21001, 21001, 51001)),
    ]
    assert tree(tmp_path) == [path.name]


def test_a_server_that_stalls_is_asked_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fe, "_TIMEOUT_S", (5, 2))
    server.script = ["stall:8192"]
    path = bring(server, tmp_path)
    assert path.read_bytes() == FILES[path.name]
    assert server.seen[1][1] == "bytes=8192-"


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.script = ["status:503", "status:503", "status:429", "status:500"]
    assert bring(server, tmp_path).read_bytes() == FILES["HAM10000_images_part_1.zip"]
    assert len(server.seen) == 5


def test_no_server_may_make_anyone_wait_for_hours():
    import urllib3

    with fe.open_session() as session:
        retry = session.get_adapter("https://example.org").max_retries
        answer = urllib3.HTTPResponse(headers={"Retry-After": "7200"}, status=503)
        assert retry.get_retry_after(answer) == 60
        answer = urllib3.HTTPResponse(headers={"Retry-After": "7"}, status=503)
        assert retry.get_retry_after(answer) == 7


def test_a_server_that_stays_busy_ends_in_one_line_and_keeps_what_came(server, tmp_path):
    server.script = ["cut:9000", *["status:503"] * 100]
    with pytest.raises(DataError, match=r"gave up.*503.*9,000 bytes that arrived are kept: start again") as caught:
        bring(server, tmp_path)
    assert "\n" not in str(caught.value)
    server.script, server.seen = [], []
    assert bring(server, tmp_path).read_bytes() == FILES["HAM10000_images_part_1.zip"]
    assert [wanted for _, wanted in server.seen] == ["bytes=9000-"]


def test_no_server_at_all_ends_in_one_line(tmp_path):
    with Server({}) as gone:
        url = gone.url
    remote = remote_file("a.zip", f"{url}/a.zip", b"abc")
    with fe.open_session(0) as session, pytest.raises(DataError, match=r"a\.zip: gave up .*refused") as caught:
        fe.fetch(session, remote, tmp_path, pause_s=0)
    assert "\n" not in str(caught.value)


def test_wrong_bytes_are_never_unpacked(server, tmp_path):
    server.script = ["", "wrong"]
    with pytest.raises(DataError, match=r"part_1\.zip: .*MD5 .*nothing was unpacked"):
        run(server, tmp_path)
    assert tree(tmp_path) == ["HAM10000_metadata.csv"]
    assert len(server.seen) == 2  # a whole file in one piece with another MD5 is another file: no use to ask again
    run(server, tmp_path)
    assert tree(tmp_path) == WHOLE + WHOLE_TEST


def test_pieces_of_two_files_are_noticed_and_fetched_again(server, tmp_path):
    server.script = ["wrong", "cut:40000"]
    (tmp_path / ".HAM10000_images_part_1.zip.part").write_bytes(b"of an older version")
    assert bring(server, tmp_path).read_bytes() == FILES["HAM10000_images_part_1.zip"]


def test_pieces_that_never_fit_end_in_one_line(server, tmp_path):
    server.script = ["cut:50", "wrong", "cut:50", "wrong"]
    with pytest.raises(DataError, match="MD5"):
        bring(server, tmp_path)
    assert tree(tmp_path) == []


def test_a_server_that_ignores_range_sends_it_all_again(server, tmp_path):
    server.script = ["cut:30000", "ignore-range"]
    assert bring(server, tmp_path).read_bytes() == FILES["HAM10000_images_part_1.zip"]
    assert server.seen[1][1] == "bytes=30000-"


def test_a_server_that_sends_another_range_is_asked_for_all(server, tmp_path):
    server.script = ["cut:30000", "foreign-range"]
    assert bring(server, tmp_path).read_bytes() == FILES["HAM10000_images_part_1.zip"]
    assert [wanted for _, wanted in server.seen] == [None, "bytes=30000-", None]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("extra", [0, 5, 3_000_000])
def test_a_left_part_as_long_as_the_file_or_longer(server, tmp_path, extra, exact):
    name = "HAM10000_images_part_1.zip"
    (tmp_path / f".{name}.part").write_bytes(FILES[name] + b"x" * extra)
    assert bring(server, tmp_path, exact=exact).read_bytes() == FILES[name]
    assert [wanted for _, wanted in server.seen if not wanted] == ([None] if extra else [])


def test_a_file_of_another_size_is_refused_before_it_is_fetched(server, tmp_path):
    with pytest.raises(DataError, match="the official one 200"):
        bring(server, tmp_path, bytes=200)
    assert tree(tmp_path) == []


def test_a_server_that_never_ends_is_cut_off(server, tmp_path):
    server.script = ["endless"]
    with pytest.raises(DataError, match="sends more than"):
        bring(server, tmp_path, exact=False, md5=None)


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_is_not_repeated(server, tmp_path, status):
    server.script = [f"status:{status}"]
    with pytest.raises(DataError, match=f"answers {status}"):
        bring(server, tmp_path)
    assert len(server.seen) == 1


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("left", [b"", b"of another file"])
def test_a_server_that_has_no_byte_at_all(server, tmp_path, left, exact):
    name = "HAM10000_images_part_1.zip"
    if left:
        (tmp_path / f".{name}.part").write_bytes(left)
    server.script = ["header:416|Content-Range|bytes */0"] * 3
    with pytest.raises(DataError, match="answers 416"):
        bring(server, tmp_path, exact=exact)
    assert tree(tmp_path) == [] and len(server.seen) == 1 + bool(left)


@pytest.mark.parametrize(
    "header",
    [
        "200|Content-Length|\xb2",
        "200|Content-Length|" + "9" * 5000,
        "206|Content-Range|bytes 0-\xb2/\xb2",
        f"206|Content-Range|bytes 0-9/{'9' * 5000}",
        "302|Location|http://[::1",
        "302|Location|http://\xff\xfe/",
        "302|Location|//",
        "302|Location|http://a:b/",
    ],
)
def test_headers_that_cannot_be_read_are_no_traceback(server, tmp_path, header):
    """Either the server is asked again, or it is one line."""
    server.script = [f"header:{header}"]
    try:
        path = bring(server, tmp_path)
        assert path.read_bytes() == FILES[path.name]
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < 600


def test_a_socks_proxy_without_its_package_and_a_foreign_address_end_at_once(server, tmp_path, monkeypatch):
    server.script = ["header:302|Location|ftp://127.0.0.1/file"]
    with pytest.raises(DataError, match="check the address"):
        bring(server, tmp_path)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr("requests.adapters.SOCKSProxyManager", _no_pysocks)
    with pytest.raises(DataError, match=r"SOCKS.*needs the package PySocks"):
        bring(server, tmp_path)
    assert len(server.seen) == 1


def _no_pysocks(*_: object, **__: object) -> None:
    """What requests has instead of urllib3's manager without the package."""
    raise requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support.")


def test_a_server_that_drips_is_asked_again_and_then_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fe, "_FLOOR", (0.2, 1000))
    server.script = ["drip"] * 2
    assert bring(server, tmp_path).read_bytes() == FILES["HAM10000_images_part_1.zip"]
    assert len(server.seen) == 3 and server.seen[2][1] is not None
    (tmp_path / "HAM10000_images_part_1.zip").unlink()
    server.script = ["drip"] * 9
    with pytest.raises(DataError, match=r"gave up after 5 .*fewer than 1,000 bytes came in .*are kept"):
        bring(server, tmp_path)


def test_the_official_metadata_passes(server, tmp_path):
    sample = os.environ.get("HAM10000_SAMPLE")
    if not sample:
        pytest.skip("HAM10000_SAMPLE does not name the real files")
    name = "HAM10000_metadata.csv"
    server.files[name] = (Path(sample) / name).read_bytes()
    official = dl.OFFICIAL[0]
    with fe.open_session(0) as session:
        remote = fe.RemoteFile(name, f"{server.url}/{name}", official.bytes, official.md5)
        assert fe.fetch(session, remote, tmp_path).read_bytes() == server.files[name]
