"""Packing on a Ray cluster of two nodes: the bytes of one machine, also if a node is lost; errors and ends."""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from shards import ShardSet
from tests.preprocess.test_layouts import members_of, write_tar
from tests.preprocess.test_shard import digest
from tests.support.rawdata import write_raw
from tests.support.ray_nodes import TwoNodes, ended, own_folder, ray_processes, start_python, two_nodes
from tests.support.stores import S3, s3_server

SLOWED = """
import sys, time
from pathlib import Path
from preprocess import packing, shard
from shards.common import cli

class Slow(packing.Progress):
    def advance(self, amount):
        super().advance(amount)
        Path(sys.argv[2]).with_name("packed").write_text(str(self.done))
        time.sleep(0.003)

packing.Progress = Slow
cli.run(shard.main)
"""
"""Packs more slowly, so that something can happen meanwhile, and says how far it is in the file `packed`."""


@pytest.fixture(scope="module")
def s3() -> Iterator[S3 | None]:
    """A store whose credentials are in the environment of the nodes; None if its packages are missing."""
    if not (find_spec("s3fs") and find_spec("moto")):
        yield None
        return
    with pytest.MonkeyPatch.context() as monkeypatch, s3_server(monkeypatch) as running:
        yield running


@pytest.fixture(scope="module")
def nodes(s3: S3 | None) -> Iterator[TwoNodes]:
    with two_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw(tmp_path_factory.mktemp("source") / "raw", 1200)


def start(source: Path | str, out: Path | str, *more: str) -> subprocess.Popen[str]:
    program = ["-c", SLOWED] if isinstance(out, Path) else ["-m", "preprocess.shard"]
    line = [*program, "--out", str(out), "--source", str(source), "--shard-mb", "1"]
    return start_python(*line, "--write-mode", "raw", "--max-resolution", "40", *more)


def wait_until_packed(process: subprocess.Popen[str], out: Path, images: int) -> None:
    file = out.with_name("packed")
    while process.poll() is None and not (file.exists() and int(file.read_text() or 0) >= images):
        time.sleep(0.01)


def left_beside(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path.name not in (out.name, "packed"))


@pytest.mark.slow
def test_a_set_is_the_same_to_the_byte_if_workers_and_a_node_are_killed(
    nodes: TwoNodes, raw: Path, tmp_path: Path
) -> None:
    for name in ("local", "ray"):
        (tmp_path / name).mkdir()
    ended(start(raw, tmp_path / "local" / "set"))
    process = start(raw, out := tmp_path / "ray" / "set", "--runner", "ray", "--address", nodes.address)
    wait_until_packed(process, out, 200)
    names = [(one, " ".join(one.cmdline())) for parent in ray_processes() for one in parent.children()]
    workers = [one for one, name in names if name.startswith("ray::") and "Agent" not in name]
    assert workers
    for worker in workers:
        worker.kill()
    wait_until_packed(process, out, 500)
    nodes.kill_second()
    output, _ = ended(process)
    nodes.start_second()
    assert "1,200 images packed" in output
    assert digest(out) == digest(tmp_path / "local" / "set") and len(list(out.glob("*.tar"))) > 4
    assert left_beside(out) == []


@pytest.mark.slow
def test_a_bad_image_and_ctrl_c_leave_nothing(raw: Path, nodes: TwoNodes, tmp_path: Path) -> None:
    there = ("--runner", "ray", "--address", nodes.address)
    spoilt = write_raw(tmp_path / "spoilt")
    bad = sorted(spoilt.rglob("*.jpg"))[40]
    bad.write_bytes(bad.read_bytes()[:200])
    (tmp_path / "sets").mkdir()
    out = tmp_path / "sets" / "set"
    _, errors = ended(start(spoilt, out, *there), 1)
    assert len(errors.splitlines()) == 1 and bad.name in errors and "--on-bad skip" in errors
    assert left_beside(out) == [] and not out.exists()
    with own_folder():
        process = start(raw, out, "--runner", "ray")
        wait_until_packed(process, out, 300)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = ended(process, 130)
        assert "started a Ray cluster on this machine" in output and errors.strip() == "error: interrupted"
        assert not ray_processes()
    assert left_beside(out) == [] and not out.exists()


@pytest.mark.slow
def test_tars_and_a_store_are_as_on_one_machine(
    nodes: TwoNodes, s3: S3 | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a store to a store. With fields of the tars in the index, copies joined, and a fold for test."""
    if s3 is None:
        pytest.skip("needs s3fs and moto (extra dev)")

    def described(number: int) -> list[tuple[str, bytes]]:
        return [("json", json.dumps({"dx": "abc"[number % 3], "score": number / 7}).encode())]

    write_tar(tmp_path / "raw" / "a.tar", members_of(range(300), described))
    write_tar(tmp_path / "raw" / "b.tar", [(f"copy-{n}", data) for n, data in members_of(range(9), described)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    options = ("--join-duplicates", "--split", "3fold:2")
    ended(start(tmp_path / "raw", tmp_path / "local", *options))
    local = ShardSet(tmp_path / "local")
    assert local.manifest.source["joined_duplicates"] >= 9 and local.column("score").dtype == float
    there = ("--runner", "ray", "--address", nodes.address)
    for tar in (tmp_path / "raw").iterdir():
        s3.put(f"raw/{tar.name}", tar.read_bytes())
    ended(start("s3://bucket/raw", "s3://bucket/set", *options, *there))
    found = {name: hashlib.sha256(s3.get(f"set/{name}")).hexdigest() for name in s3.names()}
    assert found == digest(tmp_path / "local") and len(local.manifest.shards) > 3
    assert not list((tmp_path / "home").rglob("*.tar"))
