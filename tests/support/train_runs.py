"""Not a test: small runs and what they left behind, for the tests of train/."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from train import models
from train.config import Config, resolved
from train.console import Silent
from train.step import TrainingStep

WORKER = Path(__file__).with_name("train_worker.py")


def small(data: Path, **changes: Any) -> Config:
    """Two epochs of four steps of a tiny network on the tiny set, in float32."""
    settings: dict[str, Any] = {
        "model": "test_resnet",
        "data": str(data),
        "epochs": 2,
        "batch_size": 16,
        "resolution": 32,
        "device": "cpu",
        "precision": "fp32",
        "compile": "off",
        "checkpoint_s": 0.0,
    }
    return Config(**(settings | changes))


def step_of(config: Config, precision: str = "fp32") -> TrainingStep:
    """A training step on the CPU without data: a new network, as `config` names it, for seven classes."""
    torch.manual_seed(config.seed)
    net = models.build(config.model, config.resolution, 7, (0.7, 0.5, 0.4), (0.2, 0.15, 0.1)).train()
    return TrainingStep(net, resolved(config, models.family(config.model)), [30, 40, 100, 10, 90, 600, 20], precision)


class Heard(Silent):
    """A console that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def at(call: int, action: Callable[[], bool]) -> Callable[[], bool]:
    """A `stop` that returns `action()` at its `call`-th call."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return action() if asked == call else False

    return stop


def losses(run: Path) -> list[float]:
    """The loss of each step, in order; each step must be there once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(len(steps)))
    return [line["loss"] for line in steps]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The reported weights."""
    return load_file(run / "model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    """Two run folders hold the same weights, losses, predictions and metrics, bit for bit."""
    first, second = weights(a), weights(b)
    assert list(first) == list(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
    assert losses(a) == losses(b)
    assert (a / "predictions.parquet").read_bytes() == (b / "predictions.parquet").read_bytes()
    results = [json.loads((run / "result.json").read_text()) for run in (a, b)]
    assert results[0]["test"] == results[1]["test"]
    assert results[0]["train_loss"] == results[1]["train_loss"]


def start_worker(order: dict[str, Any], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start one `train_worker.py`."""
    return subprocess.Popen(
        [sys.executable, str(WORKER), json.dumps(order)],
        env=child_environment() | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def child_environment() -> dict[str, str]:
    """The environment of a child process: one thread, as many as this process uses, and this project on its path."""
    root = str(Path(__file__).parents[2])
    return os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": root,
        "CUDA_VISIBLE_DEVICES": "",
    }
