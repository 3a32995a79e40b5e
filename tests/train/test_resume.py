"""A run that dies or is stopped anywhere is resumed to the same bits, with the decisions of its first start."""

import copy
import errno
import functools
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shards import ShardSet
from shards.common.errors import DataError, UsageError
from tests.support.parity import change_manifest
from tests.support.train_runs import assert_same_run, at, child_environment, small, start_worker, step_of
from train import checkpoint
from train import device as devices
from train.device import Decision
from train.interrupts import ASKING, asked_to_stop
from train.loop import Stopped, train_once
from train.record import environment, read_decisions
from train.weights import write_weights

PLAIN = {}
"""SGD, batch norm."""
RICH = {"model": "test_vit_relpos", "loss": "class-weighted", "ema": 0.9, "resolution": 32}
RICH |= {"drop_path": 0.3, "layer_decay": 0.8}
"""AdamW, dropout, clipping, class weights, averaged weights, stochastic depth, layer decay."""
MUON = {"optimizer": "muon", "lr": 1e-3, "weight_decay": 0.05, "schedule": "linear", "label_smoothing": 0.1}
MIXED = {"sampler": "balanced", "erasing": 0.5, "mixup": 0.4, "cutmix": 1.0, "resolution": 64, "start_resolution": 32}
RAMP = {"resolution": 96, "start_resolution": 32, "ema": 0.5, "precision": "bf16"}


class Crash(Exception):  # noqa: N818
    """Stands for a process that ends without warning."""


def crash() -> bool:
    raise Crash


# ------------------------------------------------------------------ the same bits


