"""Checks of training on a GPU: what slows it down, all models in all styles, and that whole runs do what they should.

A network is trained as a run does it (`train/prepare.py`), on batches of several sources. `cached` is one batch again
and again: no loader can be faster. Each speed has beside it what tells its causes apart: the CPU time and the voluntary
switches of the main thread, which are few where nothing makes it wait, and the share of the time in which kernels ran.
"""

import functools
import itertools
import json
import math
import os
import resource
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import Check, Context, Found
from benchmarks.worker import run_module
from shards import Loader, ShardSet
from shards.common.errors import DermscaleError
from train import device as devices
from train import models
from train.checkpoint import Progress
from train.config import Config, learning_rate, resolved
from train.console import Silent
from train.device import Decision
from train.distributed import World
from train.graphed import GraphedStep
from train.loop import Stopped, train_once
from train.prepare import Run, choose_data, compile_and_distribute, prepare
from train.study import sharing

CACHED, ELSEWHERE, UNREAD = "cached", "cached, DALI in another process", "cached, DALI unread in this process"
GRAPHED = "resident, graphed"
SOURCES = (CACHED, ELSEWHERE, "native", "resident", GRAPHED, "dali", UNREAD)
"""Where batches come from. DALI's threads stay in a process once they were there, so the sources with them are last."""
WARM_UP = 5
"""Steps before the timed ones; they allocate memory and choose kernels."""
NEAR = 0.05
"""How far losses may be from the eager network's after the same steps, as a share of them: bfloat16 rounds differently
in compiled code, and kernels that add in any order differ from one run to the next."""
_SCHEDULE = 10_000
"""Steps of the learning rate's schedule: a fast device makes many in the minimum time."""

TakeStep = Callable[[float], Tensor]
"""Takes a training step, given the learning rate, and returns the loss, () on the device."""


# ------------------------------------------------------------------ speeds


def causes(model: str, compiled: bool) -> list[Check]:
    """The speed of a network on batches of every source, one check each."""
    style = "compiled" if compiled else "eager"
    return [Check(f"{model}, {style}: {source}", partial(_speed, model, style, source)) for source in SOURCES]


def speeds(names: Sequence[str], styles: Sequence[str]) -> list[Check]:
    """The speed of each model in each style, `eager`, `graphed` or `compiled`, cached and resident."""
    combined = itertools.product(styles, names, (CACHED, "resident"))
    return [
        Check(f"speed of {model}, {style}: {source}", partial(_speed, model, style, source))
        for style, model, source in combined
    ]


def _speed(model: str, style: str, source: str, context: Context) -> Found:
    graphed = style == "graphed" or source == GRAPHED
    engine = source if source in ("native", "dali") else "resident" if graphed or source == "resident" else "native"
    more = {"engine": engine, "compile": "on" if style == "compiled" else "off"}
    with ExitStack() as stack:
        run = stack.enter_context(training(context, model, graphed, **more))
        taking = stack.enter_context(closing(steps(run)))
        source_of_steps: Iterator[TakeStep] = taking
        if source in (CACHED, ELSEWHERE, UNREAD):
            batch = next(iter(run.loaders["train"]))
            take = functools.partial(run.step, batch.images, batch.colour, batch.labels)
            if graphed:
                take = GraphedStep(run.step, lambda: batch)
                take.record(devices.Recorder(context.device))
            source_of_steps = itertools.repeat(take)
        if source == UNREAD:
            unread = stack.enter_context(_dali(context.sets["jpg"], run.config, context.device))
            next(iter(unread))  # it reads ahead, and then stands still
        if source == ELSEWHERE:
            cached = context.numbers.get(f"{model}, {style}: {CACHED}", {})
            stack.enter_context(elsewhere(context, run.config, cached.get("img_per_s", math.inf)))
        passed, numbers = timed(context, run, source_of_steps)
    return passed, {"model": model, "style": style, "source": source, **numbers}


@contextmanager
def training(context: Context, model: str, graphed: bool = False, **more: Any) -> Iterator[Run]:
    """A network and its data, prepared for training. What the check before made is used again if it fits.

    graphed: whether each step is one CUDA graph; on a CPU it is the same code, not recorded. more: fields of Config.
    Raises DermscaleError if the network should be compiled and cannot be.
    """
    workspace, family, world = context.workspace, models.family(model), World(device=context.device)
    config = resolved(config_of(context, model, steps=_SCHEDULE, **more), family)
    devices.reset_peak_memory(context.device)
    with ExitStack() as stack:
        selections = choose_data(config, workspace.open(config.data), family, world)
        run = prepare(config, family, world, workspace, selections, {}, stack)
        run.graphs.decision = Decision("on" if graphed else "off", "asked for by a check")
        run.step.graphed = graphed
        if graphed:
            run.loaders["train"].load()
        compile_and_distribute(run, Progress(), Silent())
        if config.compile == "on" and run.compilation.decision.value != "on":
            raise DermscaleError(f"torch.compile was not used: {run.compilation.decision.reason}")
        yield run


