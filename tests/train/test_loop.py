"""A run as a whole: what it writes, what it refuses, and that a worker's earlier runs do not change it."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pynvml
import pytest
import torch

from shards import Augment, Loader, ShardSet
from shards.common.errors import DataError, DermscaleError, UsageError
from shards.engines import dali
from shards.format import HAM10000
from tests.conftest import write_set
from tests.support.train_runs import Heard, assert_same_run, at, losses, small, weights
from train import device as devices
from train.config import Config
from train.distributed import World
from train.evaluation import used_temperature
from train.inference.predictor import Predictor, read_about
from train.loop import Stopped, train_once
from train.metrics.scores import balanced_accuracy
from train.record import write_predictions
from train.step import TrainingStep
from train.study.table import finished_row
from train.workspace import Workspace

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


def test_later_runs_of_a_worker_find_dalis_pipelines_built(tiny_shards: Path, tmp_path: Path, monkeypatch) -> None:
    built, build = [], dali.build_graph
    monkeypatch.setattr(dali, "build_graph", lambda *args: built.append(args) or build(*args))
    shared, counts = Workspace(), []
    for seed in (1, 0):
        train_once(small(tiny_shards, seed=seed, engine="dali"), tmp_path / f"shared{seed}", workspace=shared)
        counts.append(len(built))
    shared.close()
    assert counts == [2, 2]  # the first run trains with one and evaluates with another meanwhile
    train_once(small(tiny_shards, seed=0, engine="dali"), tmp_path / "alone")
    assert len(built) == 4
    assert_same_run(tmp_path / "alone", tmp_path / "shared0")


def test_a_warning_that_holds_for_every_run_of_a_worker_comes_once(tiny_shards: Path, tmp_path: Path) -> None:
    shared, console = Workspace(), Heard()
    for name in ("first", "second"):
        config = small(tiny_shards, steps=1, resolution=31)  # evaluation crops are 63 px
        train_once(config, tmp_path / name, workspace=shared, console=console)
    assert len(console.warnings) == 1
    assert "63 px" in console.warnings[0]


# ------------------------------------------------------------------ the recipe


def test_the_options_of_augmentation_reach_training_evaluation_and_prediction(
    tiny_shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    monkeypatch.setattr("train.prepare.Loader", lambda *a, **more: used.append(more["augment"]) or Loader(*a, **more))
    changes = {"crop_scale": 0.6, "crop_ratio": 1.0, "colour_jitter": 0.0, "symmetries": False, "eval_crop": 1.0}
    config = small(tiny_shards, steps=2, **changes)
    train_once(config, tmp_path / "run")
    plain = Augment((0.6, 1.0), (1.0, 1.0), False, brightness=0, contrast=0, saturation=0, hue=0, eval_crop=1.0)
    assert used == [plain] * 3
    assert json.loads((tmp_path / "run" / "config.json").read_text()).items() >= changes.items()
    assert Predictor(tmp_path / "run", "cpu").augment.eval_crop == 1.0
    assert losses(tmp_path / "run") != losses(whole)[:2]
    for name, other in {"crop_scale": 0.5, "symmetries": True, "eval_crop": 0.5}.items():
        with pytest.raises(UsageError, match=f"{name}: .*, now {other}"):
            train_once(replace(config, **{name: other}), tmp_path / "run", resume=True)


@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_order_erasing_and_mixing_are_the_same_with_every_engine(
    tiny_shards: Path, whole: Path, tmp_path: Path, compiled: str
) -> None:
    changes = {"sampler": "balanced", "loss": "plain", "erasing": 0.5, "mixup": 0.4, "cutmix": 1.0}
    config = small(tiny_shards, compile=compiled, **changes)
    for engine in ("native", "resident"):
        train_once(replace(config, engine=engine), tmp_path / engine)
    assert_same_run(tmp_path / "native", tmp_path / "resident")
    assert read_about(tmp_path / "native").prior == "balanced"  # as the order was
    assert losses(tmp_path / "native") != losses(whole)


def test_the_loss_knows_how_often_weighted_images_come(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[list[float]] = []

    def step(net: torch.nn.Module, config: Config, drawn: list[float], precision: str) -> TrainingStep:
        counts.append(drawn)
        return TrainingStep(net, config, drawn, precision)

    monkeypatch.setattr("train.prepare.TrainingStep", step)
    train_once(small(tiny_shards, sampler="weighted:label", epochs=1), tmp_path / "run")
    labels = ShardSet(tiny_shards).select("train").labels
    assert counts == [[float(label * (labels == label).sum()) for label in range(7)]]
    assert read_about(tmp_path / "run").prior == "balanced"


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
    assert set(result["seconds"]) == {"start", "compile", "train", "eval", "save", "write"}
    assert result["img_per_s"] > 0
    assert 0 <= result["data_wait_fraction"] <= 1
    epochs = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in epochs if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert epochs[0]["loss"] == pytest.approx(np.mean(losses(whole)[:4]))


def test_how_busy_a_gpu_was_is_in_the_log_the_metrics_the_result_and_the_table(
    tiny_shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is asked whenever the losses are fetched, here at each step. A CPU and an old run have nothing."""
    epochs = [line for line in (whole / "metrics.jsonl").read_text().splitlines() if '"epoch", ' in line]
    assert epochs and not any("gpu_busy" in line for line in epochs)
    assert "GPU busy" not in (whole / "log.txt").read_text()
    readings = iter([0.5] * 4 + [1.0] * 4)
    monkeypatch.setattr("train.device.busy", lambda device: next(readings))
    monkeypatch.setattr("train.device.BUSY_PERIOD_S", 0.0)
    result = train_once(small(tiny_shards), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["gpu_busy"] for line in lines if line["kind"] == "epoch"] == [0.5, 1.0]
    assert "GPU busy 50.0 %" in (tmp_path / "run" / "log.txt").read_text()
    assert result["gpu_busy"] == 0.75
    config = json.loads((whole / "config.json").read_text())
    before = json.loads((whole / "result.json").read_text())
    assert finished_row(result, config, "new")["gpu_busy"] == 0.75
    assert finished_row(before, config, "old")["gpu_busy"] is None


