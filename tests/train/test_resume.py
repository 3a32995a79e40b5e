"""A run that dies or is stopped anywhere is resumed to the same bits, with the decisions of its first start."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shards import ShardSet
from shards.common.errors import DataError, UsageError
from tests.support.parity import change_manifest
from tests.support.train_runs import assert_same_run, at, child_environment, small, start_worker
from train import checkpoint
from train import device as devices
from train.device import Decision
from train.loop import Stopped, train_once
from train.record import environment, read_decisions

PLAIN = {}
"""SGD, batch norm."""
RICH = {"model": "test_vit_relpos", "loss": "class-weighted", "ema": 0.9, "resolution": 32}
"""AdamW, dropout, clipping, class weights, averaged weights."""
RAMP = {"resolution": 96, "start_resolution": 32, "ema": 0.5, "precision": "bf16"}


class Crash(Exception):  # noqa: N818
    """Stands for a process that ends without warning."""


def crash() -> bool:
    raise Crash


# ------------------------------------------------------------------ the same bits


# 8 steps, and 2 batches of each evaluation: `stop` is asked 16 times, and each is a place to die
@pytest.mark.parametrize(
    ("changes", "calls"), [(PLAIN, (1, 4, 6, 12, 15)), (RICH, (3, 8)), (RAMP, (4, 11))], ids=["plain", "rich", "ramp"]
)
def test_crashed_anywhere_and_resumed_ends_in_the_same_bits(
    tiny_shards: Path, tmp_path: Path, changes: dict, calls: tuple[int, ...]
) -> None:
    config = small(tiny_shards, **changes)
    train_once(config, tmp_path / "whole")
    for call in calls:
        out = tmp_path / str(call)
        with pytest.raises(Crash):
            train_once(config, out, stop=at(call, crash))
        torch.rand(3)  # a new process would not have this one's random state
        train_once(config, out, resume=True)
        assert_same_run(tmp_path / "whole", out)


def test_killed_with_sigkill_and_resumed_ends_in_the_same_bits(tiny_shards: Path, whole: Path, tmp_path: Path) -> None:
    order = {"config": small(tiny_shards).to_dict(), "out": str(tmp_path / "run"), "kill_at": 3}
    assert start_worker(order).wait(120) == -signal.SIGKILL
    assert start_worker(order | {"kill_at": 4, "resume": True}).wait(120) == -signal.SIGKILL
    train_once(small(tiny_shards), tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_stop_writes_a_checkpoint_and_says_how_to_go_on(tiny_shards: Path, whole: Path, tmp_path: Path) -> None:
    config = small(tiny_shards, checkpoint_s=1e6)
    for call in (2, 4):  # within an epoch, and then within an evaluation
        with pytest.raises(Stopped, match="--resume") as stopped:
            train_once(config, tmp_path / "run", resume=call > 2, stop=at(call, lambda: True))
        assert stopped.value.exit_code == 143
    train_once(config, tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("unwanted", [(), ("checkpoint.pt",)], ids=["kept", "unwanted"])
def test_the_end_of_training_is_saved_only_where_its_checkpoint_stays(
    tiny_shards: Path, whole: Path, tmp_path: Path, unwanted: tuple[str, ...]
) -> None:
    config, path = small(tiny_shards, checkpoint_s=1e6), tmp_path / "run" / "checkpoint.pt"
    with pytest.raises(Crash):  # in the second batch of the test split
        train_once(config, path.parent, stop=at(16, crash), unwanted=unwanted)
    assert path.exists() == (not unwanted)
    with pytest.raises(Stopped):  # where all of training is still to be done, and where none is
        train_once(config, path.parent, resume=True, stop=at(16 if unwanted else 4, lambda: True), unwanted=unwanted)
    assert torch.load(path, weights_only=True)["progress"]["epoch"] == 2
    train_once(config, path.parent, resume=True, unwanted=unwanted)
    assert_same_run(whole, path.parent)


def test_a_checkpoint_that_is_due_at_the_end_of_training_is_written(tiny_shards: Path, tmp_path: Path) -> None:
    train_once(small(tiny_shards, checkpoint_s=0), tmp_path / "run", unwanted=("checkpoint.pt",))
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["progress"]["epoch"] == 2


def test_sigterm_writes_a_checkpoint_and_exits(tiny_shards: Path, tmp_path: Path) -> None:
    options = "--model test_resnet --epochs 500 --batch-size 16 --resolution 32 --device cpu --compile off"
    folders = ["--data", str(tiny_shards), "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        [sys.executable, "-m", "train.run", *options.split(), *folders],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("epoch"):
                break
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        errors = process.stderr.read()
        assert process.wait(60) == 143, errors
    assert "--resume" in rest.splitlines()[-1]
    assert "Traceback" not in errors
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] >= 4


def test_a_finished_run_is_not_trained_again(tiny_shards: Path, whole: Path) -> None:
    before = (whole / "model.safetensors").stat().st_mtime_ns
    assert train_once(small(tiny_shards), whole, resume=True)["steps"] == 8
    assert (whole / "model.safetensors").stat().st_mtime_ns == before


# ------------------------------------------------------------------ the same decisions


def decided_otherwise(environment: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Decisions that no start on this machine would make."""
    taken = {name: one["value"] for name, one in environment["decisions"].items()}
    other = {
        "compile": "on",
        "engine": "resident" if taken["engine"] == "native" else "native",
        "precision": "bf16" if taken["precision"] == "fp32" else "fp32",
        "threads": "1" if taken["threads"] != "1" else "2",
    }
    return {name: {"value": value, "reason": "decided before"} for name, value in other.items()}


