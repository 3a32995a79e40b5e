"""The `training` benchmark: images per second of the models, each beside its ceiling and the usual way to train it.

A system is a model, a style and a source of batches. A step is what a run does: forward, loss, backward, optimizer.
`eager NCHW` is how these models are usually run first: plain PyTorch, contiguous, images scaled and normalised one
operation at a time. `channels-last` and `compiled` are this project's own step (`train/step.py`). All compute in what
the device trains in by default, except those `in fp32`. `cached batch` feeds the same batch of real images again and
again: no loader can be faster than that.
"""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from benchmarks.datasets import ORIGINALS, Format, Job, prepared, samples
from benchmarks.machine import drop_from_cache, read_into_cache
from benchmarks.measure import Measurement, Row, ratio_rows, series_rows
from benchmarks.options import ADD, ONLY, WORKERS, Settings, benchmark, training_options
from benchmarks.pages import Page
from benchmarks.peers.ours import SHARDS_JPG, SHARDS_RAW, loader_of, shard_set
from benchmarks.tables import cell, ratios, read_csv, table
from benchmarks.worker import Running, take_turns
from shards.common.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from train.models import Classifier

EAGER, LAST, COMPILED = STYLES = ("eager NCHW", "channels-last", "compiled")
FP32 = " in fp32"
"""Ends the name of a style that is float32 on every device."""
CACHED, NATIVE, COLD, FOLDER = "cached batch", "native loader", "native loader, cold files", "ImageFolder"
RAW, COLD_RAW, RESIDENT = "native loader, raw", "native loader, raw, cold files", "resident loader"
DALI, COLD_DALI = "dali loader", "dali loader, cold files"


def system_name(style: str, source: str) -> str:
    """The name of a way to train in the tables."""
    return f"{style}, {source}"


BASELINE = system_name(EAGER + FP32, FOLDER)
SYSTEMS = (*(system_name(style, source) for style in STYLES for source in (CACHED, NATIVE)), BASELINE)
IN_FP32 = tuple(system_name(style + FP32, CACHED) for style in (EAGER, COMPILED))

RATIOS = (
    (system_name(LAST, CACHED), system_name(EAGER, CACHED)),
    (system_name(COMPILED, CACHED), system_name(EAGER, CACHED)),
    (system_name(COMPILED, CACHED), system_name(EAGER + FP32, CACHED)),
    (system_name(COMPILED + FP32, CACHED), system_name(EAGER + FP32, CACHED)),
    (system_name(COMPILED, NATIVE), system_name(EAGER, NATIVE)),
    (system_name(COMPILED, NATIVE), BASELINE),
    (system_name(LAST, NATIVE), BASELINE),
    *((system_name(style, NATIVE), system_name(style, CACHED)) for style in STYLES),
)

_LOADERS: dict[str, tuple[Format, str]] = {
    NATIVE: (SHARDS_JPG, "native"),
    COLD: (shard_set("shards-cold", "jpg"), "native"),
    RAW: (SHARDS_RAW, "native"),
    COLD_RAW: (shard_set("shards-cold-raw", "raw"), "native"),
    RESIDENT: (SHARDS_JPG, "resident"),
    DALI: (SHARDS_JPG, "dali"),
    COLD_DALI: (shard_set("shards-cold-dali", "jpg"), "dali"),
}
"""Format of the images and engine of each of our loaders. Cold files have copies of their own: the kernel drops only
files that no other process has mapped."""

_READ_AHEAD = 2
"""Batches that our engines, and each worker of a DataLoader, prepare ahead. After a pause, or after files were opened
again, these are ready. So many steps later a step waits as in the middle of a training."""

_NOTES = {
    EAGER: "contiguous; scaled and normalised one operation at a time, no colour map; PyTorch's own optimizer",
    LAST: "this project's input head with its colour map; fused optimizer; on a CPU freed memory is kept",
    COMPILED: "the same under torch.compile, static shapes; steady state, compile time apart (cold compiler cache)",
}


@dataclass(frozen=True)
class TrainingJob:
    """What is trained.

    images: what it is trained on; its batch_size is that of training. device: as `train.run` takes it.
    """

    images: Job
    model: str
    device: str = "auto"

    def columns(self, benchmark: str, measurement: Measurement, name: str, **more: Any) -> dict[str, Any]:
        """The fields of Row that the rows of a system share, and more of them."""
        packed = "400 px raw" if RAW in name else "400 px jpg"
        if FOLDER in name:
            packed = "originals"
        cache = "" if CACHED in name else "cold" if name.endswith("cold files") else "warm"
        own = {"system": name, "model": self.model, "packed": packed, "page_cache": cache}
        return measurement.columns(benchmark, self.images, **own | more)


# ------------------------------------------------------------------ the command