def test_the_driver_is_not_asked_about_what_was_before_the_epoch(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.device.BUSY_PERIOD_S", 1e9)
    monkeypatch.setattr("train.device.busy", lambda device: 1 // 0)
    assert "gpu_busy" not in train_once(small(tiny_shards), tmp_path / "run")


def test_a_driver_that_does_not_tell_how_busy_a_gpu_is_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(device: torch.device) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    assert devices.busy(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 37)
    assert devices.busy(torch.device("cuda:0")) == 0.37
    monkeypatch.setattr(torch.cuda, "utilization", refused)
    assert devices.busy(torch.device("cuda:0")) is None


def test_a_test_split_without_lesions_has_no_number_of_them(
    tiny_shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = json.loads((whole / "result.json").read_text())["lesions"]
    assert all(count > 0 for count in named.values())
    column = ShardSet.column

    def without(data: ShardSet, name: str) -> np.ndarray:
        values = column(data, name)
        return np.where(column(data, "split") == "test", None, values) if name == "group" else values

    monkeypatch.setattr(ShardSet, "column", without)
    result = train_once(small(tiny_shards, epochs=1), tmp_path / "run")
    assert result["lesions"] == named | {"test": None}
    assert (result["test"]["lesions"], result["test"]["resampled"]) == (None, "image")


def test_a_set_without_a_validation_split_is_measured_on_test_alone(tmp_path: Path) -> None:
    data = write_set(tmp_path / "data", images=60, shares=(0.6, 0.0, 0.4))
    result = train_once(small(data, epochs=1), tmp_path / "run")
    assert result["images"] == {"train": 36, "val": 0, "test": 24}
    assert (result["val"]["balanced_accuracy"], result["test"]["temperature_scaling"]) == (None, None)
    assert result["test"]["balanced_accuracy"]["value"] is not None
    row = finished_row(result, small(data).to_dict(), "cell")
    assert (row["n_val"], row["val_balanced_accuracy"], row["temperature"]) == (0, None, None)
    table = pd.read_parquet(tmp_path / "run" / "predictions.parquet")
    assert set(table["split"]) == {"test"} and len(table) == 24
    assert read_about(tmp_path / "run").temperature == 1.0
    assert "no validation split" in (tmp_path / "run" / "log.txt").read_text()


def test_the_last_epoch_is_evaluated_however_rarely_the_others_are(tiny_shards: Path, tmp_path: Path) -> None:
    train_once(small(tiny_shards, epochs=3, eval_epochs=100), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["val_balanced_accuracy" in line for line in lines if line["kind"] == "epoch"] == [False, False, True]


def test_metrics_are_told_at_the_training_prior_too(tiny_shards: Path, whole: Path, tmp_path: Path) -> None:
    result = json.loads((whole / "result.json").read_text())
    counts = np.array(list(result["training_images_per_class"].values()), float)
    table = pd.read_parquet(whole / "predictions.parquet").query("split == 'test'")
    called = table[[f"logit_{dx}" for dx in HAM10000.names]].to_numpy() + np.log(counts / counts.sum())
    right = float((called.argmax(axis=1) == table["label"].to_numpy()).mean())
    other = result["test_training_prior"]
    assert (result["test"]["prior"], other["prior"]) == ("balanced", "training")
    assert other["accuracy"]["value"] == pytest.approx(right)
    assert set(other) == set(result["test"]) and other["temperature_scaling"] is not None
    row = finished_row(result, small(tiny_shards).to_dict(), "cell")
    for end, key in (("", "value"), ("_low", "low"), ("_high", "high")):
        for name in ("accuracy", "macro_f1", "expected_calibration_error"):
            assert row[f"{name}_training_prior{end}"] == other[name][key]
            assert row[f"{name}{end}"] == result["test"][name][key]
    config = small(tiny_shards, loss="plain", epochs=1)
    plain = train_once(config, tmp_path / "plain")
    assert plain["test"]["prior"] == "training" and plain["test_training_prior"] == plain["test"]
    assert not [name for name in finished_row(plain, config.to_dict(), "cell") if "training_prior" in name]


def test_predictions_hold_each_val_and_test_image_once(tiny_shards: Path, whole: Path) -> None:
    table = pd.read_parquet(whole / "predictions.parquet")
    data = ShardSet(tiny_shards)
    expected = [image for split in ("val", "test") for image in data.select(split).image_ids]
    assert table["image_id"].tolist() == expected
    classes = data.manifest.classes.names
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


def test_writing_is_counted_and_what_nobody_wants_is_not_written(
    tiny_shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, out = "train.evaluation.write_predictions", tmp_path / "run"
    monkeypatch.setattr(write, lambda *arguments: (time.sleep(0.3), write_predictions(*arguments)))
    unwanted = ("checkpoint.pt", "model.safetensors")
    result = train_once(small(tiny_shards, checkpoint_s=1e6), out, unwanted=unwanted)
    assert result["seconds"]["write"] >= 0.3
    assert not [name for name in unwanted if (out / name).exists()]
    assert (out / "predictions.parquet").read_bytes() == (whole / "predictions.parquet").read_bytes()


def test_steps_instead_of_epochs(tiny_shards: Path, tmp_path: Path) -> None:
    result = train_once(small(tiny_shards, steps=6), tmp_path / "run")
    assert (result["steps"], result["epochs"], len(losses(tmp_path / "run"))) == (6, 2, 6)


# ------------------------------------------------------------------ what is refused


def test_a_loss_that_is_no_number_names_its_step(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_step = TrainingStep.__call__
    calls = []

    def step(self, *batch):
        calls.append(1)
        return true_step(self, *batch) * (math.nan if len(calls) >= 6 else 1.0)

    monkeypatch.setattr(TrainingStep, "__call__", step)
    with pytest.raises(DermscaleError, match=r"loss is nan at step 5 \(epoch 2.*--lr"):
        train_once(small(tiny_shards, checkpoint_s=1e6), tmp_path / "run")
    assert len(calls) == 8  # it was noticed when the losses were fetched, at the end of the epoch


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


def test_a_batch_larger_than_the_training_set_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="72 images"):
        train_once(small(tiny_shards, batch_size=73), tmp_path / "run")
    with pytest.raises(UsageError, match="batch norm needs 2"):
        train_once(small(tiny_shards, batch_size=1), tmp_path / "run", world=World())
    assert not (tmp_path / "run").exists()


def test_splits_that_do_not_fit_in_memory_together_are_refused_before_training(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_bytes = 72 * 72 * 96 * 3
    monkeypatch.setattr("shards.engines.resident.free_bytes", lambda device: int(1.3 * train_bytes))  # train alone fits
    with pytest.raises(UsageError, match="for 120 images"):
        train_once(small(tiny_shards, engine="resident"), tmp_path / "run")


def test_a_compiler_that_fails_is_replaced_by_eager(
    tiny_shards: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the compiler broke")

    monkeypatch.setattr("train.compiling.warm_up", broken)
    result = train_once(small(tiny_shards, compile="on"), tmp_path / "run")
    assert result["decisions"]["compile"] == {"value": "off", "reason": "compiling failed: the compiler broke"}
    assert_same_run(whole, tmp_path / "run")
