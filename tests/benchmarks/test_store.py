"""Sets in a store: the server, and the first and the later epochs."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from benchmarks import bucket, store
from benchmarks.datasets import Job, packed_files, prepared
from benchmarks.measure import Series
from benchmarks.peers.ours import PAYLOADS, SHARDS_JPG
from benchmarks.targets import verdict
from shards import ShardSet
from tests.support.benchdata import measurement, series, skip_without


def ask(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    with urlopen(Request(url, method=method, headers=headers)) as answer:
        return answer.status, dict(answer.headers), answer.read()


def test_the_server_sends_files_and_ranges_and_counts_them(tmp_path):
    content = bytes(range(256)) * 4000
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file").write_bytes(content)
    with bucket.serving(tmp_path, 0.0, 1e9) as endpoint:
        url = f"{endpoint}/{bucket.NAME}/set/file"
        status, headers, body = ask(url)
        assert (status, body, headers["Content-Length"]) == (200, content, str(len(content)))
        assert ask(url, "HEAD")[1]["ETag"] == headers["ETag"]
        status, headers, body = ask(url, Range="bytes=1000-1999")
        assert (status, body, headers["Content-Range"]) == (206, content[1000:2000], f"bytes 1000-1999/{len(content)}")
        assert ask(url, Range="bytes=1023990-2000000")[2] == content[1023990:]
        with pytest.raises(HTTPError, match="404"):
            ask(f"{endpoint}/{bucket.NAME}/set/other")
        assert bucket.sent_bytes(endpoint) == len(content) + 1000 + 10
    with pytest.raises(OSError):
        urlopen(endpoint)


def test_requests_wait_and_share_the_speed(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1_000_000))
    with bucket.serving(tmp_path, 0.05, 10e6) as endpoint:
        began = time.perf_counter()
        ask(f"{endpoint}/{bucket.NAME}/file", "HEAD")
        assert time.perf_counter() - began >= 0.05
        began = time.perf_counter()
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(ask, [f"{endpoint}/{bucket.NAME}/file"] * 3))
        assert time.perf_counter() - began >= 0.05 + 0.3


def test_the_peers_get_the_bytes_of_our_set(small_job):
    files = {path.stem: path.read_bytes() for path, _ in packed_files(small_job, PAYLOADS)}
    with ShardSet(prepared(SHARDS_JPG, small_job) / "set") as data:
        assert files == {name: bytes(data.read(row)) for row, name in enumerate(data.column("image_id"))}


def test_first_and_later_epochs_are_timed_and_what_they_fetch_is_counted(small_job, tmp_path):
    skip_without(("s3fs",))
    home = prepared(SHARDS_JPG, small_job).parent
    name = f"{store.OURS}, 1 ms"
    with bucket.serving(home, 0.001, 1e9) as endpoint:
        readings = {name: store.Reading(small_job, store.OURS, endpoint, tmp_path / "cache")}
        rows = {(row.metric, row.beside): row for row in store.measure(readings, measurement(seconds=0.01))}
    assert [row.failed for row in rows.values()] == [""] * 6
    assert rows["cold_img_per_s", ""].value < rows["warm_img_per_s", ""].value
    assert rows["warm_img_per_s ratio", "from a folder"].value == pytest.approx(
        rows["warm_img_per_s", ""].value / rows["folder_img_per_s", ""].value
    )
    # all but the .idx files and the list of duplicates, each once
    assert 0.5 < rows["fetched", ""].value <= 1.0
    assert not (tmp_path / "cache").exists()


def test_ratios_are_taken_at_the_same_latency_and_failures_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "stats", lambda job: ((0.0, 0.0, 0.0), "341x256"))
    monkeypatch.setattr(store, "samples", lambda job: range(100))
    monkeypatch.setattr(store, "prepared", lambda kind, job: tmp_path)
    monkeypatch.setattr(store, "_size", lambda folder: 200)
    job = Job(tmp_path, tmp_path)
    readings = {name: store.Reading(job, reader, "", tmp_path) for name, (reader, _) in store.SYSTEMS.items()}
    usual = Series([replace(sample, beside=101.0) for sample in series(100, 100).samples])
    timed = {f"{name}: {epoch}": usual for name in readings for epoch in ("first epoch", "later epochs")}
    timed |= {f"{store.OURS}, {ms} ms: from a folder": series(100, 110) for ms in store.LATENCIES_MS}
    timed["dermscale, 8 ms: first epoch"] = series(300, 300)
    timed["LitData, 1 ms: first epoch"] = Series(failed="no batch")
    timed["LitData, 8 ms: later epochs"] = Series(failed="wrong batch")
    rows = store.rows_of(readings, timed, measurement())
    cold = {(row.system, row.beside): row for row in rows if row.metric == "cold_img_per_s ratio"}
    assert list(cold) == [
        (f"dermscale, {ms} ms", f"{peer}, {ms} ms") for ms in (1, 8) for peer in ("MosaicML Streaming", "LitData")
    ]
    assert [row.value for row in cold.values()] == [1.0, None, 3.0, None]
    assert cold["dermscale, 1 ms", "LitData, 1 ms"].failed == "the other system failed: no batch"
    assert cold["dermscale, 8 ms", "LitData, 8 ms"].failed == "the other system failed: wrong batch"
    found = {(row.system, row.metric): row.value for row in rows if not row.beside}
    assert found["dermscale, 1 ms", "fetched"] == 1.01 and found["dermscale, 1 ms", "fetched_kb"] == 0.00202
    warm = next(row for row in rows if row.metric == "warm_img_per_s ratio")
    assert warm.values == pytest.approx((1.0, 1 / 1.1)) and verdict(warm).endswith("the interval contains it")
