"""Sets that are pushed, pulled and packed to a store: the same bytes, once, after any interruption."""

import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from preprocess import shard
from shards import copy
from shards.__main__ import main
from shards.common.errors import DataError, UsageError
from shards.format import MANIFEST, EncodeSpec
from shards.jpeg import encode_jpeg
from shards.place import locked
from shards.shardset import ShardSet
from shards.writer import PackedSample, ShardSetWriter
from tests.conftest import finish_set, free_port, picture, write_set
from tests.support.rawdata import write_raw
from tests.support.stores import S3, s3_server

pytest.importorskip("s3fs")
pytest.importorskip("moto")
ROOT = Path(__file__).parents[2]
PLACE = "s3://bucket/set"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("packed") / "set", images=400)


@pytest.fixture
def s3(monkeypatch, tmp_path) -> Iterator[S3]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with s3_server(monkeypatch) as running:
        yield running


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stored(s3: S3) -> dict[str, bytes]:
    return {name: s3.get(f"set/{name}") for name in s3.names()}


def sent(s3: S3) -> list[str]:
    return [one.path.partition("?")[0].rpartition("/")[2] for one in s3.proxy.seen if one.method == "PUT"]


def test_a_set_that_is_pushed_and_pulled_is_the_same(s3, packed, tmp_path, command):
    code, out, _ = command(main, "push", packed, PLACE)
    assert code == 0 and out.startswith(f"{PLACE}: 4 shards are there")
    assert stored(s3) == contents(packed) and sent(s3)[-1] == MANIFEST
    assert command(main, "verify", PLACE)[:2] == (0, f"{PLACE}: 4 shards and 400 samples are whole\n")
    assert command(main, "verify", f"{s3.url}/set")[0] == 0
    assert command(main, "info", PLACE)[0] == 0
    assert command(main, "pull", PLACE, tmp_path / "back")[:2] == (0, f"{tmp_path / 'back'}: 4 shards, whole\n")
    assert contents(tmp_path / "back") == contents(packed)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["back", "home"]
    assert command(main, "pull", f"{s3.url}/set", tmp_path / "web")[0] == 0
    assert contents(tmp_path / "web") == contents(packed)


@pytest.fixture
def google(monkeypatch) -> Iterator[str]:
    """An empty bucket of Google Cloud Storage on this machine, which speaks no gRPC."""
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    port = free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="lab")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    yield "gs://lab"
    server.stop()