def config_of(context: Context, model: str, **more: Any) -> Config:
    """The settings of a training. more: its other fields."""
    settings = context.settings
    more = {"batch_size": settings.batch_size, "resolution": settings.resolution} | more
    return Config(model=model, data=str(context.sets["jpg"]), device=str(context.device), **more)


def steps(run: Run) -> Generator[TakeStep, None, None]:
    """The steps of a run, epoch after epoch, without end."""
    for epoch in itertools.count():
        run.loaders["train"].set_epoch(epoch)
        run.graphs.ready(epoch, run.config.resolution)
        if epoch == 0 and run.graphs.decision.reason.startswith("recording failed"):
            raise DermscaleError(run.graphs.decision.reason)
        yield from run.graphs.steps()


def timed(context: Context, run: Run, taking: Iterator[TakeStep]) -> Found:
    """Take steps for at least `settings.seconds`; whether all losses are numbers, and the speed with its causes.

    main_cpu_share: CPU time of the main thread, of the time. switches_per_step: how often it gave up its core by
    itself. kernel_share: of the time of a step, by a profiler in a few more steps. gpu_busy: of the time, by the
    driver.
    """
    device, settings, losses = context.device, context.settings, list[Tensor]()

    def take(count: int) -> None:
        for _ in range(count):
            rate = learning_rate(run.config, min(run.step.done, _SCHEDULE - 1), _SCHEDULE)
            loss = next(taking)(rate)
        losses.append(loss.clone())
        devices.synchronize(device)

    take(WARM_UP)
    count, began, before = 0, time.perf_counter(), _of_thread()
    while not count or time.perf_counter() - began < settings.seconds:
        take(settings.steps)  # the host waits for the device once in so many
        count += settings.steps
    seconds, after, busy = time.perf_counter() - began, _of_thread(), devices.busy(device)
    values = torch.stack(losses).float().cpu()
    kernels_s = kernel_s(device, lambda: take(WARM_UP)) / WARM_UP
    return bool(values.isfinite().all()), {
        "steps": count,
        "step_s": seconds / count,
        "img_per_s": settings.batch_size * count / seconds,
        "main_cpu_share": (after[0] - before[0]) / seconds,
        "switches_per_step": (after[1] - before[1]) / count,
        "kernel_share": kernels_s * count / seconds,
        "gpu_busy": busy,
        "last_loss": float(values[-1]),
        "peak_memory_bytes": devices.peak_memory_bytes(device),
        "decisions": {name: asdict(taken) for name, taken in run.decisions.items()},
    }


def _of_thread() -> tuple[float, int]:
    """CPU seconds, and voluntary switches, of this thread until now."""
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return used.ru_utime + used.ru_stime, used.ru_nvcsw


def kernel_s(device: torch.device, run: Callable[[], None]) -> float:
    """Seconds in which at least one kernel, or on a CPU one operation, ran during `run`, as PyTorch's profiler sees.

    The profiler makes launches slower, so this is compared with the time of steps that it does not watch.
    """
    from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
    from torch.profiler import ProfilerActivity, profile

    kind, activity = DeviceType.CPU, ProfilerActivity.CPU
    if device.type == "cuda":
        kind, activity = DeviceType.CUDA, ProfilerActivity.CUDA
    # Taken down, and set up again, CUDA's profiling interface crashes with CUDA graphs (torch/profiler/profiler.py).
    os.environ |= {"TEARDOWN_CUPTI": "0", "KINETO_LOG_LEVEL": "99"}  # it says when it starts and stops, as an error
    with profile(activities=[activity], acc_events=True) as found:
        run()
    events = [event for event in found.events() or () if event.device_type == kind and not event.is_user_annotation]
    spans = [event.time_range for event in events]
    return union((span.start, span.end) for span in spans) / 1e6


def union(spans: Iterable[tuple[float, float]]) -> float:
    """How much of a line is covered by spans (start, end), which may overlap."""
    covered, until = 0.0, -math.inf
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


# ------------------------------------------------------------------ DALI beside a cached batch


def _dali(data: Path, config: Config, device: torch.device) -> closing[Loader]:
    """A loader with DALI."""
    px, count = config.resolution, config.batch_size
    selection = ShardSet(data).select("train")
    return closing(Loader(selection, batch_size=count, resolution=px, train=True, engine="dali", device=device))


