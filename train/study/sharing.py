"""How many cells of a grid are trained at the same time on one device, and with how many CPU threads each.

A step of a small network does not fill a GPU. On a CPU, threads wait for each other: cells with one thread each train
more images in sum than one cell with all threads. The number of threads decides the last bits of a CPU run, so a study
keeps to its first decision.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from pathlib import Path

import click

from shards.common.errors import UsageError, one_line
from shards.common.machine import available_cores, free_bytes
from train.config import Config
from train.study.cells import Cell
from train.study.worker import set_up, world_on

GAIN = 1.05
"""Twice as many cells on a GPU have to train so many times as many images a second, in sum."""
MOST = 8
"""Cells on one GPU that `auto` tries."""
WARM_UP, TRIAL_S = 3, 5.0
"""Steps of a trial before the time is taken, and its seconds."""
MEMORY_SHARE = 0.8
"""Of the free memory of a CPU, that all cells together may take."""
POLL_S = 0.25


@dataclass(frozen=True)
class Sharing:
    """per_device: cells that are trained at the same time on a device. threads: of each; None: as in a single run."""

    per_device: int = 1
    threads: int | None = None
    reason: str = "one cell at a time until now"


def parse_per_device(text: str) -> int | None:
    """A number of cells; None for `auto`. Raises UsageError for anything else."""
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UsageError(f"--per-device '{text}' is neither auto nor a whole number of 1 or more")
    return int(text)


def decide(
    wanted: int | None,
    cells: Sequence[Cell],
    gpus: Sequence[str | None],
    earlier: Sharing | None,
    log: Path,
    stop: Callable[[], int],
    cores: int | None = None,
) -> Sharing:
    """How the cells of a study share its devices.

    wanted: cells on each device; None: what an earlier start of the study decided, else what a trial finds. gpus: one
    entry for each device. earlier: its threads stay unless the cells name a number. log: for what the processes of a
    trial print. stop: how often the user has asked to stop, which ends a trial. cores: of each device; None: its part
    of this machine's.
    """
    from train import device as devices
    from train import models

    base, each = cells[0].config, -(-len(cells) // len(gpus))
    cores = available_cores() // len(gpus) if cores is None else cores
    threads = earlier.threads if base.threads is None and earlier is not None else base.threads
    room = max(1, cores // (threads or 1))

    def shared(number: int) -> int | None:
        return max(1, cores // number) if threads is None and number > 1 else threads

    def trial(number: int, seconds: float, compile: str = base.compile) -> "Trial | str":
        names = {cell.config.model for cell in cells}
        largest = max(names, key=lambda name: models.cost(name, base.resolution, classes=7)[1])
        own = [cell for cell in cells if cell.config.model == largest]
        click.echo(f"a short trial of {largest}, {number} at a time")
        config = replace(own[0].config, threads=shared(number), start_resolution=None, compile=compile)
        return train(config, sum(cell.images for cell in own[1:]) // number, gpus[0], number, seconds, log, stop)

    if wanted is not None:
        number, reason = min(wanted, each), "asked for"
    elif earlier is not None:
        number, reason = min(earlier.per_device, room), earlier.reason
    elif (most := min(room, each)) < 2:
        number, reason = 1, "there is one cell, or one core, for each device"
    elif devices.choose(base.device).type == "cpu":
        number, reason = _fitting(most, trial(1, 0.0, compile="off"))
    else:
        number, reason = _fastest(min(most, MOST), lambda number: trial(number, TRIAL_S))
    return Sharing(number, shared(number), reason)


def _fitting(most: int, largest: "Trial | str") -> tuple[int, str]:
    """How many cells, `most` at the most, fit into the memory of a CPU if all are as large as the largest; and why."""
    if isinstance(largest, str):
        return 1, f"the trial failed: {largest}"
    free = free_bytes("cpu")
    taken = f"{largest.model} takes {largest.memory_bytes / 1e9:.3g} GB of the {free / 1e9:.3g} GB that are free"
    return max(1, min(most, int(MEMORY_SHARE * free / largest.memory_bytes))), taken


def _fastest(most: int, trial: "Callable[[int], Trial | str]") -> tuple[int, str]:
    """1, 2, 4 … cells, as long as each doubling trains more images a second in sum; and what was measured."""
    best, before, found = 1, 0.0, list[str]()
    for number in (1 << power for power in range(most.bit_length())):
        tried = trial(number)
        if isinstance(tried, str):
            found.append(f"{number} at once failed: {tried}")
            break
        found.append(f"{number} at once: {tried.img_per_s:,.0f} img/s of {tried.model}")
        if tried.img_per_s < GAIN * before:
            break
        best, before = number, tried.img_per_s
    return best, "; ".join(found)


# ------------------------------------------------------------------ a trial


@dataclass(frozen=True)
class Trial:
    """img_per_s: of all processes in sum. memory_bytes: of the largest one, on a GPU without what is not PyTorch's."""

    model: str
    img_per_s: float
    memory_bytes: int