@benchmark(
    "training", ONLY, WORKERS, *training_options(quick=["alexnet"]), ADD, rounds=(6, 5), seconds=(4, 0.25)
)  # alexnet compiles fastest
@click.option(
    "--fp32",
    is_flag=True,
    help="Also eager and compiled in float32, if the device trains in less. Takes two systems more.",
)
def command(settings: Settings, fp32: bool) -> None:
    """Images per second of the models: eager, channels-last, compiled, each beside a cached batch.

    Compiling starts with an empty cache: resnet18 takes a minute on two cores. So --quick trains alexnet, and does not
    judge the target, which is for resnet18.
    """
    known = {name: name for name in (*SYSTEMS, *(IN_FP32 if fp32 else ()))}
    names = settings.chosen(known)
    steps = len(names) * (2 + settings.rounds)
    train_models(settings, PAGE, steps, lambda job, measurement: measure_training(job, names, measurement))


def train_models(
    settings: Settings,
    page: Page,
    steps: int,
    measure: Callable[[TrainingJob, Measurement], list[Row]],
    resolution_px: int = 224,
) -> None:
    """Run a benchmark that trains, model by model; the table is written after each, so that a stop loses only one.

    steps: of one model. resolution_px: side of the images. Raises UsageError for models or sizes that do not fit,
    DataError where the source is not a HAM10000-shaped folder.
    """
    from train.models import MODELS

    models = settings.models or tuple(MODELS)
    settings.check_models()
    images = replace(settings.job(400, 1248, quick=624), resolution_px=resolution_px)
    count = len(samples(images))
    if images.batch_size > count:
        raise UsageError(f"--batch-size {images.batch_size}: an epoch has {count:,} samples; use a smaller one")
    rows = kept(settings, models) if settings.add else []
    with settings.measurement(images, len(models) * steps) as measurement:
        for model in models:
            rows += measure(TrainingJob(images, model, settings.device), measurement)
            settings.publish(page, rows, show=model == models[-1])


def kept(settings: Settings, models: Sequence[str]) -> list[Row]:
    """The rows of the table about other models than these; none where there is no table yet."""
    table = settings.table
    return [row for row in read_csv(table) if row.model not in models] if table.exists() else []


# ------------------------------------------------------------------ the systems


def set_up(name: str, job: TrainingJob) -> Running:
    """Build, compile and warm up one way to train `job.model`.

    `compile_s` in `about`, for a compiled model with a cached batch: the seconds that its first step took longer than
    a later one. With a loader it takes the compiled code from there.
    """
    from train import device as devices

    device = devices.choose(job.device)
    devices.prepare(device, keep_memory=not name.startswith(EAGER))  # which is not usual
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
        for _ in range(20 if device.type == "cuda" else 1):  # a GPU is synchronized once in 20 steps
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
    """What a system computes in: `fp32` if its style says so, otherwise the default of `train.run` on this device."""
    from train import device as devices

    return "fp32" if FP32 in name else devices.precision(device, "auto").value


def _compiler_cache(job: TrainingJob, style: str, cold: bool) -> None:
    """Use a compiler cache for this model and style alone; cold: empty it, so that compiling is timed in full."""
    home = job.images.cache / "compiled" / f"{job.model}-{style.replace(' ', '-')}"
    if cold:
        shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(home.resolve())


Step = Callable[["Tensor", "Tensor", "Tensor"], Any]
"""One training step on images (N, 3, S, S) uint8, colour (N, 3, 4) and labels (N,): it updates the weights."""


def _step(style: str, job: TrainingJob, device: "torch.device") -> Step:
    """The step of a style on a new network, with the recipe of the model."""
    import torch

    from shards import ShardSet
    from train import device as devices
    from train import models
    from train.config import Config, resolved
    from train.step import TrainingStep

    torch.manual_seed(0)
    data = ShardSet(prepared(SHARDS_JPG, job.images) / "set")
    manifest, images = data.manifest, job.images
    classes = len(manifest.classes)
    net = models.build(job.model, images.resolution_px, classes, manifest.mean, manifest.std).to(device).train()
    models.lay_out(net, "auto", device)
    if style.startswith(EAGER):
        return _usual_step(net, job.model, precision_of(style, device), device, (manifest.mean, manifest.std))
    config = Config(model=job.model, data=str(data.path), batch_size=images.batch_size, resolution=images.resolution_px)
    config = resolved(config, models.family(job.model))
    step = TrainingStep(net, config, list(manifest.counts["train"].values()), precision_of(style, device))
    if style.startswith(COMPILED):
        step.model = torch.compile(net, dynamic=False, mode=devices.compile_mode(device, processes=1))
    return lambda images, colour, labels: step(images, colour, labels, 1e-3)


