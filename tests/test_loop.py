"""A run as a whole: exact resume, stopping, what it writes, what it refuses."""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from shards import ShardSet
from shards.errors import DataError, DermscaleError, UsageError
from shards.format import CLASSES
from tests.train_runs import assert_same_run, child_environment, losses, small, start_worker, weights
from train import device as devices
from train import loop
from train.config import Config
from train.distributed import World
from train.loop import Stopped, train_once
from train.metrics import balanced_accuracy
from train.record import environment, read_decisions
from train.result import used_temperature
from train.results import finished
from train.workspace import Workspace

PLAIN = {}
"""SGD, batch norm."""
RICH = {"model": "test_vit_relpos", "loss": "class-weighted", "ema": 0.9, "resolution": 32}
"""AdamW, dropout, clipping, class weights, averaged weights."""
RAMP = {"resolution": 96, "start_resolution": 32, "ema": 0.5, "precision": "bf16"}


class Crash(Exception):  # noqa: N818
    """Stands for a process that ends without warning."""


def at(call: int, action):
    """A `stop` that does `action` when asked for the `call`-th time."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return action() if asked == call else False

    return stop


def crash() -> bool:
    raise Crash


@pytest.fixture(scope="module")
def whole(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of `small`."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_once(small(tiny_shards), out)
    return out


# ------------------------------------------------------------------ resume


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


def test_checkpoints_seldom_written_change_nothing(tiny_shards: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        train_once(small(tiny_shards, checkpoint_s=1e6), tmp_path / "run", stop=at(6, crash))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    train_once(small(tiny_shards, checkpoint_s=1e6), tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


@pytest.fixture
def killed(tiny_shards: Path, tmp_path: Path) -> Iterator[tuple[Config, Path, dict[str, Any]]]:
    """A run that leaves all to `auto`, killed before its first checkpoint: settings, folder and environment.json."""
    threads = torch.get_num_threads()
    config = small(tiny_shards, epochs=1, checkpoint_s=1e6, precision="auto", compile="auto", engine="auto")
    with pytest.raises(Crash):
        train_once(config, tmp_path / "run", stop=at(1, crash))
    yield config, tmp_path / "run", json.loads((tmp_path / "run" / "environment.json").read_text())
    torch.set_num_threads(threads)


def decided_otherwise(environment: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Decisions that no start on this machine would come to."""
    taken = {name: one["value"] for name, one in environment["decisions"].items()}
    other = {
        "compile": "on",
        "engine": "resident" if taken["engine"] == "native" else "native",
        "precision": "bf16" if taken["precision"] == "fp32" else "fp32",
        "threads": "1" if taken["threads"] != "1" else "2",
    }
    return {name: {"value": value, "reason": "decided before"} for name, value in other.items()}