def test_a_set_in_google_cloud_storage(google, packed, tmp_path, command):
    place = f"{google}/set"
    assert command(main, "push", packed, place)[0] == 0
    assert command(main, "verify", place)[:2] == (0, f"{place}: 4 shards and 400 samples are whole\n")
    copy.pull(place, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(packed)
    with ShardSet(place, cache=tmp_path / "cache") as data, ShardSet(packed) as local:
        assert all(np.array_equal(data.pixels(row), local.pixels(row)) for row in (0, 199, 399))
    small = write_set(tmp_path / "small", images=60)
    with pytest.raises(DataError, match="already holds a shard set; add --overwrite"):
        copy.push(small, place)
    copy.push(small, place, overwrite=True)
    copy.pull(place, tmp_path / "small-back")
    assert contents(tmp_path / "small-back") == contents(small)
    with pytest.raises(DataError, match=r"^gs://lab/nothing/manifest\.json: is not there; check the address$"):
        ShardSet(f"{google}/nothing", cache=tmp_path / "cache")


@pytest.mark.parametrize("fault", ["status:503:SlowDown", "status:500:InternalError", "cut:0", "slow:0.3"])
def test_a_store_that_is_slow_or_busy_or_cuts_while_it_is_written(s3, packed, fault):
    for request in ("PUT .*00001.tar", "HEAD .*00002.tar", "PUT .*index", "PUT .*manifest"):
        s3.proxy.plan(request, fault)
    copy.push(packed, PLACE)
    assert stored(s3) == contents(packed)


def test_a_store_that_stays_busy_or_refuses_leaves_no_set(s3, packed):
    s3.proxy.plan("PUT .*00001.tar", "status:503:SlowDown", times=1000)
    with pytest.raises(DataError, match=r"^s3://bucket/set/shard-00001\.tar: gave up after 5 attempts"):
        copy.push(packed, PLACE)
    s3.proxy.faults.clear()
    s3.proxy.plan("PUT .*00001.tar", "status:403:AccessDenied")
    with pytest.raises(DataError, match=r"^s3://bucket/set/shard-00001\.tar: access is refused"):
        copy.push(packed, PLACE)
    assert MANIFEST not in s3.names()
    copy.push(packed, PLACE)
    assert stored(s3) == contents(packed)


def test_a_second_push_sends_the_manifest_alone(s3, packed):
    copy.push(packed, PLACE)
    s3.proxy.seen.clear()
    copy.push(packed, PLACE)
    assert sent(s3) == [MANIFEST]


def test_another_set_is_replaced_only_if_asked_and_its_rest_removed(s3, packed, tmp_path):
    copy.push(packed, PLACE)
    small = write_set(tmp_path / "small", images=60)
    with pytest.raises(DataError, match="already holds a shard set; add --overwrite"):
        copy.push(small, PLACE)
    assert stored(s3) == contents(packed)
    copy.push(small, PLACE, overwrite=True)
    assert stored(s3) == contents(small)
    s3.put("set/other.txt", b"x")
    with pytest.raises(DataError, match=r"holds 'other\.txt', which is not part of a shard set"):
        copy.push(small, PLACE, overwrite=True)


def test_a_damaged_set_is_not_pushed(s3, packed, tmp_path):
    damaged = write_set(tmp_path / "damaged", images=400)
    tar = bytearray((damaged / "shard-00001.tar").read_bytes())
    tar[1000] ^= 1
    (damaged / "shard-00001.tar").write_bytes(tar)
    with pytest.raises(DataError, match=r"shard-00001\.tar: its SHA-256 is not the manifest's"):
        copy.push(damaged, PLACE)
    assert MANIFEST not in s3.names()
    listed = damaged / "quarantine.csv"
    with ShardSetWriter(damaged, EncodeSpec(), 1 << 20, overwrite=True) as writer:
        image = encode_jpeg(picture(np.random.default_rng(0), 0, 50, 60))
        empty = dict.fromkeys(("lesion_id", "dx_type", "age", "sex", "localization", "dataset"))
        writer.add(PackedSample(image, "jpg", 50, 60, "train", {"image_id": "A", "dx": "nv", **empty}))
        writer.attach(listed.name, b"image_id,file,reason\n")
        finish_set(writer)
    listed.write_bytes(b"image_id,file,wrong\n")
    with pytest.raises(DataError, match=r"quarantine\.csv: its SHA-256 is not the manifest's"):
        copy.push(damaged, PLACE)
    assert MANIFEST not in s3.names()


def test_verify_names_what_is_wrong_in_the_store_whatever_the_cache_holds(s3, packed, tmp_path, command, monkeypatch):
    monkeypatch.setenv("DERMSCALE_CACHE", str(tmp_path / "cache"))
    s3.put_set(packed)
    with ShardSet(PLACE) as data:
        data.shard(0)
        s3.put("set/shard-00000.tar", bytes(data.manifest.shards[0].bytes))
    s3.put("set/shard-00001.idx", b"wrong")
    s3.ask("DELETE", "bucket/set/shard-00002.idx")
    s3.put("set/notes.txt", b"x")
    s3.put("set/index.parquet", b"wrong")
    code, _, errors = command(main, "verify", PLACE)
    assert code == 1 and errors.count("\n") == 6 and "5 problems, each with what to do" in errors
    for said in ("00000.tar: its SHA-256", "00001.idx is damaged", "00002.idx: is not there", "notes.txt: is not part"):
        assert said in errors
    assert "index.parquet: its SHA-256 is not the manifest's" in errors


def test_a_killed_push_goes_on_where_it_was(s3, packed, tmp_path):
    s3.proxy.plan("PUT .*00003.tar", "hang")
    process = subprocess.Popen([sys.executable, "-m", "shards", "push", packed, PLACE], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("home/*/sent-*.json"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert MANIFEST not in s3.names()
    with pytest.raises(DataError, match="is not there"):
        ShardSet(PLACE)
    s3.proxy.release.set()
    time.sleep(0.2)  # what the proxy held back arrives, and its sender does not know
    s3.proxy.seen.clear()
    copy.push(packed, PLACE)
    assert stored(s3) == contents(packed)
    assert set(sent(s3)) == {"shard-00003.tar", "shard-00003.idx", "index.parquet", MANIFEST}


def test_a_killed_pull_goes_on_where_it_was(s3, packed, tmp_path):
    s3.put_set(packed)
    s3.proxy.plan("GET .*00000.tar", "stall:5000")
    command = [sys.executable, "-m", "shards", "pull", PLACE, tmp_path / "back"]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob(".back.pull/files/*/*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "back").exists()
    s3.proxy.release.set()
    s3.proxy.seen.clear()
    copy.pull(PLACE, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(packed)
    assert {one.path[-9:] for one in s3.proxy.asked("GET", ".tar")} == {"00000.tar"}


def test_a_pull_repairs_what_was_killed_while_a_set_was_replaced_and_locks_packers_out(s3, packed, tmp_path):
    s3.put_set(packed)
    out = tmp_path / "set"
    old = write_set(tmp_path / ".set.old", images=60)
    before = contents(old)
    with pytest.raises(DataError, match="already holds a shard set; add --overwrite"):
        copy.pull(PLACE, out)
    assert contents(out) == before and not old.exists()
    (old := write_set(old, images=60)).joinpath(MANIFEST).unlink()
    with locked(out, out), pytest.raises(DataError, match="another process is writing to this folder"):
        copy.pull(PLACE, out, overwrite=True)
    write_set(old, images=60).joinpath(MANIFEST).unlink()
    begun = tmp_path / ".set.pull" / "files" / hashlib.sha256((packed / MANIFEST).read_bytes()).hexdigest()[:32]
    begun.mkdir(parents=True)
    (begun / ".shard-00000.tar.9-0123456789abcdef.part").touch()  # of another version
    copy.pull(PLACE, out, overwrite=True)
    assert contents(out) == contents(packed)
    assert [file.name for file in tmp_path.iterdir()] == ["set"]


def test_a_set_that_is_packed_to_a_store_is_that_of_a_folder(s3, tmp_path, command):
    source = write_raw(tmp_path / "source")
    options = ("--source", source, "--max-resolution", 64, "--workers", 2)
    assert command(shard.main, *options, "--out", tmp_path / "set")[0] == 0
    code, out, _ = command(shard.main, *options, "--out", PLACE)
    assert code == 0 and f"packed in {PLACE}" in out
    assert stored(s3) == contents(tmp_path / "set") and sent(s3)[-1] == MANIFEST
    assert not list((tmp_path / "home").rglob("*.tar")) and not list(
        (tmp_path / "home" / "dermscale" / "packing").iterdir()
    )
    code, _, errors = command(shard.main, *options, "--out", PLACE)
    assert code == 1 and "already holds a shard set; add --overwrite" in errors
    assert command(shard.main, *options, "--jpeg-quality", 50, "--out", PLACE, "--overwrite")[0] == 0
    assert command(main, "verify", PLACE)[0] == 0
    assert s3.get("set/shard-00000.tar") != (tmp_path / "set" / "shard-00000.tar").read_bytes()


def test_a_killed_packing_to_a_store_is_done_again_and_sends_what_is_missing(s3, tmp_path, command):
    source = write_raw(tmp_path / "source")
    options = ("--source", source, "--max-resolution", "64")
    assert command(shard.main, *options, "--out", tmp_path / "set")[0] == 0
    s3.proxy.plan("PUT .*00001.tar", "hang")
    process = subprocess.Popen([sys.executable, "-m", "preprocess.shard", *options, "--out", PLACE], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not s3.proxy.asked("PUT", "00001.tar") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert s3.names() == ["shard-00000.idx", "shard-00000.tar"]
    s3.proxy.release.set()
    s3.proxy.seen.clear()
    assert command(shard.main, *options, "--out", PLACE)[0] == 0
    assert stored(s3) == contents(tmp_path / "set") and "shard-00000.tar" not in sent(s3)


def test_what_cannot_be_written_is_one_line(s3, packed, tmp_path, command):
    with pytest.raises(UsageError, match="a web server takes no files"):
        copy.push(packed, f"{s3.url}/set")
    with pytest.raises(DataError, match=r"s3://nobucket/set/.*: is not there; check the address"):
        copy.push(packed, "s3://nobucket/set")
    assert command(main, "push", packed, tmp_path / "other")[0] == 2
    assert command(main, "pull", packed, tmp_path / "other")[0] == 2
