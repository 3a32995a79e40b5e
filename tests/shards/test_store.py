"""Shard sets in an S3 store that is slow, busy, cut off, or replaced under way: whole, or one line."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from shards import store
from shards.common.errors import DataError, DermscaleError, UsageError
from shards.format import MANIFEST
from shards.loader import Loader
from shards.shardset import ShardSet
from shards.store import CachedSet, Wanted
from tests.conftest import write_set
from tests.support.stores import S3, hub_server, s3_server

pytest.importorskip("s3fs")
pytest.importorskip("moto")
ROOT = Path(__file__).parents[2]
BLOCK = 100_000


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> Path:
    """A set of four shards: two of train, one each of val and test."""
    return write_set(tmp_path_factory.mktemp("packed") / "set", images=400)


@pytest.fixture
def s3(monkeypatch) -> Iterator[S3]:
    """A bucket behind a proxy, from which little is read at a time."""
    monkeypatch.setattr(store, "_BLOCK_BYTES", BLOCK)
    with s3_server(monkeypatch) as running:
        yield running


@pytest.fixture
def address(s3, packed) -> str:
    """Where the set lies."""
    return s3.put_set(packed)


def wanted(data: ShardSet, number: int) -> Wanted:
    info = data.manifest.shards[number]
    return Wanted(info.file, info.sha256, info.bytes)


def parts(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/.*.part"))


def tars(cache: Path) -> list[str]:
    return sorted(file.name for file in cache.glob("*/*.tar"))


def same_batches(data: ShardSet, other: ShardSet, split: str = "train") -> bool:
    """Whether two sets give the same epoch."""
    epochs = [Loader(one.select(split), batch_size=16, resolution=32, train=split == "train") for one in (data, other)]
    return all(
        all(bool((a == b).all()) for a, b in zip(one, two, strict=True)) for one, two in zip(*epochs, strict=True)
    )


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that runs some lines; `set` is the store's module with small blocks, and `args` the arguments."""
    head = f"import sys\nfrom shards import ShardSet, store\nstore._BLOCK_BYTES = {BLOCK}\nargs = sys.argv[1:]\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.01)


# ------------------------------------------------------------------ reading


def test_a_set_in_a_store_gives_the_batches_of_the_folder_and_fetches_what_it_needs(s3, address, packed, tmp_path):
    with ShardSet(address, cache=tmp_path) as data, ShardSet(packed) as local:
        assert same_batches(data, local)
        assert tars(tmp_path) == ["shard-00000.tar", "shard-00001.tar"]  # those of train
        assert same_batches(data, local, "test")
        assert len(tars(tmp_path)) == 3 and not s3.proxy.asked("GET", ".idx")
    before = len(s3.proxy.seen)
    with ShardSet(address, cache=tmp_path) as data:
        assert same_batches(data, ShardSet(packed))
    assert {one.path.rpartition("/")[2] for one in s3.proxy.seen[before:]} == {MANIFEST}


def test_shards_are_fetched_in_the_order_in_which_they_are_needed(s3, address, tmp_path, monkeypatch):
    monkeypatch.setattr("shards.shardset._FETCHES", 1)
    with ShardSet(address, cache=tmp_path) as data:
        shards = data.column("shard")
        data.fetch_ahead(np.concatenate([np.flatnonzero(shards == number) for number in (2, 0, 3, 1)]))
        wait_for(lambda: len(tars(tmp_path)) == 4)
    first = [one.path[-6:-4] for one in s3.proxy.asked("GET", ".tar") if one.first == 0]
    assert first == ["02", "00", "03", "01"]


def test_batches_come_before_the_shards_that_only_later_ones_need(s3, address, tmp_path):
    s3.proxy.plan("GET .*00001.tar", "hang")
    with ShardSet(address, cache=tmp_path) as data:
        loader = Loader(data.select("train"), batch_size=16, resolution=32, train=False)
        batches = iter(loader)
        assert len(next(batches).images) == 16 and tars(tmp_path) == ["shard-00000.tar"]
        s3.proxy.release.set()
        assert len(list(batches)) == len(loader) - 1
        loader.close()


def test_a_web_server_and_a_file_address_do_too(s3, address, packed, tmp_path):
    with ShardSet(f"{s3.url}/set", cache=tmp_path) as data, ShardSet(packed) as local:
        assert same_batches(data, local)
    with ShardSet(f"file://{packed}") as data, ShardSet(packed) as local:
        assert same_batches(data, local) and not data.stored


