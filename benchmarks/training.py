"""The systems of the `training` and `stalls` benchmarks: a model, how it is run, and where its batches come from.

A step is what a run does: forward, loss, backward, optimizer. `eager NCHW` is how these models are usually run first:
contiguous, images scaled and normalised one operation at a time. `channels-last` and `compiled` are this project's own
network, with its input head. All compute in what the device trains in by default, but for those `in fp32`. `cached
batch` feeds the same batch of real images again and again: no
loader can be faster than that.
"""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.cold import drop_from_cache, read_into_cache
from benchmarks.datasets import prepared
from benchmarks.peak import matrix_peak
from benchmarks.peers.system import Work
from benchmarks.worker import Running

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

EAGER, LAST, COMPILED = STYLES = ("eager NCHW", "channels-last", "compiled")
FP32 = " in fp32"
"""Ends the name of a style that is float32 whatever the device trains in."""
CACHED, NATIVE, COLD, FOLDER = "cached batch", "native loader", "native loader, cold files", "ImageFolder"
RAW, COLD_RAW, RESIDENT = "native loader, raw", "native loader, raw, cold files", "resident loader"
DALI, COLD_DALI = "dali loader", "dali loader, cold files"
MATRIX = "matrix multiply"
"""The system that measures the device's peak: products of square matrices, counted in GFLOP."""

_FORMS = {
    NATIVE: ("shards-jpg", "native"),
    COLD: ("shards-cold", "native"),
    RAW: ("shards-raw", "native"),
    COLD_RAW: ("shards-cold-raw", "native"),
    RESIDENT: ("shards-jpg", "resident"),
    DALI: ("shards-jpg", "dali"),
    COLD_DALI: ("shards-cold-dali", "dali"),
}
"""Of each of our loaders: the form of the images, and the engine."""

_READ_AHEAD = 2
"""Batches that our engines, and each worker of a DataLoader, have ready. After a pause, or when files were opened anew,
nobody waits for those: so many steps later a step waits as in the middle of a training."""


@dataclass(frozen=True)
class TrainingJob:
    """What is trained. work: the images; its batch_size is that of training. device: as `train.run` takes it.

    waited_for: the device ends each step before the next batch is asked for, so that what is counted as waiting is
    time in which it had nothing to do. Else a host that runs ahead of a GPU waits for batches that are not yet needed.
    """

    work: Work
    model: str
    device: str = "auto"
    waited_for: bool = False


def system_name(style: str, source: str) -> str:
    """How tables call a way to train."""
    return f"{style}, {source}"


@dataclass
class _Feed:
    """Where batches come from. batches: endless, but for cold files one epoch, for a second one would find them warm;
    reset: untimed, before each round; settling: untimed steps after that, where a pause changed what is read ahead."""

    batches: "Iterator[tuple[Tensor, Tensor, Tensor]]"
    reset: Callable[[], None] = lambda: None
    settling: int = 0


def set_up(name: str, job: TrainingJob) -> Running:
    """Build, compile and warm up one way to train `job.model`, or the matrix product.

    Figures: `compile_s`, seconds of the first step beyond a later one, where it is compiled and fed a cached batch;
    with the loader it takes the compiled code from there.
    """
    from train import device as devices

    device = devices.choose(job.device)
    devices.prepare(device, keep_memory=not name.startswith(EAGER))  # which is not usual
    if name.startswith(MATRIX):
        return matrix_peak(device, precision_of(name, device))
    style, _, source = name.partition(", ")
    compiled = style.startswith(COMPILED)
    if compiled:
        _compiler_cache(job, style, cold=source == CACHED)
    step = _step(style, job, device)
    feed = _feed(source, style, job, device)
    waited = 0.0

    def once() -> int:
        nonlocal waited
        count = 0
        for _ in range(20 if device.type == "cuda" else 1):  # a GPU is waited for once in 20 steps
            if job.waited_for:
                devices.synchronize(device)
            begin = time.perf_counter()
            batch = next(feed.batches, None)
            waited += time.perf_counter() - begin
            if batch is None:
                break
            step(*batch)
            count += len(batch[0])
        devices.synchronize(device)
        return count

    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - begin)
    about = {"compile_s": max(seconds[0] - min(seconds[1:]), 0.0)} if compiled and source == CACHED else {}

    def settle() -> None:
        feed.reset()
        for batch in itertools.islice(feed.batches, feed.settling):
            step(*batch)
        devices.synchronize(device)

    return Running(once, settle, about=about, waited=lambda: waited)


def precision_of(name: str, device: "torch.device") -> str:
    """What a system computes in: `fp32` where its style says so, else what `train.run` takes by default here."""
    from train import device as devices

    return "fp32" if FP32 in name else devices.precision(device, "auto").value


def _compiler_cache(job: TrainingJob, style: str, cold: bool) -> None:
    """A compiler cache of this model and style alone; cold: emptied, so that what is timed is a cold start."""
    home = job.work.cache / "compiled" / f"{job.model}-{style.replace(' ', '-')}"
    if cold:
        shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(home.resolve())