@contextmanager
def elsewhere(context: Context, config: Config, img_per_s: float) -> Iterator[None]:
    """Load with DALI in another process, so many images a second, from its first batch on until the end of this."""
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    arguments = (theirs, context.sets["jpg"], config, context.device, img_per_s)
    process = spawn.Process(target=_load, args=arguments, daemon=True)
    process.start()
    theirs.close()
    try:
        ours.recv()
        yield
    except EOFError:
        raise DermscaleError("the process that loads with DALI ended before its first batch") from None
    finally:
        process.kill()
        process.join()


def _load(ready: Connection, data: Path, config: Config, device: torch.device, img_per_s: float) -> None:
    """The code of that process."""
    devices.prepare(device)
    with _dali(data, config, device) as loader:
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        next(batches)
        ready.send(None)
        began = time.perf_counter()
        for number, _ in enumerate(batches, 1):
            time.sleep(max(0.0, began + number * config.batch_size / img_per_s - time.perf_counter()))


# ------------------------------------------------------------------ losses, and whole runs


def losses(context: Context) -> Found:
    """Whether graphed steps give the losses of eager ones on the same batches; beside it, how much two eager ones
    differ."""
    found: dict[str, list[float]] = {}
    for name in ("eager", "eager again", "graphed"):
        with training(context, context.settings.whole_run, name == "graphed", engine="resident", compile="off") as run:
            with closing(steps(run)) as taking:
                rates = (learning_rate(run.config, step, _SCHEDULE) for step in range(context.settings.compared))
                values = torch.stack([next(taking)(rate).clone() for rate in rates])
            found[name] = values.tolist()

    def apart(name: str) -> float:
        pairs = zip(found["eager"], found[name], strict=True)
        return max(abs(one - other) / abs(one) for one, other in pairs)

    numbers = {"largest_difference": apart("graphed"), "of_two_eager_trainings": apart("eager again"), "losses": found}
    return apart("graphed") <= NEAR, numbers


def whole_run(context: Context, name: str, resumed: bool = False, **more: Any) -> Found:
    """A run as `train.run` makes it: steps, checkpoint, evaluation of val and test, result.json. resumed: it is stopped
    half way first. more: fields of Config."""
    settings, out, asked = context.settings, context.scratch / name, itertools.count(1)
    config = config_of(context, settings.whole_run, **({"steps": settings.steps, "compile": "off"} | more))
    train = partial(train_once, config, out, world=World(device=context.device))
    if resumed:
        try:
            train(stop=lambda: next(asked) == settings.steps // 2)
            raise DermscaleError("the run was asked to stop and did not")
        except Stopped:
            result = train(resume=True)
    else:
        result = train()
    score = result["test"]["balanced_accuracy"]["value"]
    names = ("img_per_s", "data_wait_fraction", "gpu_busy", "train_loss", "weights", "seconds", "steps", "decisions")
    numbers = {name: result.get(name) for name in names} | {"test_balanced_accuracy": score}
    return math.isfinite(result["train_loss"]) and score is not None, numbers


def resumed(context: Context) -> Found:
    """Whether a run that was stopped and resumed ends with the loss of one that was not."""
    passed, whole = whole_run(context, "uninterrupted")
    passed_too, other = whole_run(context, "resumed", resumed=True)
    near = abs(whole["train_loss"] - other["train_loss"]) <= NEAR * whole["train_loss"]
    return passed and passed_too and near, {"uninterrupted": whole, "resumed": other}


def cells_at_once(number: int, context: Context) -> Found:
    """The speed of some cells that train at the same time, each in a process of its own, in sum."""
    config = config_of(context, context.settings.whole_run, compile="off")
    log = context.scratch / "cells.log"
    found = sharing.train(config, 0, None, number, context.settings.seconds, log, lambda: 0)
    if isinstance(found, str):
        raise DermscaleError(found)
    return True, asdict(found)


def grid(context: Context) -> Found:
    """A study of two models and two fractions, and the seconds of each phase of its cells."""
    settings, out = context.settings, context.scratch / "grid"
    names = ",".join((settings.models or (settings.whole_run, "vit_b16"))[:2])
    options = {"--data": context.sets["jpg"], "--out": out, "--models": names, "--fractions": "0.5,1", "--seeds": 0}
    options |= {"--epochs": 1, "--batch-size": settings.batch_size, "--resolution": settings.resolution}
    began = time.perf_counter()
    run_module("train.grid", options | {"--device": context.device, "--per-device": 1})
    wall_s = time.perf_counter() - began
    results = {path.parent.name: json.loads(path.read_bytes()) for path in sorted(out.rglob("result.json"))}
    return len(results) == 2 * len(names.split(",")), {
        "wall_s": wall_s,
        "seconds": {name: result["seconds"] for name, result in results.items()},
        "img_per_s": {name: result["img_per_s"] for name, result in results.items()},
    }