def _usual_step(
    net: "Classifier", model: str, precision: str, device: "torch.device", colours: tuple[tuple[float, ...], ...]
) -> Step:
    """The step that people write first, with nothing of this project's but the network's body and its recipe.

    colours: mean and standard deviation of the channels, for a normalisation as torchvision's transforms do it.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils import clip_grad_norm_

    from train import device as devices
    from train import models
    from train.config import RECIPES

    body = net.body.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in colours)
    recipe = RECIPES[models.family(model)]
    if recipe.optimizer == "sgd-nesterov":
        optimizer = torch.optim.SGD(body.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
    else:
        optimizer = torch.optim.AdamW(body.parameters(), lr=1e-3)
    scaler = devices.scaler(device, precision)

    def step(images: "Tensor", colour: "Tensor", labels: "Tensor") -> None:
        with devices.autocast(device, precision):
            loss = cross_entropy(body((images.contiguous().float() / 255.0 - mean) / std), labels)
        scaler.scale(loss).backward()
        if recipe.clip is not None:
            scaler.unscale_(optimizer)
            clip_grad_norm_(body.parameters(), recipe.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


# ------------------------------------------------------------------ where batches come from


@dataclass
class _Feed:
    """A source of batches.

    batches: without end; for cold files one epoch, because a second one would find them warm. reset: called before
    each round, not timed. settling: untimed steps after that, because a pause changed what is read ahead.
    """

    batches: "Iterator[tuple[Tensor, Tensor, Tensor]]"
    reset: Callable[[], None] = lambda: None
    settling: int = 0


def _feed(source: str, style: str, job: TrainingJob, device: "torch.device") -> _Feed:
    from shards import ShardSet

    if source == FOLDER:  # its worker processes go on while other systems have their turn
        read_into_cache(prepared(ORIGINALS, job.images))
        return _Feed(_endless_folder(job.images, device), settling=_READ_AHEAD * job.images.workers)
    if source == CACHED:
        batch = next(_endless_shards(job.images, device))
        if style.startswith(EAGER):
            batch = (batch[0].contiguous(), *batch[1:])
        return _Feed(itertools.repeat(batch))
    home = prepared(_LOADERS[source][0], job.images)
    if source in (NATIVE, RAW, RESIDENT, DALI):
        read_into_cache(home)
        return _Feed(_endless_shards(job.images, device, source))
    with ShardSet(home / "set") as data:
        steps = len(data.select("train")) // job.images.batch_size
    held = _endless_shards(job.images, device, source)
    feed = _Feed(held, settling=_READ_AHEAD)

    def reset() -> None:
        nonlocal held
        held.close()  # while the files are mapped, the kernel keeps them
        drop_from_cache(home / "set")
        held = _endless_shards(job.images, device, source)
        first = next(held)  # opening and the first batch are not counted
        # ends with the epoch, before the generator does: that would close its loader in a timed step
        feed.batches = itertools.islice(itertools.chain([first], held), steps)

    feed.reset = reset
    return feed


def _endless_shards(
    images: Job, device: "torch.device", source: str = NATIVE
) -> "Generator[tuple[Tensor, Tensor, Tensor], None, None]":
    """This project's batches, epoch after epoch, without end. The files are open until the generator is closed."""
    from contextlib import closing

    from shards import ShardSet

    kind, engine = _LOADERS[source]
    home = prepared(kind, images) / "set"
    with ShardSet(home) as data, closing(loader_of(data, images, engine, device)) as loader:
        while True:
            for batch in loader:
                yield batch.images, batch.colour, batch.labels


def _endless_folder(job: Job, device: "torch.device") -> "Iterator[tuple[Tensor, Tensor, Tensor]]":
    """torchvision's ImageFolder and DataLoader on the originals, epoch after epoch."""
    import torch

    from benchmarks.peers.pytorch import image_folder

    epoch = image_folder(job, prepared(ORIGINALS, job), pin=device.type == "cuda")
    colour = torch.eye(3, 4).repeat(job.batch_size, 1, 1).to(device)
    while True:
        for images, labels in epoch():
            yield images.to(device, non_blocking=True), colour, labels.to(device, non_blocking=True)


# ------------------------------------------------------------------ the measurement


def measure_training(job: TrainingJob, names: Sequence[str], measurement: Measurement) -> list[Row]:
    """Time the ways to train one model, in turn; warm page cache."""
    from train import device as devices

    device = devices.choose(job.device)
    series, about = take_turns(set_up, names, job, job.images.cache / "logs", measurement, frozen=True)

    def columns(name: str) -> dict[str, Any]:
        own = {"precision": precision_of(name, device), "page_cache": "warm"}
        return job.columns("training", measurement, name, **own)

    rows: list[Row] = []
    for name in names:
        own = columns(name)
        style = name.partition(", ")[0]
        rows += series_rows(series[name], note=_NOTES.get(style, "") if CACHED in name else "", **own)
        if "compile_s" in about.get(name, {}):
            rows.append(Row(metric="compile_s", unit="s", value=about[name]["compile_s"], **own))
    return rows + ratio_rows(RATIOS, series, columns)


def tables(rows: Sequence[Row]) -> list[str]:
    """A line per model and way to train it, and the ratios."""
    models = list(dict.fromkeys(row.model for row in rows))
    found = {(row.model, row.system, row.metric): row for row in rows if not row.beside}
    lines = []
    for (model, system, metric), row in found.items():
        if metric == "img_per_s":
            compiled = found.get((model, system, "compile_s"))
            lines.append([model, str(row.batch_size or ""), system, row.precision, cell(row), cell(compiled)])
    lines.sort(key=lambda line: models.index(line[0]))
    return [
        "Whole steps: forward, loss, backward, optimizer. Median [interval].\n",
        table(["model", "batch", "system", "precision", "img/s", "compile s"], lines),
        ratios(rows, "img/s"),
    ]


PAGE = Page("training", "Training", tables)