def test_killed_before_its_first_checkpoint_a_run_keeps_its_decisions(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, out = torch.get_num_threads(), tmp_path / "run"
    config = small(tiny_shards, epochs=1, checkpoint_s=1e6, precision="auto", compile="auto", engine="auto")
    with pytest.raises(Crash):
        train_once(config, out, stop=at(1, crash))
    assert not (out / "checkpoint.pt").exists()
    environment = json.loads((out / "environment.json").read_text())
    environment["decisions"] |= decided_otherwise(environment)
    (out / "environment.json").write_text(json.dumps(environment))

    def again(*_: object) -> None:
        pytest.fail("decided again")

    monkeypatch.setattr("train.compiling.choose", again)
    monkeypatch.setattr("train.compiling.faster", again)
    monkeypatch.setattr("train.compiling.warm_up", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda net, **_: net)
    try:
        result = train_once(config, out, resume=True)
        assert str(torch.get_num_threads()) == environment["decisions"]["threads"]["value"]
    finally:
        torch.set_num_threads(threads)
    assert result["decisions"] == environment["decisions"]
    assert json.loads((out / "environment.json").read_text())["decisions"] == environment["decisions"]


@pytest.mark.parametrize(
    "changes",
    [
        *({"content": content} for content in (b"", b"[]", b"\xff")),
        {"cores": 4096},
        {"device_name": "another CPU, 2 threads"},
        {"versions": {}},
        {"world_size": 3},
        {"decisions": []},
        {"decisions": {"compile": {"value": "off", "reason": ""}}},
        *({"decision": (name, "auto")} for name in ("compile", "engine", "precision", "threads")),
        {"decision": ("engine", ["native"])},
        {"decision": ("threads", "0")},
    ],
    ids=str,
)
def test_decisions_that_are_damaged_or_of_another_machine_are_not_kept(
    tmp_path: Path, tiny_shards: Path, changes: dict[str, Any]
) -> None:
    with ShardSet(tiny_shards) as data:
        here = environment(data, devices.environment(torch.device("cpu")), {}, 1)
    taken = {"compile": "off", "engine": "native", "precision": "fp32", "threads": "2"}
    before = here | {"decisions": {name: {"value": value, "reason": "why"} for name, value in taken.items()}}
    path = tmp_path / "environment.json"
    path.write_text(json.dumps(before | {"host": "renamed", "started": "before"}))
    assert read_decisions(tmp_path, here) == {name: Decision(value, "why") for name, value in taken.items()}
    if "decision" in changes:
        name, value = changes["decision"]
        before["decisions"][name]["value"] = value
    else:
        before |= {name: value for name, value in changes.items() if name != "content"}
    path.write_bytes(changes.get("content", json.dumps(before).encode()))
    assert read_decisions(tmp_path, here) == {}
    path.unlink()
    assert read_decisions(tmp_path, here) == {}


@pytest.mark.parametrize("world_size", [1, 2])
def test_with_a_checkpoint_too_decisions_are_kept_only_where_they_were_taken(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    config, out, threads = small(tiny_shards, epochs=1), tmp_path / "run", torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)  # as torchrun, which gives each process one
        with pytest.raises(Stopped):
            train_once(config, out, stop=at(2, lambda: True))
        torch.set_num_threads(threads)
        environment = json.loads((out / "environment.json").read_text())
        (out / "environment.json").write_text(json.dumps(environment | {"world_size": world_size}))
        if world_size == 2:  # the new decision may be fp16, and the checkpoint has no state of its scaler
            monkeypatch.setattr(devices, "scaler", lambda *_: torch.amp.GradScaler("cpu", init_scale=2.0))
        taken = train_once(config, out, resume=True)["decisions"]
        assert taken["threads"]["value"] == str(threads + (world_size == 1))
        assert (taken == environment["decisions"]) == (world_size == 1)
        log = (out / "log.txt").read_text().split("continuing at step")[1]
        assert f"threads: {taken['threads']['value']} ({taken['threads']['reason']})" in log
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------ the checkpoint


def test_a_disk_that_fills_up_within_a_checkpoint_is_the_systems_error(tmp_path: Path) -> None:
    """torch then raises an error of its own, which names neither the disk nor the file."""
    checkpoint.save(tmp_path, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as error:
            checkpoint.save(tmp_path, {"step": 2, "weights": torch.zeros(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.filename == str(tmp_path / "checkpoint.pt")
    state = checkpoint.load(tmp_path)
    assert state is not None and state["step"] == 1


def test_a_damaged_checkpoint_is_named(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train_once(small(tiny_shards), tmp_path / "run", stop=at(2, lambda: True))
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"checkpoint\.pt: damaged"):
        train_once(small(tiny_shards), tmp_path / "run", resume=True)


def test_a_run_goes_on_only_with_the_normalisation_and_encoding_that_it_began_with(
    tiny_shards: Path, whole: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(tiny_shards, tmp_path / "data"))
    config, out = small(data), tmp_path / "run"
    with pytest.raises(Stopped):
        train_once(config, out, stop=at(2, lambda: True))
    original = (data / "manifest.json").read_bytes()
    for change, words in (
        (lambda m: m.update(std=[0.2, 0.2, 0.3]), r"std \[0\.2, 0\.2, 0\.2\] → \[0\.2, 0\.2, 0\.3\]"),
        (lambda m: m["encode"].update(max_resolution=200), "encode_max_resolution 400 → 200"),
    ):
        change_manifest(data, change)
        with pytest.raises(UsageError, match=words):
            train_once(config, out, resume=True)
        (data / "manifest.json").write_bytes(original)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    names = ("version", "epoch", "batch", "shard_set", "selection", "seed", "batch_size", "train")
    state["loader"] = {name: state["loader"][name] for name in names}
    torch.save(state, out / "checkpoint.pt")  # as an older release wrote it
    train_once(config, out, resume=True)
    assert_same_run(whole, out)


def test_a_full_disk_leaves_the_old_checkpoint(tiny_shards: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train_once(small(tiny_shards, checkpoint_s=1e6), out, stop=at(3, lambda: True))
    (out / ".checkpoint.pt.partial").symlink_to("/dev/full")  # every write to it fails as on a full disk
    with pytest.raises(OSError, match="No space left") as error:
        train_once(small(tiny_shards, checkpoint_s=0), out, resume=True)
    assert error.value.filename == str(out / "checkpoint.pt")
    assert not (out / ".checkpoint.pt.partial").is_symlink()
    train_once(small(tiny_shards), out, resume=True)
    assert_same_run(whole, out)
