"""Everything that a run needs before its first step: data, network, training step, and the decisions of `auto`."""

import math
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch

from shards import Loader, Selection, ShardSet
from shards.common.errors import UsageError
from shards.engines.choose import choose
from shards.plan import Augment, evaluation_plan
from train import checkpoint
from train import device as devices
from train.checkpoint import Progress
from train.compiling import Compilation
from train.config import Config, check_batch, resolution_of
from train.console import Console
from train.device import Decision
from train.distributed import World
from train.graphed import Graphs
from train.graphed import choose as choose_graph
from train.mixing import Mixing, mixes
from train.step import TrainingStep
from train.workspace import Workspace

AT_ONCE = "the cells that the grid trains at the same time on the device"
MOST_REDUCTION = 2.0
"""Engines resize without antialiasing. Images that shrink by more than this lose pixels."""


@dataclass
class Run:
    """Everything that takes part in one run.

    selections, loaders: by split. class_counts: training images of each class. total: optimizer steps of the whole run.
    sizes: resolution of each epoch, px. chosen: what `auto` chose for engine, precision, layout and threads, and what
    the network starts from. busy: readings of how busy the GPU of this process was in training, since the run was
    started or resumed, 0 to 1.
    """

    config: Config
    world: World
    data: ShardSet
    selections: dict[str, Selection]
    loaders: dict[str, Loader]
    class_counts: list[int]
    step: TrainingStep
    graphs: Graphs
    compilation: Compilation
    total: int
    sizes: list[int]
    chosen: dict[str, Decision]
    busy: list[float] = field(default_factory=list)

    @property
    def decisions(self) -> dict[str, Decision]:
        """What was chosen, and why, by name: `engine`, `precision`, `threads`, `weights`, `compile` …"""
        return self.chosen | {"compile": self.compilation.decision, "graph": self.graphs.decision}


def choose_data(config: Config, data: ShardSet, family: str, world: World) -> dict[str, Selection]:
    """The selections of a run by split, without `val` if that is empty.

    Raises UsageError if the images, the ranks or the device do not allow the run.
    """
    data.require_labels()
    found = {"train": data.select("train", config.fraction, config.subset_seed, config.where)}
    if "val" in data.column("split"):
        found["val"] = data.select("val", where=config.where)
    found["test"] = data.select("test", where=config.where)
    if config.sync_batch_norm and family != "batchnorm":
        raise UsageError(f"--sync-batch-norm: {config.model} has no batch norm; leave the option out")
    if config.sync_batch_norm and world.device.type == "cpu":
        raise UsageError(
            "--sync-batch-norm needs a GPU for each process, and this run uses a CPU; leave the option out"
        )
    images = len(found["train"])
    if config.batch_size > images:
        raise UsageError(
            f"--batch-size {config.batch_size} is larger than the training set of {images} images "
            f"(--fraction {config.fraction:g}): choose {images} or less"
        )
    check_batch(config, family, world.size)
    return found


def augment_of(config: Config, interpolation: str) -> Augment:
    """How the loaders of a run crop, vary and resize images. config: resolved."""
    if config.crop_scale is None or config.colour_jitter is None:
        raise ValueError("the configuration is not resolved")
    jitter = config.colour_jitter
    return Augment(
        scale=(config.crop_scale, 1.0),
        ratio=(1 / config.crop_ratio, config.crop_ratio),
        symmetries=config.symmetries,
        brightness=jitter,
        contrast=jitter,
        saturation=jitter,
        hue=jitter / 10,
        eval_crop=config.eval_crop,
        interpolation=interpolation,
    )


def reduction_warning(loader: Loader) -> str | None:
    """A warning if evaluation crops shrink by more than MOST_REDUCTION, on average; None if not."""
    data, samples, px = loader.selection.data, loader.selection.samples, loader.resolution
    heights, widths = data.column("height")[samples], data.column("width")[samples]
    crop = int(np.median(evaluation_plan(heights, widths, loader.augment).boxes[:, 2]))
    if crop <= MOST_REDUCTION * px:
        return None
    longer = float(np.median(np.maximum(heights, widths)))
    return (
        f"evaluation crops of {crop} px shrink to {px} px, {crop / px:.2f} times: above {MOST_REDUCTION:g} times, some "
        "pixels are decoded and then ignored; pack the images with "
        f"--max-resolution {int(longer * MOST_REDUCTION * px / crop)} or less, or train at --resolution "
        f"{math.ceil(crop / MOST_REDUCTION)} or more"
    )