def _step(style: str, job: TrainingJob, device: "torch.device") -> "Callable[[Tensor, Tensor, Tensor], None]":
    """One training step: (images (N, 3, S, S) uint8, colour (N, 3, 4), labels (N,)) → nothing; weights are updated."""
    import torch

    from shards import ShardSet
    from train import device as devices
    from train import models
    from train.config import RECIPES
    from train.loss import Loss

    torch.manual_seed(0)
    data = ShardSet(prepared("shards-jpg", job.work) / "set")
    mean, std = data.manifest.mean, data.manifest.std
    net: Any = models.build(job.model, job.work.resolution_px, 7, mean, std)
    recipe = RECIPES[models.family(job.model)]
    counts = list(data.manifest.counts["train"].values())
    loss = Loss("logit-adjusted", counts, device)
    precision = precision_of(style, device)
    if style.startswith(EAGER):
        net = _plain(net, mean, std).to(device)
        net = net.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        optimizer = _plain_optimizer(net, recipe.optimizer)
    else:
        net = net.to(device)
        optimizer = devices.optimizer(models.parameter_groups(net, recipe.weight_decay), recipe.optimizer, 1e-3)
    net.train()
    scaler = devices.scaler(device, precision)
    model = net
    if style.startswith(COMPILED):
        model = torch.compile(net, dynamic=False, mode=devices.compile_mode(device, processes=1))

    def step(images: "Tensor", colour: "Tensor", labels: "Tensor") -> None:
        with devices.autocast(device, precision):
            logits = model(images, colour)
        total, _ = loss(logits, labels)
        scaler.scale(total / len(labels)).backward()
        if recipe.clip is not None:
            scaler.unscale_(optimizer)
            devices.clip_gradients(net.parameters(), recipe.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def _plain(net: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> "nn.Module":
    """The network behind a plain normalisation, as torchvision's transforms do it, without a colour map."""
    import torch
    from torch import nn

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net.body
            self.mean = nn.Buffer(torch.tensor(mean).view(1, 3, 1, 1))
            self.std = nn.Buffer(torch.tensor(std).view(1, 3, 1, 1))

        def forward(self, images: "Tensor", colour: "Tensor") -> "Tensor":
            return self.body((images.contiguous().float() / 255.0 - self.mean) / self.std)

    return Plain()


def _plain_optimizer(net: "nn.Module", name: str) -> "torch.optim.Optimizer":
    """PyTorch's optimizers with their own defaults."""
    import torch

    if name == "sgd-nesterov":
        return torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return torch.optim.AdamW(net.parameters(), lr=1e-3)


def _feed(source: str, style: str, job: TrainingJob, device: "torch.device") -> _Feed:
    from shards import ShardSet

    if source == FOLDER:  # its worker processes go on while others have their turn
        read_into_cache(prepared("originals", job.work))
        return _Feed(_endless_folder(job.work, device), settling=_READ_AHEAD * job.work.workers)
    if source == CACHED:
        batch = next(_native(job, device))
        if style.startswith(EAGER):
            batch = (batch[0].contiguous(), *batch[1:])
        return _Feed(itertools.repeat(batch))
    if source in (NATIVE, RAW, RESIDENT, DALI):
        read_into_cache(prepared(_FORMS[source][0], job.work))
        return _Feed(_native(job, device, source))
    folder = prepared(_FORMS[source][0], job.work) / "set"
    with ShardSet(folder) as data:
        steps = len(data.select("train")) // job.work.batch_size
    held = _native(job, device, source)
    feed = _Feed(held, settling=_READ_AHEAD)

    def reset() -> None:
        nonlocal held
        held.close()  # while the files are mapped, the kernel keeps them
        drop_from_cache(folder)
        held = _native(job, device, source)
        first = next(held)  # opening and the first batch are not counted
        # cut where the epoch ends: a generator that came to its own end would close its loader in a timed step
        feed.batches = itertools.islice(itertools.chain([first], held), steps)

    feed.reset = reset
    return feed


def _native(
    job: TrainingJob, device: "torch.device", source: str = NATIVE
) -> "Generator[tuple[Tensor, Tensor, Tensor], None, None]":
    """This project's batches, epoch after epoch, without end; the files are open for as long as this is."""
    from contextlib import closing

    from shards import Loader, ShardSet

    work = job.work
    form, engine = _FORMS[source]
    with (
        ShardSet(prepared(form, work) / "set") as data,
        closing(
            Loader(
                data.select("train"),
                batch_size=work.batch_size,
                resolution=work.resolution_px,
                engine=engine,
                device=device,
                threads=work.workers,
            )
        ) as loader,
    ):
        while True:
            for batch in loader:
                yield batch.images, batch.colour, batch.labels


def _endless_folder(work: Work, device: "torch.device") -> "Iterator[tuple[Tensor, Tensor, Tensor]]":
    """torchvision's ImageFolder and DataLoader on the originals, epoch after epoch."""
    import torch

    from benchmarks.peers.pytorch import image_folder

    epoch = image_folder(work, prepared("originals", work), pin=device.type == "cuda")
    colour = torch.eye(3, 4).repeat(work.batch_size, 1, 1).to(device)
    while True:
        for images, labels in epoch():
            yield images.to(device, non_blocking=True), colour, labels.to(device, non_blocking=True)