def test_a_set_on_the_hugging_face_hub(packed, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    code = "data = ShardSet(args[0], cache=args[1])\nfor number in range(4): data.shard(number)"
    with hub_server(packed) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)  # its client reads this when it is imported
        process = child(code, "hf://datasets/lab/set", tmp_path)
        assert process.wait(60) == 0, process.stderr and process.stderr.read()
        missing = child(code, "hf://datasets/lab/nothing", tmp_path)
        assert missing.wait(60) and missing.stderr
        assert "DataError: hf://datasets/lab/nothing/manifest.json: is not there" in missing.stderr.read()
    for tar in packed.glob("*.tar"):
        assert next(tmp_path.glob(f"*/{tar.name}")).read_bytes() == tar.read_bytes()


def test_a_set_is_pushed_to_the_hub_one_commit_after_the_other(packed, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    (tmp_path / "hub").mkdir()
    code = "from shards.copy import push; from pathlib import Path; push(Path(args[0]), args[1])"
    with hub_server(tmp_path / "hub") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.busy = 2  # somebody else's commits
        process = child(code, packed, "hf://datasets/lab/set")
        assert process.wait(60) == 0, process.stderr and process.stderr.read()
    assert {file.name: file.read_bytes() for file in (tmp_path / "hub").iterdir()} == {
        file.name: file.read_bytes() for file in packed.iterdir()
    }
    assert hub.commits[-1] == MANIFEST and len(hub.commits) == len({*hub.commits})


@pytest.mark.parametrize(
    "fault", ["status:503:SlowDown", "status:500:InternalError", "cut:5000", "short:5000", "short:0", "slow:0.3"]
)
def test_a_server_that_is_slow_busy_or_cut_off_for_a_time(s3, address, packed, tmp_path, fault):
    for request in ("HEAD .*manifest", "GET .*manifest", "GET .*index", "HEAD .*00000.tar", "GET .*00000.tar"):
        if not (fault.startswith("short") and ("manifest" in request or "HEAD" in request)):  # nothing tells of these
            s3.proxy.plan(request, fault)
    with ShardSet(address, cache=tmp_path) as data, ShardSet(packed) as local:
        assert same_batches(data, local)
    assert not parts(tmp_path)


def test_a_manifest_that_is_cut_short_is_named(s3, address, tmp_path):
    s3.proxy.plan("GET .*manifest", "short:50")
    with pytest.raises(DataError, match=r"s3://bucket/set/manifest\.json: damaged"):
        ShardSet(address, cache=tmp_path)


def test_a_server_that_stays_busy_is_given_up_and_what_came_is_kept(s3, address, packed, tmp_path):
    data = ShardSet(address, cache=tmp_path)
    cached = CachedSet(address, tmp_path)
    cached.opened(wanted(data, 1)).close()
    s3.proxy.plan("GET .*00000.tar", "", times=3)
    s3.proxy.plan("GET .*00000.tar", "status:503:SlowDown", times=1000)
    with pytest.raises(DataError, match=r"^shard-00000\.tar: gave up after 5 .*300,000 bytes that arrived are kept"):
        cached.opened(wanted(data, 0))
    assert tars(tmp_path) == ["shard-00001.tar"] and parts(tmp_path)[0].stat().st_size == 3 * BLOCK
    s3.proxy.faults.clear()
    s3.proxy.seen.clear()
    assert cached.opened(wanted(data, 0)).read() == (packed / "shard-00000.tar").read_bytes()
    assert s3.proxy.asked("GET", "00000.tar")[0].first == 3 * BLOCK


def test_wrong_bytes_are_not_used(s3, address, tmp_path):
    data = ShardSet(address, cache=tmp_path)
    s3.proxy.plan("GET .*00002.tar", "wrong", times=1000)
    with pytest.raises(DataError, match=r"shard-00002\.tar: its SHA-256 is not the manifest's"):
        data.shard(2)
    assert not tars(tmp_path)
    s3.proxy.faults.clear()
    assert len(data.shard(2)) == data.manifest.shards[2].bytes


def test_a_file_is_hashed_while_it_grows_and_again_if_it_is_cut(tmp_path):
    file = tmp_path / "part"
    hashed = store._Hashed(file, store.Silent())
    file.write_bytes(b"one")
    hashed.advance(3)
    with file.open("ab") as opened:
        opened.write(b"two")
    hashed.advance(3)
    file.write_bytes(b"-" * 6)  # so it is seen that nothing is read again
    assert hashed.sha256() == hashlib.sha256(b"onetwo").hexdigest()
    os.truncate(file, 2)
    hashed.advance(-4)
    with file.open("ab") as opened:
        opened.write(b"more")
    hashed.advance(4)
    assert hashed.sha256() == hashlib.sha256(b"--more").hexdigest()


def test_a_shard_that_is_replaced_under_way(s3, address, packed, tmp_path):
    data = ShardSet(address, cache=tmp_path)
    data.shard(1)
    other = bytes(data.manifest.shards[0].bytes)

    def replace(request: str) -> None:
        if request.startswith("GET") and "00000.tar" in request:
            s3.put("set/shard-00000.tar", other)

    s3.proxy.after = replace
    web = ShardSet(f"{s3.url}/set", cache=tmp_path / "web")
    with pytest.raises(DataError, match=r"shard-00000\.tar: was replaced while it was fetched; start again"):
        web.shard(0)
    s3.put_set(packed)
    with pytest.raises(DataError, match=r"shard-00000\.tar: was replaced while it was fetched; start again"):
        data.shard(0)
    s3.proxy.after = lambda request: None
    with pytest.raises(DataError, match=r"shard-00000\.tar: its SHA-256 is not the manifest's"):
        data.shard(0)
    s3.put("set/shard-00000.tar", other[:-1])
    with pytest.raises(DataError, match=r"the manifest says .*another set was written to this address"):
        data.shard(0)
    assert tars(tmp_path) == ["shard-00001.tar"]
    s3.put_set(packed)
    s3.proxy.seen.clear()
    data.shard(0)
    assert s3.proxy.asked("GET", "00000.tar")[0].first in (0, BLOCK)  # what came of the same version is good


def test_another_set_at_the_address_is_another_folder_in_the_cache(s3, address, packed, tmp_path):
    with ShardSet(address, cache=tmp_path / "cache") as data, ShardSet(packed) as local:
        assert same_batches(data, local)
    other = write_set(tmp_path / "other", images=200)
    s3.put_set(other)
    with ShardSet(address, cache=tmp_path / "cache") as data, ShardSet(other) as local:
        assert same_batches(data, local)
    assert len(list((tmp_path / "cache").glob("*/"))) == 2


def test_what_is_not_there_or_refused_is_one_line(s3, address, tmp_path, monkeypatch):
    def refused(place: str, error: type[DermscaleError], *words: str) -> None:
        with pytest.raises(error) as caught:
            ShardSet(place, cache=tmp_path)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(place)
        assert all(word in str(caught.value) for word in words), caught.value

    refused("s3://bucket/nothing", DataError, "is not there")
    refused("s3://nobucket/set", DataError, "is not there")
    refused(f"{s3.url}/nothing", DataError, "is not there")
    refused("nosuch://bucket/set", UsageError, "Protocol not known")
    refused("abfs://bucket/set", UsageError, "nstall adlfs")
    refused("http://127.0.0.1:1/set", DataError, "gave up")
    s3.proxy.plan("HEAD .*manifest", "status:403:AccessDenied")
    refused(address, DataError, "access is refused")
    s3.proxy.plan("GET .*manifest", "status:403:RequestTimeTooSkewed")
    refused(address, DataError, "set the clock")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    refused(address, DataError, "no credentials", "FSSPEC_S3_ANON")


def test_a_killed_fetch_goes_on_where_it_was(s3, address, packed, tmp_path):
    s3.proxy.plan("GET .*00000.tar", "", times=4)
    s3.proxy.plan("GET .*00000.tar", "stall:5000")
    process = child("ShardSet(args[0], cache=args[1]).shard(0)", address, tmp_path)
    wait_for(lambda: parts(tmp_path) and len(s3.proxy.asked("GET", "00000.tar")) == 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    have = parts(tmp_path)[0].stat().st_size
    assert have == 4 * BLOCK and not tars(tmp_path)
    s3.proxy.release.set()
    s3.proxy.seen.clear()
    with ShardSet(address, cache=tmp_path) as data:
        assert bytes(data.shard(0)) == (packed / "shard-00000.tar").read_bytes()
    assert s3.proxy.asked("GET", "00000.tar")[0].first == have


def test_processes_that_fetch_at_once_fetch_each_shard_once(s3, address, tmp_path):
    s3.proxy.plan("GET .*tar", "slow:0.02", times=1000)
    code = "data = ShardSet(args[0], cache=args[1])\nfor number in map(int, args[2:]): data.shard(number)"
    processes = [child(code, address, tmp_path, *order) for order in ((0, 1, 2, 3), (0, 3, 2, 1), (2, 1, 0, 3))]
    for process in processes:
        assert process.wait(60) == 0, process.stderr and process.stderr.read()
    for info in ShardSet(address, cache=tmp_path).manifest.shards:
        assert len({one.first for one in s3.proxy.asked("GET", info.file)}) == -(-info.bytes // BLOCK)
        assert len(s3.proxy.asked("GET", info.file)) == -(-info.bytes // BLOCK)
    assert len(tars(tmp_path)) == 4 and not parts(tmp_path)


# ------------------------------------------------------------------ the cache


def test_what_was_not_used_for_longest_leaves_and_never_what_is_in_use(s3, address, tmp_path):
    with ShardSet(address, cache=tmp_path) as data:
        sizes = [info.bytes for info in data.manifest.shards]
        wanteds = [wanted(data, number) for number in range(4)]
    index = next(tmp_path.glob("*/index.parquet"))
    limit = (sizes[0] + sizes[1] + sizes[2]) / 1e9  # not the index too
    small = CachedSet(address, tmp_path, limit)

    def use(number: int) -> None:
        small.opened(wanteds[number]).close()
        time.sleep(0.02)

    use(1), use(2), use(1)
    use(0)  # the index leaves
    assert tars(tmp_path) == ["shard-00000.tar", "shard-00001.tar", "shard-00002.tar"] and not index.exists()
    use(3)  # 2 and 1 have less room than it needs; 0 was used last
    assert "shard-00002.tar" not in tars(tmp_path) and "shard-00000.tar" in tars(tmp_path)
    for file in tmp_path.glob("*/*"):
        file.unlink()
    with ShardSet(address, cache=tmp_path) as data:
        view = data.shard(0)
        for number in (1, 2, 3):
            use(number)
        assert "shard-00000.tar" in tars(tmp_path)
        with pytest.raises(DataError, match=r"in use.* set DERMSCALE_CACHE_GB to"):
            CachedSet(address, tmp_path, sizes[0] / 1e9).opened(wanteds[1] if not _there(tmp_path, 1) else wanteds[2])
        assert "shard-00000.tar" in tars(tmp_path)
        content = bytes(view)
    del view, data
    assert len(content) == sizes[0]
    CachedSet(address, tmp_path, sizes[0] / 1e9).opened(wanteds[1]).close()


def _there(cache: Path, number: int) -> bool:
    return f"shard-0000{number}.tar" in tars(cache)


def test_a_selection_that_the_cache_cannot_hold_is_refused_before_anything_is_fetched(s3, address, tmp_path):
    with ShardSet(address, cache=tmp_path, cache_gb=0.0014) as data:
        Loader(data.select("train"), batch_size=8)
        with pytest.raises(UsageError, match=r"0\.00164 GB .*at most 0\.0014 GB; set DERMSCALE_CACHE_GB to 0\.1"):
            Loader(data.select("test"), batch_size=8, train=False)
    assert not s3.proxy.asked("GET", ".tar")


def test_the_environment_chooses_the_cache(s3, address, tmp_path, monkeypatch):
    monkeypatch.setenv("DERMSCALE_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("DERMSCALE_CACHE_GB", "0.001")
    with ShardSet(address) as data:
        assert data.path.parent == tmp_path / "here"
        with pytest.raises(UsageError, match=r"at most 0\.001 GB"):
            Loader(data.select("train"), batch_size=8)
    for wrong in ("much", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("DERMSCALE_CACHE_GB", wrong)
        with pytest.raises(UsageError, match=f"DERMSCALE_CACHE_GB {wrong}: must be a number of GB above 0"):
            ShardSet(address)


def test_a_shared_cache_takes_the_permissions_of_its_folder(s3, address, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o2775)
    before = os.umask(0o077)
    try:
        with ShardSet(address, cache=cache) as data:
            data.shard(3)
    finally:
        os.umask(before)
    assert data.path.stat().st_mode & 0o7777 == 0o2775
    assert {file.stat().st_mode & 0o777 for file in (*data.path.iterdir(), cache / ".lock")} == {0o664}


def test_processes_with_a_small_cache_stay_within_it_and_read_whole_files(s3, address, packed, tmp_path):
    sizes = {file.name: file.stat().st_size for file in packed.glob("*.tar")}
    limit = 3 * max(sizes.values())  # each of two processes uses one, while another one is fetched
    code = """
import hashlib, random
cached = store.CachedSet(args[0], args[1], float(args[2]))
from shards.format import Manifest
infos = Manifest.from_bytes(cached.manifest, "").shards
draw = random.Random(args[3])
for _ in range(25):
    info = draw.choice(infos)
    with cached.opened(store.Wanted(info.file, info.sha256, info.bytes)) as file:
        assert hashlib.sha256(file.read()).hexdigest() == info.sha256
"""
    processes = [child(code, address, tmp_path / "cache", limit / 1e9, seed) for seed in range(2)]
    most = 0
    while any(process.poll() is None for process in processes):
        found = {}  # by inode: a file may be renamed while they are listed
        for _, size, file in store._files(tmp_path / "cache"):
            with suppress(FileNotFoundError):
                found[file.stat().st_ino] = size
        most = max(most, sum(found.values()))
    for process in processes:
        assert process.wait() == 0, process.stderr and process.stderr.read()
    assert 0 < most <= limit


# ------------------------------------------------------------------ the commands


def test_a_run_on_a_store_is_that_on_the_folder(s3, tiny_shards, whole, tmp_path, monkeypatch):
    from tests.support.train_runs import assert_same_run, small
    from train.inference.neighbours import training_selection
    from train.loop import train_once

    monkeypatch.setenv("DERMSCALE_CACHE", str(tmp_path / "cache"))
    place = s3.put_set(tiny_shards, "tiny")
    train_once(small(place), tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)
    selection = training_selection(tmp_path / "run")
    assert selection.data.address == place and len(selection) == 72


def test_a_run_is_tested_on_a_set_in_a_store(s3, tiny_shards, whole, tmp_path, monkeypatch, command):
    from train import evaluate

    monkeypatch.setenv("DERMSCALE_CACHE", str(tmp_path / "cache"))
    place = s3.put_set(tiny_shards, "tiny")
    options = ("--run", whole, "--device", "cpu", "--out")
    for data, out in ((place, tmp_path / "store"), (tiny_shards, tmp_path / "folder")):
        code, _, errors = command(evaluate.main, *options, out, "--data", data)
        assert code == 0, errors
    ours, theirs = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("store", "folder"))
    assert ours == theirs and ours["data"]["name"] == "tiny"


@pytest.mark.slow
def test_a_grid_trains_on_a_store(s3, tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("DERMSCALE_CACHE", str(tmp_path / "cache"))
    place = s3.put_set(tiny_shards, "tiny")
    options = "--models test_resnet --fractions 0.5,1 --seeds 0 --epochs 1 --batch-size 16 --resolution 32 --device cpu"
    command = [sys.executable, "-m", "train.grid", "--data", place, "--out", tmp_path / "study", *options.split()]
    done = subprocess.run([*command, "--compile", "off"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "study" / "results.csv").read_text().count("\n") == 3
    gets = s3.proxy.asked("GET", "shard-00000.tar")
    assert len(gets) == len({one.first for one in gets}) > 0  # once, though a grid has several processes


def test_a_set_of_a_store_is_sent_to_other_processes_with_its_cache(s3, address, tmp_path):
    import pickle

    with ShardSet(address, cache=tmp_path, cache_gb=0.5) as data, pickle.loads(pickle.dumps(data)) as other:
        assert other.path == data.path and other.opened_with == data.opened_with
    s3.put_set(write_set(tmp_path / "other", images=60))
    with pytest.raises(DataError, match="holds another shard set"):
        pickle.loads(pickle.dumps(data))


def test_a_file_that_was_damaged_in_the_cache_is_named_with_what_to_do(s3, address, tmp_path):
    with ShardSet(address, cache=tmp_path) as data:
        data.shard(0)
    tar = data.path / "shard-00000.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    with ShardSet(address, cache=tmp_path) as data, pytest.raises(DataError, match=f"remove {data.path} and start"):
        data.read(0)
    tar.write_bytes(b"short")
    with ShardSet(address, cache=tmp_path) as data, pytest.raises(DataError, match=f"5 bytes.*remove {data.path} and"):
        data.read(0)
