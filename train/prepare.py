"""What a run needs before its first step: data, network, optimizer, and every decision that `auto` leaves open."""

import functools
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shards import Loader, Selection, ShardSet
from shards.common.errors import UsageError, one_line
from shards.engines.resident import check_memory
from shards.order import rank_slice
from shards.plan import evaluation_plan
from train import checkpoint, compiling, models
from train import device as devices
from train.averaging import Average
from train.checkpoint import Progress
from train.config import Config, check_batch, pixel_share, resolution_of
from train.console import Console
from train.device import Decision
from train.distributed import World
from train.loss import Loss
from train.workspace import Workspace

if TYPE_CHECKING:
    from train.models import Classifier


MOST_REDUCTION = 2.0
"""How far images can be shrunk without antialiasing, as the engines do it, until pixels are passed over."""


@dataclass
class Run:
    """Everything that takes part in one run.

    selections, loaders: by split. net: the network, in whose memory the weights are; model: what is called in training,
    the same network compiled, distributed, or both. total: optimizer steps of the whole run. sizes: resolution of each
    epoch, px. class_counts: training images of each class. decided: by name (`compile`, `engine`, `precision`,
    `threads`). kept: these are the decisions of an earlier start of this run, and nothing is decided anew.
    """

    config: Config
    world: World
    data: ShardSet
    selections: dict[str, Selection]
    loaders: dict[str, Loader]
    class_counts: list[int]
    net: "Classifier"
    model: Callable[..., Tensor]
    loss: Loss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    precision: str
    total: int
    sizes: list[int]
    decided: dict[str, Decision]
    kept: bool = False

    @property
    def reported(self) -> "Classifier":
        """The network with the weights that are evaluated and kept: the averaged ones where there are any."""
        return self.average.net if self.average is not None else self.net

    def backward(self, batch: tuple[Tensor, Tensor, Tensor], model: Any = None, world: World | None = None) -> Tensor:
        """Gradients of this rank's share of the global batch's mean loss; returns that share, on the device.

        batch: images, colour, labels as in `shards.Batch`. No host sync.
        """
        world = world or self.world
        images, colour, labels = batch
        with devices.autocast(world.device, self.precision):
            logits = (self.model if model is None else model)(images, colour)  # a compiled one has no truth value
        part, weight = self.loss(logits, labels)
        share = part / (self.config.batch_size if weight is None else world.sum(weight.detach()))
        # times the number of ranks, because DistributedDataParallel takes the mean of their gradients
        self.scaler.scale(share * world.size).backward()
        return share.detach()

    def update(self, step: int, lr: float) -> None:
        """One optimizer step with the gradients in hand. No host sync."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.config.clip is not None:
            self.scaler.unscale_(self.optimizer)
            devices.clip_gradients(self.net.parameters(), self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it. The model's names are plain: neither the compiler's nor DDP's prefix."""
        return {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.net.state_dict() if self.average is not None else None,
            "loader": self.loaders["train"].state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the run was not in fp16 before, which a new decision may have changed
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.net.load_state_dict(state["average"])
        self.loaders["train"].load_state_dict(state["loader"])


def choose_data(config: Config, data: ShardSet, family: str, world: World) -> dict[str, Selection]:
    """The selections of a run by split. Raises UsageError for a batch that images or ranks cannot fill."""
    found = {
        "train": data.select("train", config.fraction, config.subset_seed),
        "val": data.select("val"),
        "test": data.select("test"),
    }
    if config.sync_batch_norm and family != "batchnorm":
        raise UsageError(f"--sync-batch-norm: {config.model} has no batch norm; leave the option out")
    images = len(found["train"])
    if config.batch_size > images:
        raise UsageError(
            f"--batch-size {config.batch_size} is larger than the training set of {images} images "
            f"(--fraction {config.fraction:g}): choose {images} or less"
        )
    check_batch(config.batch_size, family, world.size)
    return found


def reduction_warning(loader: Loader) -> str | None:
    """A line about evaluation crops that are shrunk by more than MOST_REDUCTION, on average; None where none is due."""
    data, samples, px = loader.selection.data, loader.selection.samples, loader.resolution
    heights, widths = data.column("height")[samples], data.column("width")[samples]
    crop = int(np.median(evaluation_plan(heights, widths, loader.augment).boxes[:, 2]))
    if crop <= MOST_REDUCTION * px:
        return None
    longer = float(np.median(np.maximum(heights, widths)))
    return (
        f"evaluation cuts out {crop} px and shrinks them to {px} px, {crop / px:.2f} times: above {MOST_REDUCTION:g} "
        "times some pixels do not count at all, and more are decoded than are needed; better pack the images with "
        f"--max-resolution {int(longer * MOST_REDUCTION * px / crop)} or less, or train at --resolution "
        f"{math.ceil(crop / MOST_REDUCTION)} or more"
    )


def prepare(
    config: Config,
    family: str,
    world: World,
    workspace: Workspace,
    selections: dict[str, Selection],
    kept: dict[str, tuple[str, str]] | None,
    stack: ExitStack,
) -> Run:
    """Build a run, not yet compiled or distributed. kept: the decisions of its earlier start, where they still hold.

    stack: closes the loaders. Raises UsageError or DataError as the parts do.
    """
    device, data = world.device, selections["train"].data
    decided = {name: Decision(*taken) for name, taken in (kept or {}).items()}
    if "threads" in decided:
        torch.set_num_threads(int(decided["threads"].value))
    precision = decided.get("precision") or devices.precision(device, config.precision)
    net = workspace.network(config, data, world)
    optimizer = devices.optimizer(
        models.parameter_groups(net, config.weight_decay or 0.0), config.optimizer or "", config.lr or 0.0
    )
    counts = torch.from_numpy(selections["train"].labels).bincount(minlength=len(data.manifest.classes)).tolist()
    loaders: dict[str, Loader] = {}
    engine = decided["engine"].value if decided else config.engine
    for split, selection in selections.items():
        loaders[split] = Loader(
            selection,
            batch_size=config.batch_size,
            resolution=config.resolution,
            train=split == "train",
            seed=config.seed,
            engine=engine,
            device=device,
            rank=world.rank,
            world_size=world.size,
            pool=workspace.engines,
        )
        stack.callback(loaders[split].close)
        engine = loaders[split].engine_name
    if engine == "resident":  # each alone may fit, and the test split is decoded after hours of training
        check_memory(list(selections.values()), str(device))
    length = len(loaders["train"])
    total = config.steps or config.epochs * length
    epochs = math.ceil(total / length)
    run = Run(
        config=config,
        world=world,
        data=data,
        selections=selections,
        loaders=loaders,
        class_counts=counts,
        net=net,
        model=net,
        loss=Loss(config.loss, counts, device),
        optimizer=optimizer,
        scaler=devices.scaler(device, precision.value),
        average=Average(net, config.ema) if config.ema else None,
        precision=precision.value,
        total=total,
        sizes=[resolution_of(config, epoch, epochs) for epoch in range(epochs)],
        decided=decided,
        kept=bool(decided),
    )
    if not decided:
        run.decided = {
            "engine": Decision(loaders["train"].engine_name, loaders["train"].engine_reason),
            "precision": precision,
            "threads": Decision(str(torch.get_num_threads()), "PyTorch's own choice"),
            "compile": world.from_first(lambda: _decide_to_compile(run, workspace)),
        }
    return run


def _rank_images(run: Run) -> int:
    """Images of each batch that are this rank's."""
    share = rank_slice(run.config.batch_size, run.world.rank, run.world.size)
    return share.stop - share.start


def _decide_to_compile(run: Run, workspace: Workspace) -> Decision:
    """`torch.compile` or not, from what this run, and later ones in this process, would take without."""
    if run.config.compile == "auto" and workspace.decision is not None:
        return workspace.decision
    work = run.total * pixel_share(run.config, len(run.sizes))
    work += workspace.images_ahead / run.config.batch_size
    device = run.world.device

    def eager_run_s() -> float:
        step = functools.partial(run.backward, model=run.net, world=World(device=device))
        return work * compiling.step_s(run.net, step, _rank_images(run), run.config.resolution, device)

    layers = models.depth(run.net) * len(set(run.sizes))  # each size is compiled for by itself
    workspace.decision = compiling.decide(run.config.compile, layers, device, eager_run_s)
    return workspace.decision


def _try_out(run: Run, model: Callable[..., Tensor]) -> Decision:
    """Compiled or not, by timing both. The first rank decides for all."""
    alone = World(device=run.world.device)
    steps = [functools.partial(run.backward, model=tried, world=alone) for tried in (run.net, model)]
    return compiling.faster(run.net, steps[0], steps[1], _rank_images(run), run.config.resolution, alone.device)


def compile_and_distribute(run: Run, workspace: Workspace, progress: Progress, console: Console) -> None:
    """Make `run.model` what training calls. Compiling is done here, and timed, for every size that is still to come.

    Falls back to the eager network, with a warning, where the compiler fails.
    """
    device, began = run.world.device, time.perf_counter()
    if run.config.compile == "on" and run.decided["compile"].value == "off":
        console.warn(f"training without torch.compile: {run.decided['compile'].reason}")
    if run.decided["compile"].value == "on" and progress.epoch < len(run.sizes):
        count = _rank_images(run)
        sizes = sorted(set(run.sizes[progress.epoch :]))
        try:
            model = workspace.compiled(len(sizes))
            for px in sizes:
                console.at(f"compiling for {px} px", 0, 1)
                if (count, px, run.precision) not in workspace.warm:
                    step = functools.partial(run.backward, model=model, world=World(device=device))
                    compiling.warm_up(run.net, step, count, px, device)
                    workspace.warm.add((count, px, run.precision))
            run.model = model
            if device.type == "cpu" and run.config.compile == "auto" and not run.kept and not workspace.tried:
                run.decided["compile"] = workspace.decision = run.world.from_first(lambda: _try_out(run, model))
                workspace.tried = True
            if run.decided["compile"].value == "off":
                run.model = run.net
        except compiling.FAILURES as error:
            if devices.is_out_of_memory(error):
                raise
            run.decided["compile"] = Decision("off", f"compiling failed: {one_line(error, 200)}")
            workspace.decision = run.decided["compile"]
            console.warn(f"training without torch.compile: {run.decided['compile'].reason}")
        progress.seconds["compile"] += time.perf_counter() - began
    run.model = run.world.wrap(run.model)
    # so that what was drawn for the decisions and by the compiler does not count
    checkpoint.seed_everything(run.config.seed, run.world.rank)


def decisions(run: Run) -> dict[str, dict[str, str]]:
    """What `auto` chose, and why, as JSON can hold it."""
    return {name: asdict(taken) for name, taken in run.decided.items()}
