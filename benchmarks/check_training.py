"""Training on a device: timed steps of each model, and a whole run (for `benchmarks/gpu_check.py`)."""

import math
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards import Loader
from shards.common.errors import DermscaleError
from train import device as devices
from train import models
from train.checkpoint import Progress
from train.config import Config, learning_rate, resolved
from train.console import Silent
from train.distributed import World
from train.loop import train_once
from train.prepare import choose_data, compile_and_distribute, prepare
from train.workspace import Workspace

WARM_UP = 5
"""Steps before the timed ones: memory is allocated and kernels are chosen in them."""
WATCHED = 10
"""Steps, at most, in which waiting is counted: the device ends each before the next batch is asked for, which takes
time, so these are not the steps of the speeds."""

_SCHEDULE = 1000
"""Steps of the learning rate's schedule beyond the least number: a fast device does many in the least time."""

Parts = tuple[Tensor, Tensor, Tensor]
"""images, colour, labels of a batch, as in `shards.Batch`."""


def training_steps(
    data: Path,
    model: str,
    device: torch.device,
    *,
    steps: int,
    seconds: float,
    batch_size: int,
    resolution: int,
    compiled: bool,
) -> tuple[bool, dict[str, Any]]:
    """Training steps on loaded batches, then on one cached batch, at least `steps` each; the losses must be numbers.

    seconds: least length of either. img_per_s is of the loaded batches, cached_img_per_s of the cached one: what the
    model could take. last_loss is of the step WARM_UP + `steps`, however many follow. data_wait_share: of the time of
    further steps on loaded batches, how much the device had nothing to do for want of one, 0 to 1. span: start and end
    of the timed steps on loaded batches, by `time.perf_counter()`.
    """
    watched = min(steps, WATCHED)
    total = _SCHEDULE + steps
    family = models.family(model)
    config = Config(
        model=model,
        data=str(data),
        steps=total,
        batch_size=batch_size,
        resolution=resolution,
        device=str(device),
        compile="on" if compiled else "off",
    )
    config = resolved(config, family)
    world, workspace = World(device=device), Workspace()
    devices.reset_peak_memory(device)
    with ExitStack() as stack:
        stack.callback(workspace.close)
        selections = choose_data(config, workspace.open(data), family, world)
        run = prepare(config, family, world, workspace, selections, None, stack)
        progress = Progress()
        compile_and_distribute(run, progress, Silent())
        batches = stack.enter_context(closing(_endless(run.loaders["train"])))
        losses: list[Tensor] = []

        def step(batch: Parts) -> None:
            losses.append(run.step(*batch, lr=learning_rate(config, min(run.step.done, total - 1), total)))

        def timed(source: Callable[[], Parts]) -> tuple[float, float, int]:
            """Start and end of the steps, by `time.perf_counter()`, and how many they were."""
            for _ in range(WARM_UP):
                step(source())
            devices.synchronize(device)
            began, count = time.perf_counter(), 0
            while not count or time.perf_counter() - began < seconds:
                for _ in range(steps):  # the device is waited for once in so many
                    step(source())
                devices.synchronize(device)
                count += steps
            return began, time.perf_counter(), count

        def waiting() -> float:
            """Share of the time of `watched` steps that was spent waiting for batches."""
            for _ in range(WARM_UP):  # among them are the batches made ready while the cached one was timed
                step(loaded())
            devices.synchronize(device)
            waited, began = 0.0, time.perf_counter()
            for _ in range(watched):
                asked = time.perf_counter()
                batch = loaded()
                waited += time.perf_counter() - asked
                step(batch)
                devices.synchronize(device)  # else the host, running ahead, waits for batches that are not yet needed
            return waited / (time.perf_counter() - began)

        def loaded() -> Parts:
            batch = next(batches)
            return batch.images, batch.colour, batch.labels

        began, ended, count = timed(loaded)
        cached = loaded()
        cached_began, cached_ended, cached_count = timed(lambda: cached)
        step_s, cached_step_s = (ended - began) / count, (cached_ended - cached_began) / cached_count
        data_wait_share = waiting()
        values = torch.stack(losses).float().cpu()
        if compiled and run.compilation.decision.value != "on":
            raise DermscaleError(f"torch.compile was not used: {run.compilation.decision.reason}")
        return bool(values.isfinite().all()), {
            "span": (began, ended),
            "steps": count,
            "batch_size": batch_size,
            "resolution_px": resolution,
            "step_s": step_s,
            "img_per_s": batch_size / step_s,
            "cached_img_per_s": batch_size / cached_step_s,
            "data_wait_share": data_wait_share,
            "compile_s": progress.seconds["compile"],
            "first_loss": float(values[0]),
            "last_loss": float(values[WARM_UP + steps - 1]),
            "peak_memory_bytes": devices.peak_memory_bytes(device),
            "decisions": {name: asdict(taken) for name, taken in run.decisions.items()},
        }


def _endless(loader: Loader) -> Generator[Any, None, None]:
    """Batches of one epoch after the other."""
    while True:
        yield from loader


def whole_run(
    data: Path, out: Path, model: str, device: torch.device, *, steps: int, batch_size: int, resolution: int
) -> tuple[bool, dict[str, Any]]:
    """A run as `train.run` makes it: steps, checkpoint, evaluation of val and test, result.json."""
    config = Config(
        model=model, data=str(data), steps=steps, batch_size=batch_size, resolution=resolution, device=str(device)
    )
    result = train_once(config, out, world=World(device=device))
    score = result["test"]["balanced_accuracy"]["value"]
    kept = ("img_per_s", "data_wait_fraction", "train_loss", "seconds", "peak_memory_bytes", "decisions", "steps")
    numbers = {name: result[name] for name in kept} | {"test_balanced_accuracy": score}
    return math.isfinite(result["train_loss"]) and score is not None, numbers
