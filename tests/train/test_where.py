"""Runs and grids on images that meet a condition: what they train on and record, and what resuming refuses."""

import json
from pathlib import Path

import pandas as pd
import pytest

from shards.common.errors import DataError, UsageError
from tests.support.train_runs import small
from train import grid, run
from train.loop import train_once

WHERE = "age >= 30 and dx in ('mel', 'nv', 'bcc', 'df')"


def test_a_run_uses_the_images_that_meet_the_condition_and_goes_on_with_the_same_alone(tiny_shards, tmp_path, command):
    config = small(tiny_shards, where=WHERE, batch_size=8)
    train_once(config, tmp_path / "run")
    table = pd.read_parquet(tiny_shards / "index.parquet").query(WHERE)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["images"] == table["split"].value_counts().to_dict()
    counts = {dx: count for dx, count in result["training_images_per_class"].items() if count}
    assert counts == table[table["split"] == "train"]["dx"].value_counts().to_dict()
    predictions = pd.read_parquet(tmp_path / "run" / "predictions.parquet")
    assert set(predictions["image_id"]) == set(table[table["split"] != "train"]["image_id"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["where"] == WHERE
    for other in (None, "age >= 31"):
        with pytest.raises((DataError, UsageError), match="where: "):
            train_once(small(tiny_shards, where=other, batch_size=8), tmp_path / "run", resume=True)
    code, _, err = command(run.main, "--model", "test_resnet", "--data", tiny_shards, "--where", "agee > 3")
    assert (code, err.count("\n")) == (2, 1) and "no column agee; there are image_id (text)" in err


def test_a_grid_counts_the_images_that_meet_the_condition_and_keeps_to_it(tiny_shards: Path, tmp_path: Path, command):
    options = ["--models", "test_resnet", "--fractions", "0.5,1", "--seeds", "0", "--epochs", "1", "--batch-size", "8"]
    options += ["--resolution", "32", "--device", "cpu", "--compile", "off", "--per-device", "1"]
    options += ["--data", str(tiny_shards), "--out", str(tmp_path / "study")]
    code, _, err = command(grid.main, *options, "--where", WHERE)
    assert code == 0, err
    table = pd.read_parquet(tiny_shards / "index.parquet").query(f"split == 'train' and {WHERE}")
    found = pd.read_csv(tmp_path / "study" / "results.csv").sort_values("fraction")
    assert found["n_train"].tolist()[-1] == len(table) and found["n_train"].tolist()[0] < len(table)
    code, _, err = command(grid.main, *options)
    assert code == 2 and f"where: {WHERE}, now None" in err