def train(
    config: Config, ahead: int, gpu: str | None, number: int, seconds: float, log: Path, stop: Callable[[], int]
) -> Trial | str:
    """Train a cell in `number` processes at the same time on one device, for some seconds, and keep nothing.

    ahead: images that later cells of the model train on, in one process. Returns one line if it failed or was stopped.
    """
    context = get_context("spawn")
    ready = context.Barrier(number)
    processes, waiting, found = [], set[Connection](), list[tuple[float, int]]()
    try:
        for _ in range(number):
            ours, theirs = context.Pipe()
            waiting.add(ours)
            processes.append(
                context.Process(
                    target=_process, args=(theirs, ready, config, ahead, gpu, number, seconds, log), daemon=True
                )
            )
            processes[-1].start()
            theirs.close()
        while waiting:
            if stop():
                return "stopped"
            for pipe in wait(list(waiting), POLL_S):
                assert isinstance(pipe, Connection)
                waiting.remove(pipe)
                try:
                    answer = pipe.recv()
                except EOFError:
                    return f"a process was killed; see {log}"
                if isinstance(answer, str):
                    return answer
                found.append(answer)
        return Trial(config.model, sum(speed for speed, _ in found), max(memory for _, memory in found))
    finally:
        for process in processes:
            process.kill()
            process.join()


def _process(
    pipe: Connection,
    ready: Barrier,
    config: Config,
    ahead: int,
    gpu: str | None,
    number: int,
    seconds: float,
    log: Path,
) -> None:
    """Send what one process measured, or why it could not."""
    set_up(gpu, log)
    try:
        pipe.send(_measure(config, ahead, number, seconds, ready.wait))
    except Exception as error:  # noqa: BLE001 (the grid says it, and trains one cell at a time)
        pipe.send(f"{type(error).__name__}: {one_line(error, 200)}")


def _measure(config: Config, ahead: int, number: int, seconds: float, ready: Callable[[], object]) -> tuple[float, int]:
    """Train a cell, from the moment when all processes are ready. Images a second, and bytes at the peak."""
    from train import device as devices
    from train import models
    from train.checkpoint import Progress
    from train.config import resolved
    from train.console import Silent
    from train.prepare import choose_data, compile_and_distribute, prepare
    from train.workspace import Workspace

    world, workspace, family = world_on(config.device, number), Workspace(), models.family(config.model)
    workspace.compilation.images_ahead = ahead
    config = resolved(config, family)
    with ExitStack() as stack:
        stack.callback(workspace.close)
        selections = choose_data(config, workspace.open(config.data), family, world)
        run = prepare(config, family, world, workspace, selections, {}, stack)
        compile_and_distribute(run, Progress(), Silent())

        def steps():
            for epoch in itertools.count():
                run.loaders["train"].set_epoch(epoch)
                run.graphs.ready(epoch, config.resolution)
                for take_step in run.graphs.steps():
                    take_step(0.0)
                    yield

        training = steps()
        next(itertools.islice(training, WARM_UP - 1, None))
        devices.synchronize(world.device)
        ready()
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            next(training)
            done += 1
        devices.synchronize(world.device)
        speed = done * config.batch_size / (time.perf_counter() - began)
        training.close()
        return speed, devices.peak_memory_bytes(world.device)
