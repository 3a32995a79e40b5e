"""kill -9 at any moment: nothing half-written counts as whole, and what is started again ends as if nothing had been.

A command is killed at random moments and, with strace, before single system calls that change files.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from preprocess import synthetic
from shards import ShardSet
from shards.format import MANIFEST
from tests.support.train_runs import assert_same_run
from tests.torture.victims import Victim, contents, shared_memory, table
from train import checkpoint

pytestmark = pytest.mark.slow
TRAINING = ("--resolution", 32, "--batch-size", 16, "--device", "cpu", "--precision", "fp32", "--compile", "off")
Times = Callable[[int, int], int]


@pytest.fixture(autouse=True)
def nothing_shared():
    """No shared memory is left behind."""
    before = shared_memory()
    yield
    assert shared_memory() <= before


@pytest.mark.parametrize("before", ["nothing", "a set"])
def test_packing(tmp_path: Path, times: Times, record: Callable[..., None], before: str) -> None:
    synthetic.write_folder(tmp_path / "raw", images=45, seed=1, difficulty=0.5, workers=1)
    synthetic.write_folder(tmp_path / "other", images=40, seed=2, difficulty=0.5, workers=1)
    (tmp_path / "sets").mkdir()
    out, options = tmp_path / "sets" / "set", ("--max-resolution", 48, "--workers", 2)
    old = Victim("preprocess.shard", "--source", tmp_path / "other", "--out", out, *options)
    victim = Victim("preprocess.shard", "--source", tmp_path / "raw", "--out", out, "--overwrite", *options)
    victim.learn(out)
    new, previous = contents(out), {}
    kills = times(3, 100)
    while victim.kinds.total() < kills:
        for name in contents(out):
            (out / name).unlink()
        out.rmdir()
        if before == "a set":
            old.whole()
            previous = contents(out)
        victim.kill()
        if (out / MANIFEST).exists():
            with ShardSet(out) as data:
                assert not any(problems for _, problems in data.verify())
        assert (contents(out) if out.exists() else {}) in (new, previous)
        victim.whole()
        assert contents(out) == new
        assert [file.name for file in out.parent.iterdir()] == ["set"]
    record(kills=victim.kinds.total(), kinds=dict(victim.kinds))


def test_training(tiny_shards: Path, tmp_path: Path, times: Times, record: Callable[..., None]) -> None:
    """Each run is killed until it ends by itself, and then compared with one that nobody killed."""
    options = ("--model", "test_resnet", "--data", tiny_shards, "--epochs", 2, "--checkpoint-s", 0, *TRAINING)
    whole = Victim("train.run", *options, "--out", tmp_path / "whole")
    whole.learn(tmp_path / "whole")
    ended, seed, kinds, kills, states = 0, 0, Counter[str](), times(4, 200), 0
    while kinds.total() < kills:
        out, seed = tmp_path / f"run{seed}", seed + 1
        victim = Victim("train.run", *options, "--out", out, "--resume", seed=seed)
        victim.calls, victim.seconds = whole.calls, whole.seconds
        while victim.kill():
            states += readable(out)
            if victim.kinds.total() >= 8:  # enough for one run
                victim.whole()
                break
        assert_same_run(tmp_path / "whole", out)
        assert names(out) == names(tmp_path / "whole")
        ended += 1
        kinds += victim.kinds
    assert states >= kills // 4  # so many left a checkpoint
    record(kills=kinds.total(), runs=ended, checkpoints=states, kinds=dict(kinds))


def readable(run: Path) -> bool:
    """Whether a run has a checkpoint. It is whole, and so are the weights if there is a result."""
    if (run / "result.json").exists():
        assert json.loads((run / "result.json").read_text()) and load_file(run / "model.safetensors")
    return run.exists() and checkpoint.load(run) is not None  # raises if it is damaged


def names(run: Path) -> set[str]:
    """The files of a run, without TensorBoard's, of which each start writes one."""
    return {file.name for file in run.iterdir() if not file.name.startswith("events.out")}


def test_a_grid(tiny_shards: Path, tmp_path: Path, times: Times, record: Callable[..., None]) -> None:
    """Each study is killed, or a process of it, until it ends by itself."""
    options = ("--models", "test_resnet", "--fractions", "0.5,1", "--seeds", "0,1", "--data", tiny_shards)
    options += ("--epochs", 2, "--checkpoint-s", 0, "--per-device", 2, "--threads", 1, *TRAINING)
    whole = Victim("train.grid", *options, "--out", tmp_path / "whole")
    whole.learn(tmp_path / "whole")
    expected, ended, seed, kinds, kills = table(tmp_path / "whole"), 0, 0, Counter[str](), times(2, 200)
    states = 0
    while kinds.total() < kills:
        out, seed = tmp_path / f"study{seed}", seed + 1
        victim = Victim("train.grid", *options, "--out", out, seed=seed)
        victim.calls, victim.seconds = whole.calls, whole.seconds
        while victim.kill():
            states += any([readable(cell) for cell in out.glob("cells/*")])
            for cell, row in table(out).items() if (out / "results.csv").exists() else ():
                assert row == expected[cell] or row["status"] != "finished"
            if victim.kinds.total() >= 8:
                victim.whole()
                break
        assert table(out) == expected
        finished = re.findall(
            r'^{"cell": "(.*?)", "outcome": "finished"', (out / "grid.jsonl").read_text(), re.MULTILINE
        )
        assert sorted(finished) == sorted(expected)  # each cell once
        for cell in expected:
            assert_same_run(tmp_path / "whole" / "cells" / cell, out / "cells" / cell)
            assert names(out / "cells" / cell) == names(tmp_path / "whole" / "cells" / cell)
        assert names(out) == names(tmp_path / "whole")
        ended += 1
        kinds += victim.kinds
    record(kills=kinds.total(), studies=ended, checkpoints=states, kinds=dict(kinds))