def prepare(
    config: Config,
    family: str,
    world: World,
    workspace: Workspace,
    selections: dict[str, Selection],
    earlier: dict[str, Decision],
    stack: ExitStack,
) -> Run:
    """Build a run, not yet compiled or distributed.

    earlier: the decisions of an earlier start that still hold. stack: closes the loaders, and puts back the number of
    threads. Raises UsageError or DataError as the parts do.
    """
    device, data = world.device, selections["train"].data
    before = torch.get_num_threads()
    threads = devices.use_threads(config.threads, earlier.get("threads"))
    if int(threads.value) != before:
        stack.callback(torch.set_num_threads, before)  # for the next run of a worker
    precision = earlier.get("precision") or devices.precision(device, config.precision)
    net = workspace.network(config, data, world)
    chosen, classes = selections["train"], len(data.manifest.classes)
    counts = np.bincount(chosen.labels, minlength=classes).tolist()
    kind, _, column = str(config.sampler).partition(":")
    drawn = [min(count, 1) for count in counts] if kind == "balanced" else counts
    if kind == "weighted":
        drawn = np.bincount(chosen.labels, chosen.weights(column), classes).tolist()
    step = TrainingStep(net, config, drawn, precision.value)
    loaders: dict[str, Loader] = {}
    augment = augment_of(config, net.decisions["interpolation"].value)

    def choose_engine() -> Decision:
        name, _, reason = choose(config.engine, selections["train"], device, workspace.engines, augment.interpolation)
        return Decision(name, reason)

    # on the first rank, for all: one that has less free memory says so
    engine = earlier.get("engine") or world.from_first(choose_engine)
    for split, selection in selections.items():
        loaders[split] = Loader(
            selection,
            batch_size=config.batch_size,
            resolution=config.resolution,
            train=split == "train",
            seed=config.seed,
            engine=engine.value,
            device=device,
            threads=config.threads,
            rank=world.rank,
            world_size=world.size,
            augment=augment,
            sampler=config.sampler if split == "train" and config.sampler else "uniform",
            window=config.window if split == "train" else None,
            pool=workspace.engines,
        )
        stack.callback(loaders[split].close)
    length = len(loaders["train"])
    if config.erasing or mixes(config):
        step.mixing = Mixing(config, length, world)
    graphs = Graphs(step, loaders["train"], choose_graph(step, engine.value, world))
    if graphs.on:
        step.graphed = True
        loaders["train"].load()
    total = config.steps or config.epochs * length
    epochs = math.ceil(total / length)
    sizes = [resolution_of(config, epoch, epochs) for epoch in range(epochs)]
    workspace.compilation.decide(step, config, sizes, total, world, earlier.get("compile"))
    chosen = {
        "engine": engine,
        "precision": precision,
        "memory_format": workspace.memory_format,
    }
    return Run(
        config=config,
        world=world,
        data=data,
        selections=selections,
        loaders=loaders,
        class_counts=counts,
        step=step,
        graphs=graphs,
        compilation=workspace.compilation,
        total=total,
        sizes=sizes,
        chosen={name: earlier.get(name, decision) for name, decision in chosen.items()}
        | net.decisions
        | {"threads": threads}
        | ({"per_device": Decision(str(world.per_device), AT_ONCE)} if world.per_device > 1 else {}),
    )


def compile_and_distribute(run: Run, progress: Progress, console: Console) -> None:
    """Make the run's step what training calls: compiled, for every resolution still to come, and distributed."""
    sizes = sorted(set(run.sizes[progress.epoch :]))
    progress.seconds["compile"] += run.compilation.compile(run.step, run.config, sizes, run.world, console)
    run.step.distribute(run.world)
    run.graphs.console = console
    # again, because deciding and compiling may have drawn random numbers
    checkpoint.seed_torch(run.config.seed, run.world.rank)