# 8 steps, and 2 batches of each evaluation: `stop` is asked 16 times, and each is a place to die
@pytest.mark.parametrize(
    ("changes", "calls"),
    [(PLAIN, (1, 4, 6, 12, 15)), (RICH, (3, 8)), (MUON, (4,)), (MIXED, (3, 11)), (RAMP, (4, 11))],
    ids=["plain", "rich", "muon", "mixed", "ramp"],
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


def start_long_run(data: Path, out: Path, launcher: tuple[str, ...] = (), **streams: Any) -> subprocess.Popen[str]:
    """Start `train.run` with 500 epochs, and wait until it trains. launcher: a command that starts it."""
    options = "--model test_resnet --epochs 500 --batch-size 16 --resolution 32 --device cpu --compile off"
    process = subprocess.Popen(
        [*launcher, sys.executable, "-m", "train.run", *options.split(), "--data", str(data), "--out", str(out)],
        **{"env": child_environment(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | streams,
    )
    while process.poll() is None and not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size):
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_writes_a_checkpoint_and_exits(tiny_shards: Path, tmp_path: Path, number: int, code: int) -> None:
    with start_long_run(tiny_shards, tmp_path / "run") as process:
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "--resume" in output.splitlines()[-1]
    assert errors == "stopping after this step, with a checkpoint; a second Ctrl-C ends at once, without one\n"
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] >= 4


def test_nohup_outlives_its_terminal_and_ctrl_c_writes_a_checkpoint(tiny_shards: Path, tmp_path: Path) -> None:
    with start_long_run(tiny_shards, tmp_path / "run", ("nohup",)) as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "--resume" in output.splitlines()[-1] and "Traceback" not in errors
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_terminal_that_is_closed_leaves_a_checkpoint(tiny_shards: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with start_long_run(tiny_shards, tmp_path / "run", stdout=theirs) as process:
        os.close(theirs)
        process.send_signal(signal.SIGHUP)
        os.close(ours)  # from now on each write to the terminal fails
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 129, errors
    assert "Traceback" not in errors
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that is ignored stays so; torchrun repeats each signal, so there the second one means nothing new."""
    before = {number: signal.getsignal(number) for number in ASKING}
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    try:
        for second_ends, launched in ((True, False), (True, True), (False, False)):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            if launched:
                monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
            else:
                monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
            asked = asked_to_stop(second_ends)
            signal.raise_signal(signal.SIGHUP)
            assert asked == []
            signal.raise_signal(signal.SIGINT)
            assert asked == [signal.SIGINT]
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            ends = second_ends and not launched
            assert all((signal.getsignal(one) == signal.SIG_DFL) == ends for one in (signal.SIGINT, signal.SIGTERM))
            if not ends:
                signal.raise_signal(signal.SIGTERM)
                assert asked == [signal.SIGINT, signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    monkeypatch.setattr("train.compiling.tried", again)
    monkeypatch.setattr("train.compiling.warm_up", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda net, **_: net)
    try:
        result = train_once(config, out, resume=True)
        assert result["device"].endswith(f", {environment['decisions']['threads']['value']} threads")
        assert torch.get_num_threads() == threads  # of the next run of this process
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
        monkeypatch.setenv("OMP_NUM_THREADS", "as torchrun")
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


def test_another_number_of_threads_is_taken_where_it_is_asked_for_and_said(tiny_shards: Path, tmp_path: Path) -> None:
    config, out, own = small(tiny_shards, threads=1), tmp_path / "run", torch.get_num_threads()
    for more, value, reason in (
        ({}, "1", "asked for"),
        ({"threads": None}, "1", "asked for"),  # it stays
        ({"threads": 2}, "2", "asked for; 1 until now, so the last bits of the weights change"),
    ):
        with pytest.raises(Stopped):
            train_once(replace(config, **more), out, resume=out.exists(), stop=at(2, lambda: True))
        taken = json.loads((out / "environment.json").read_text())["decisions"]["threads"]
        assert (taken["value"], taken["reason"]) == (value, reason)
        assert f"threads: {value} ({reason})" in (out / "log.txt").read_text()
        assert torch.get_num_threads() == own


def test_the_default_is_pytorchs_own_number_within_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    own, set_to = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "available_cores", lambda: own)
    assert devices.use_threads(None) == Decision(str(own), "PyTorch's own choice")
    assert set_to == []
    monkeypatch.setattr(torch, "get_num_threads", lambda: own + 2)
    assert devices.use_threads(None) == Decision(str(own), "the cores that this process may use")
    assert set_to == [own]
    monkeypatch.setenv("OMP_NUM_THREADS", str(own + 2))
    shared = f"this process may use {own} cores, and threads that share one are many times as slow"
    assert devices.use_threads(None) == Decision(str(own + 2), f"PyTorch's own choice; {shared}")
    assert set_to == [own]
    assert devices.use_threads(own + 1) == Decision(str(own + 1), f"asked for; {shared}")


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


def test_no_flipped_bit_of_a_checkpoint_goes_unseen(tmp_path: Path) -> None:
    """PyTorch reads such a file without a word, unless the bit is in its directory or changes a length."""
    checkpoint.save(tmp_path, {"weights": torch.randn(20), "step": 1})
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"checkpoint\.pt: damaged"):
            checkpoint.load(tmp_path)
    for content in (whole[:-1], whole + b"0", whole[:-21], b""):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"damaged, or written by another release; delete it"):
            checkpoint.load(tmp_path)
    path.write_bytes(whole)
    state = checkpoint.load(tmp_path)
    assert state is not None and state["step"] == 1


@pytest.fixture(scope="module")
def checked(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """The arguments of `checkpoint.check` where a run with AdamW goes on after 6 of its 8 steps."""
    out, config = tmp_path_factory.mktemp("checked") / "run", small(tiny_shards, **RICH)
    with pytest.raises(Stopped):
        train_once(config, out, stop=at(8, lambda: True))
    taken: list[Any] = []

    def check(*arguments: Any) -> None:
        checkpoint_check(*arguments)
        taken.extend(arguments)
        raise Crash

    checkpoint_check = checkpoint.check
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(checkpoint, "check", check)
        train_once(config, out, resume=True)
    assert taken[1]["progress"]["step"] == 6
    return tuple(taken)


GONE = object()
NAN = float("nan")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model", GONE, "it lacks model"),
        ("evil", 1, "it has a foreign key evil"),
        ("model", None, "model is no dictionary"),
        ("model.body.head.bias", GONE, "model lacks body.head.bias"),
        ("model.body.head.weight", torch.zeros(3), "model.body.head.weight is not a float32 tensor of shape"),
        ("model.body.head.weight", 3, "model.body.head.weight is not a float32 tensor"),
        ("model.more", torch.zeros(3), "model has a foreign key more"),
        ("average", None, "average is no dictionary"),
        ("progress.epoch", 99, "its epoch is 99, and the run has 2"),
        ("progress.epoch", 1.0, "progress.epoch is 1.0, expected a whole number from 0"),
        ("progress.epoch_step", 3, "its step is 6: not that of step 3 after 1 epochs of 4 steps"),
        ("progress.epoch_step", 9, "its step is 6: not that of step 9"),
        ("progress.step", -1, "progress.step is -1"),
        ("progress.step", True, "progress.step is True"),
        ("progress.train_s", NAN, "progress.train_s is nan"),
        ("progress.train_s", "1", "progress.train_s is '1'"),
        ("progress.loss", GONE, "progress lacks loss"),
        ("progress.seconds.eval", None, "progress.eval is None"),
        ("progress.seconds", 3, "progress.seconds is no dictionary"),
        ("metrics_bytes", -1, "its metrics_bytes are -1"),
        ("metrics_bytes", "all", "metrics_bytes is 'all'"),
        ("normalisation.mean", [0.5, 0.5], "normalisation.mean is not a list of 3"),
        ("random", [], "random is no list"),
        ("random", [{"torch": {"cpu": torch.zeros(3)}}], "cpu is not a uint8 tensor"),
        ("random", [{"numpy": 3}], r"random\[0\] lacks torch"),
        ("optimizer.state", {9999: {}}, "optimizer.state is not of the run's parameters"),
        ("optimizer.state", None, "optimizer.state is not of the run's parameters"),
        ("optimizer.param_groups", [], "optimizer.param_groups is not a list of 2"),
        ("scaler", {"scale": 1.0}, "its scaler has other keys"),
        ("scaler", 3, "its scaler has other keys"),
        ("loader.batch", 3, "its loader is at batch 3 of epoch 1, its step is another"),
        ("loader.batch", GONE, "loader lacks batch"),
        ("loader.epoch", "1", "loader.epoch is '1'"),
    ],
)
def test_a_checkpoint_of_another_content_is_one_line(
    checked: tuple[Any, ...], path: str, value: Any, words: str
) -> None:
    folder, state, *rest = checked
    *parents, name = path.split(".", 2 if path.startswith("progress.seconds.") else 1)
    state = copy.deepcopy(state)
    place = functools.reduce(lambda of, key: of[key], parents, state)
    if value is GONE:
        del place[name]
    else:
        place[name] = value
    with pytest.raises(DataError, match=f"checkpoint.pt: not a state of this run .*{words}") as error:
        checkpoint.check(folder, state, *rest)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_an_older_release_is_one_of_this_run(checked: tuple[Any, ...]) -> None:
    folder, state, *rest = checked
    state = copy.deepcopy(state)
    for name in ("sampler", "augment_interpolation"):
        del state["loader"][name]
    checkpoint.check(folder, state, *rest)


@pytest.mark.parametrize("change", ["slot", "shape", "decay"])
def test_an_optimizers_state_of_another_content_is_one_line(checked: tuple[Any, ...], change: str) -> None:
    folder, state, *rest = checked
    state = copy.deepcopy(state)
    first = state["optimizer"]["state"][0]
    if change == "slot":
        first["momentum_buffer"] = first.pop("exp_avg")
    elif change == "shape":
        first["exp_avg"] = torch.zeros(1)
    else:
        state["optimizer"]["param_groups"][0]["weight_decay"] = 9.0
    words = {"slot": "lacks exp_avg", "shape": "exp_avg is not a float32 tensor", "decay": "weight_decay is not that"}
    with pytest.raises(DataError, match=f"not a state of this run .*{words[change]}"):
        checkpoint.check(folder, state, *rest)


def test_a_state_in_which_muon_has_other_weights_is_one_line(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train_once(small(tiny_shards, **MUON), tmp_path, stop=at(2, lambda: True))
    state = checkpoint.load(tmp_path)
    assert state is not None
    kinds = state["optimizer"]["state"].values()
    assert {one["use_muon"] for one in kinds} == {True, False}
    for one in kinds:
        one["use_muon"] = not one["use_muon"]
    checkpoint.save(tmp_path, {name: value for name, value in state.items() if name != "version"})
    with pytest.raises(
        DataError, match=r"not a state of this run \(optimizer.state\[0\].use_muon is not that of the run"
    ):
        train_once(small(tiny_shards, **MUON), tmp_path, resume=True)


def test_a_run_goes_on_only_with_the_normalisation_of_its_weights(tiny_shards: Path, tmp_path: Path) -> None:
    """The file of the weights is read again, and may be another one by then."""
    net = step_of(small(tiny_shards)).net
    for mean in ("[0.1, 0.2, 0.3]", "[0.3, 0.2, 0.1]"):
        write_weights(tmp_path / "w.safetensors", net.body, {"mean": mean, "std": "[1, 1, 1]"})
        config = small(tiny_shards, weights=str(tmp_path / "w.safetensors"))
        resumed = (tmp_path / "run").exists()
        with pytest.raises(UsageError if resumed else Stopped, match="normalisation" if resumed else "--resume"):
            train_once(config, tmp_path / "run", stop=at(2, lambda: True), resume=resumed)


def test_metrics_that_are_shorter_than_a_checkpoint_knows_are_one_line(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train_once(small(tiny_shards), tmp_path / "run", stop=at(2, lambda: True))
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"metrics\.jsonl: has 0 bytes, and \d+ when the checkpoint was written"):
        train_once(small(tiny_shards), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")], ids=["int", "disk"]
)
def test_ctrl_c_and_a_full_disk_anywhere_in_a_checkpoints_write_leave_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    checkpoint.save(tmp_path, {"step": 1})
    write, left = checkpoint._Hashed.write, [0]

    def interrupted(self: Any, content: bytes) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return write(self, content)

    monkeypatch.setattr(checkpoint._Hashed, "write", interrupted)
    for writes in range(12):
        left[0] = writes
        with pytest.raises((KeyboardInterrupt, OSError)) as raised:
            checkpoint.save(tmp_path, {"step": 2, "weights": torch.zeros(1000)})
        assert (raised.type is KeyboardInterrupt) == (error is KeyboardInterrupt)
    state = checkpoint.load(tmp_path)
    assert state is not None and state["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_result_without_its_content_does_not_make_a_run_finished(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train_once(small(tiny_shards), tmp_path / "run", stop=at(2, lambda: True))
    for content in ("{}", "[]", "null", '{"model": 3}', "{"):
        (tmp_path / "run" / "result.json").write_text(content)
        with pytest.raises(DataError, match=r"result\.json: damaged.*delete it, and continue the run with --resume"):
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