def test_killed_before_its_first_checkpoint_a_run_keeps_its_decisions(
    killed: tuple[Config, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out, environment = killed
    assert not (out / "checkpoint.pt").exists()
    environment["decisions"] = decided_otherwise(environment)
    (out / "environment.json").write_text(json.dumps(environment))

    def anew(*_: object) -> None:
        pytest.fail("decided anew")

    monkeypatch.setattr("train.prepare._decide_to_compile", anew)
    monkeypatch.setattr("train.prepare._try_out", anew)
    monkeypatch.setattr("train.compiling.warm_up", lambda *_: None)
    monkeypatch.setattr(Workspace, "compiled", lambda workspace, sizes: workspace._net)
    result = train_once(config, out, resume=True)
    assert result["decisions"] == environment["decisions"]
    assert json.loads((out / "environment.json").read_text())["decisions"] == environment["decisions"]
    assert str(torch.get_num_threads()) == environment["decisions"]["threads"]["value"]


@pytest.mark.parametrize(
    "changes",
    [
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
    assert read_decisions(tmp_path, here) == {name: (value, "why") for name, value in taken.items()}
    if "decision" in changes:
        name, value = changes["decision"]
        before["decisions"][name]["value"] = value
    else:
        before |= changes
    path.write_text(json.dumps(before))
    assert read_decisions(tmp_path, here) is None


@pytest.mark.parametrize("content", [None, b"[]", b"\xff"], ids=str)
def test_a_damaged_record_of_decisions_has_them_taken_anew(
    killed: tuple[Config, Path, dict[str, Any]], content: bytes | None
) -> None:
    config, out, environment = killed
    if content is None:
        (out / "environment.json").unlink()
    else:
        (out / "environment.json").write_bytes(content)
    assert {k: v["value"] for k, v in train_once(config, out, resume=True)["decisions"].items()} == {
        k: v["value"] for k, v in environment["decisions"].items()
    }


def test_stop_writes_a_checkpoint_and_says_how_to_go_on(tiny_shards: Path, whole: Path, tmp_path: Path) -> None:
    config = small(tiny_shards, checkpoint_s=1e6)
    for call in (2, 4):  # within an epoch, and then within an evaluation
        with pytest.raises(Stopped, match="--resume") as stopped:
            train_once(config, tmp_path / "run", resume=call > 2, stop=at(call, lambda: True))
        assert stopped.value.exit_code == 143
    train_once(config, tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_sigterm_writes_a_checkpoint_and_exits(tiny_shards: Path, tmp_path: Path) -> None:
    arguments = [
        "--model",
        "test_resnet",
        "--data",
        str(tiny_shards),
        "--out",
        str(tmp_path / "run"),
        "--epochs",
        "500",
    ]
    arguments += ["--batch-size", "16", "--resolution", "32", "--device", "cpu", "--precision", "fp32"]
    with subprocess.Popen(
        [sys.executable, "-m", "train.run", *arguments, "--compile", "off"],
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


# ------------------------------------------------------------------ shared worker


@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_a_run_in_a_shared_worker_equals_its_run_alone(tiny_shards: Path, tmp_path: Path, compiled: str) -> None:
    shared = Workspace()
    for seed in (1, 0):
        train_once(small(tiny_shards, seed=seed, compile=compiled), tmp_path / f"shared{seed}", workspace=shared)
    train_once(small(tiny_shards, seed=0, compile=compiled), tmp_path / "alone")
    assert_same_run(tmp_path / "alone", tmp_path / "shared0")
    assert losses(tmp_path / "shared0") != losses(tmp_path / "shared1")
    decided = json.loads((tmp_path / "alone" / "result.json").read_text())["decisions"]["compile"]
    assert decided["value"] == compiled, decided


# ------------------------------------------------------------------ what is written


def test_the_run_folder_is_whole_and_true(tiny_shards: Path, whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert {"config.json", "environment.json", "metrics.jsonl", "checkpoint.pt", "log.txt"} <= names
    assert {"model.safetensors", "predictions.parquet", "result.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in weights(whole) if "_orig_mod" in name or "module." in name]
    result = json.loads((whole / "result.json").read_text())
    data = ShardSet(tiny_shards)
    assert result["images"] == {split: len(data.select(split)) for split in ("train", "val", "test")}
    assert result["steps"] == 8
    assert set(result["seconds"]) == {"start", "compile", "train", "eval", "save"}
    assert result["img_per_s"] > 0
    assert 0 <= result["data_wait_fraction"] <= 1
    epochs = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in epochs if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert epochs[0]["loss"] == pytest.approx(np.mean(losses(whole)[:4]))


def test_metrics_are_told_at_the_training_prior_too(tiny_shards: Path, whole: Path, tmp_path: Path) -> None:
    result = json.loads((whole / "result.json").read_text())
    counts = np.array(list(result["training_images_per_class"].values()), float)
    table = pd.read_parquet(whole / "predictions.parquet").query("split == 'test'")
    called = table[[f"logit_{dx}" for dx in CLASSES]].to_numpy() + np.log(counts / counts.sum())
    right = float((called.argmax(axis=1) == table["label"].to_numpy()).mean())
    other = result["test_training_prior"]
    assert (result["test"]["prior"], other["prior"]) == ("balanced", "training")
    assert other["accuracy"]["value"] == pytest.approx(right)
    assert set(other) == set(result["test"]) and other["temperature_scaling"] is not None
    row = finished(result, small(tiny_shards).to_dict(), "cell")
    for end, key in (("", "value"), ("_low", "low"), ("_high", "high")):
        for name in ("accuracy", "macro_f1", "expected_calibration_error"):
            assert row[f"{name}_training_prior{end}"] == other[name][key]
            assert row[f"{name}{end}"] == result["test"][name][key]
    config = small(tiny_shards, loss="plain", epochs=1)
    plain = train_once(config, tmp_path / "plain")
    assert plain["test"]["prior"] == "training" and plain["test_training_prior"] == plain["test"]
    assert not [name for name in finished(plain, config.to_dict(), "cell") if "training_prior" in name]


def test_predictions_hold_each_val_and_test_image_once(tiny_shards: Path, whole: Path) -> None:
    table = pd.read_parquet(whole / "predictions.parquet")
    data = ShardSet(tiny_shards)
    expected = [image for split in ("val", "test") for image in data.select(split).image_ids]
    assert table["image_id"].tolist() == expected
    classes = data.manifest.classes
    assert list(table.columns) == ["image_id", "lesion_id", "split", "label"] + [
        f"{kind}_{dx}" for kind in ("logit", "prob") for dx in classes
    ]
    logits = torch.tensor(table[[f"logit_{dx}" for dx in classes]].to_numpy())
    result = json.loads((whole / "result.json").read_text())
    temperature = used_temperature(result["test"])
    expected = (logits.double() / temperature).softmax(1)
    np.testing.assert_allclose(table[[f"prob_{dx}" for dx in classes]], expected, rtol=0, atol=1e-6)
    about = {k.decode(): v.decode() for k, v in pq.read_schema(whole / "predictions.parquet").metadata.items()}
    assert about == {"prior": "balanced", "temperature": repr(temperature)}
    test = (table["split"] == "test").to_numpy()
    score = balanced_accuracy(logits.numpy()[test], table["label"].to_numpy()[test])
    assert json.loads((whole / "result.json").read_text())["test"]["balanced_accuracy"]["value"] == pytest.approx(score)


def test_saved_weights_give_the_saved_predictions(tiny_shards: Path, whole: Path) -> None:
    from shards import Loader
    from train import models

    metadata_net = models.build(
        "test_resnet", 32, 7, (0.0,) * 3, (1.0,) * 3, weights=whole / "model.safetensors"
    ).eval()
    selection = ShardSet(tiny_shards).select("test")
    loader = Loader(selection, batch_size=7, resolution=32, train=False)
    with torch.no_grad():
        parts = [metadata_net(batch.images, batch.colour)[batch.mask] for batch in loader]
    loader.close()
    table = pd.read_parquet(whole / "predictions.parquet").query("split == 'test'")
    logits = table[[name for name in table.columns if name.startswith("logit_")]].to_numpy()
    np.testing.assert_allclose(torch.cat(parts).numpy(), logits, rtol=0, atol=1e-4)


def test_steps_instead_of_epochs(tiny_shards: Path, tmp_path: Path) -> None:
    result = train_once(small(tiny_shards, steps=6), tmp_path / "run")
    assert (result["steps"], result["epochs"], len(losses(tmp_path / "run"))) == (6, 2, 6)


# ------------------------------------------------------------------ what is refused


def test_a_loss_that_is_no_number_names_its_step(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_backward = loop.Run.backward
    calls = []

    def backward(self, batch, *rest):
        calls.append(1)
        return true_backward(self, batch, *rest) * (math.nan if len(calls) >= 6 else 1.0)

    monkeypatch.setattr(loop.Run, "backward", backward)
    with pytest.raises(DermscaleError, match=r"loss is nan at step 5 \(epoch 2.*--lr"):
        train_once(small(tiny_shards, checkpoint_s=1e6), tmp_path / "run")
    assert len(calls) == 8  # it was noticed when the losses were fetched, at the end of the epoch


def test_a_diverging_run_ends_in_one_line(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DermscaleError, match="at step"):
        train_once(small(tiny_shards, lr=1e30), tmp_path / "run")


def test_a_folder_that_holds_a_run_is_not_touched_without_resume(
    tiny_shards: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="--resume"):
        train_once(small(tiny_shards), whole)
    with pytest.raises(UsageError, match="seed: 0, now 1"):
        train_once(small(tiny_shards, seed=1), whole, resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="other files"):
        train_once(small(tiny_shards), tmp_path, resume=True)


def test_two_runs_cannot_share_a_folder(tiny_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def second() -> bool:
        with pytest.raises(DataError, match="another process"):
            train_once(small(tiny_shards), out, resume=True)
        return True

    with pytest.raises(Stopped):
        train_once(small(tiny_shards), out, stop=at(2, second))


def test_a_damaged_checkpoint_is_named(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train_once(small(tiny_shards), tmp_path / "run", stop=at(2, lambda: True))
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"checkpoint\.pt: damaged"):
        train_once(small(tiny_shards), tmp_path / "run", resume=True)


def test_a_full_disk_leaves_the_old_checkpoint(tiny_shards: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train_once(small(tiny_shards, checkpoint_s=1e6), out, stop=at(3, lambda: True))
    (out / ".checkpoint.pt.partial").symlink_to("/dev/full")  # every write to it fails as on a full disk
    with pytest.raises(OSError, match="No space left") as error:
        train_once(small(tiny_shards, checkpoint_s=0), out, resume=True)
    assert "checkpoint.pt" in str(error.value.filename)
    (out / ".checkpoint.pt.partial").unlink()
    train_once(small(tiny_shards), out, resume=True)
    assert_same_run(whole, out)


def test_a_batch_larger_than_the_training_set_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="72 images"):
        train_once(small(tiny_shards, batch_size=73), tmp_path / "run")
    with pytest.raises(UsageError, match="batch norm needs 2"):
        train_once(small(tiny_shards, batch_size=1), tmp_path / "run", world=World())
    assert not (tmp_path / "run").exists()


def test_a_compiler_that_fails_is_replaced_by_eager(
    tiny_shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the compiler broke")

    monkeypatch.setattr("train.compiling.warm_up", broken)
    result = train_once(small(tiny_shards, compile="on"), tmp_path / "run")
    assert result["decisions"]["compile"] == {"value": "off", "reason": "compiling failed: the compiler broke"}
    assert_same_run(whole, tmp_path / "run")


def test_no_compiler_means_eager(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.compiling.compiler", lambda: None)
    result = train_once(small(tiny_shards, compile="on", epochs=1), tmp_path / "run")
    assert result["decisions"]["compile"]["value"] == "off"
    assert "no C++ compiler" in result["decisions"]["compile"]["reason"]
