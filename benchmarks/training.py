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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.datasets import ORIGINALS, Format, Job, prepared
from benchmarks.machine import Environment, drop_from_cache, read_into_cache
from benchmarks.measure import Row, Series, ratio_row, series_rows, summary_row
from benchmarks.options import (
    advance,
    check_models,
    chosen,
    kept,
    measured_on,
    publish,
    rounds_option,
    seconds_option,
    shared,
    training_images,
    training_options,
)
from benchmarks.peers.ours import SHARDS_JPG, SHARDS_RAW, shard_set
from benchmarks.tables import busy_text, cell, machine_text, notes, table
from benchmarks.targets import targets_text
from benchmarks.worker import Announce, Running, take_turns
from train.config import FORWARD_AND_BACKWARD

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

EAGER, LAST, COMPILED = STYLES = ("eager NCHW", "channels-last", "compiled")
FP32 = " in fp32"
"""Ends the name of a style that is float32 on every device."""
CACHED, NATIVE, COLD, FOLDER = "cached batch", "native loader", "native loader, cold files", "ImageFolder"
RAW, COLD_RAW, RESIDENT = "native loader, raw", "native loader, raw, cold files", "resident loader"
DALI, COLD_DALI = "dali loader", "dali loader, cold files"
MATRIX = "matrix multiply"
"""The system that measures the device's peak: products of square matrices, counted in GFLOP."""


def system_name(style: str, source: str) -> str:
    """The name of a way to train in the tables."""
    return f"{style}, {source}"


BASELINE = system_name(EAGER + FP32, FOLDER)
SYSTEMS = (*(system_name(style, source) for style in STYLES for source in (CACHED, NATIVE)), BASELINE)
NOT_IN_QUICK = (system_name(EAGER, NATIVE),)
"""Not in the quick benchmark: the usual way to train has its own loader."""
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

    images: what it is trained on; its batch_size is that of training. device: as `train.run` takes it. synchronized:
    the device ends each step before the next batch is asked for, so that the counted wait is time in which the device
    had nothing to do. Otherwise a host that runs ahead of a GPU waits for batches that are not needed yet.
    """

    images: Job
    model: str
    device: str = "auto"
    synchronized: bool = False


# ------------------------------------------------------------------ the command


@click.command("training")
@shared
@rounds_option(6, quick=5)
@training_options(quick="alexnet")
@click.option("--add", is_flag=True, help="Keep the rows that the table in --out has for other models.")
@seconds_option(4, quick=0.25)
@click.option("--fp32", is_flag=True, help="Also eager and compiled in float32, if the device trains in less.")
def command(quick: bool, rounds: int, seconds: float, only: tuple[str, ...], fp32: bool, **settings: Any) -> None:
    """Images per second of the models: eager, channels-last, compiled, each beside a cached batch.

    Compiling starts with an empty cache: resnet18 takes a minute on two cores. So --quick trains alexnet, and does not
    judge the target, which is for resnet18. --quick does not measure eager NCHW with this project's loader, unless
    --only names it.
    """
    from train import device as devices

    known = {name: name for name in (*SYSTEMS, *(IN_FP32 if fp32 else ()))}
    names = chosen(known, only, NOT_IN_QUICK if quick else ())

    def measure(job: TrainingJob, machine: Environment, rounds: int, seconds: float, announce: Announce) -> list[Row]:
        return measure_training(job, names, machine, rounds=rounds, seconds=seconds, announce=announce)

    peaks = matrix_products(names, devices.choose(settings["device"]))
    settings["models"] = settings["models"] or (("alexnet",) if quick else ())  # alexnet compiles fastest
    train_models(
        "training", measure, len(names) + len(peaks), training_text, quick, rounds, seconds=seconds, **settings
    )


def train_models(
    name: str,
    measure: Callable[[TrainingJob, Environment, int, float, Announce], list[Row]],
    systems: int,
    text: Callable[[list], str],
    quick: bool,
    rounds: int,
    *,
    seconds: float,
    models: tuple[str, ...],
    source: Path,
    cache: Path,
    out: Path,
    workers: int,
    resolution: int,
    batch_size: int,
    device: str,
    add: bool,
) -> None:
    """Run a benchmark that trains, model by model; the table is written after each, so that a stop loses only one."""
    from shards.common.progress import Progress
    from train.models import MODELS

    models = models or tuple(MODELS)
    check_models(models, resolution)
    images = training_images(source, cache, resolution, batch_size, workers, quick)
    machine = measured_on(images, device)
    stem = f"{name}-quick" if quick else name
    rows = kept(out, stem, models, resolution) if add else []
    with Progress(name, len(models) * systems * (2 + rounds), "runs") as bar:
        for model in models:
            rows += measure(TrainingJob(images, model, device), machine, rounds, seconds, advance(bar))
            publish(out, stem, rows, text, show=model == models[-1])


# ------------------------------------------------------------------ the systems


def set_up(name: str, job: TrainingJob) -> Running:
    """Build, compile and warm up one way to train `job.model`, or the matrix product.

    `compile_s` in `about`, for a compiled model with a cached batch: the seconds that its first step took longer than
    a later one. With a loader it takes the compiled code from there.
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
    step = (_usual_step if style.startswith(EAGER) else _own_step)(style, job, device)
    feed = _feed(source, style, job, device)
    waited = 0.0

    def once() -> int:
        nonlocal waited
        count = 0
        for _ in range(20 if device.type == "cuda" else 1):  # a GPU is synchronized once in 20 steps
            if job.synchronized:
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


def _own_step(style: str, job: TrainingJob, device: "torch.device") -> Step:
    """The step of a run, with the recipe of the model."""
    import torch

    from shards import ShardSet
    from train import device as devices
    from train import models
    from train.config import Config, resolved
    from train.step import TrainingStep

    torch.manual_seed(0)
    data = ShardSet(prepared(SHARDS_JPG, job.images) / "set")
    manifest, images = data.manifest, job.images
    net = models.build(job.model, images.resolution_px, 7, manifest.mean, manifest.std).to(device)
    config = Config(model=job.model, data=str(data.path), batch_size=images.batch_size, resolution=images.resolution_px)
    config = resolved(config, models.family(job.model))
    step = TrainingStep(net, config, list(manifest.counts["train"].values()), precision_of(style, device))
    net.train()
    if style.startswith(COMPILED):
        step.model = torch.compile(net, dynamic=False, mode=devices.compile_mode(device, processes=1))
    return lambda images, colour, labels: step(images, colour, labels, 1e-3)


def _usual_step(style: str, job: TrainingJob, device: "torch.device") -> Step:
    """The step that people write first, with nothing of this project's but the network's body and its recipe."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils import clip_grad_norm_

    from shards import ShardSet
    from train import device as devices
    from train import models
    from train.config import RECIPES

    torch.manual_seed(0)
    manifest = ShardSet(prepared(SHARDS_JPG, job.images) / "set").manifest
    net = models.build(job.model, job.images.resolution_px, 7, manifest.mean, manifest.std)
    net = _plain(net, manifest.mean, manifest.std).to(device)
    net = net.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    recipe = RECIPES[models.family(job.model)]
    if recipe.optimizer == "sgd-nesterov":
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    net.train()
    precision = precision_of(style, device)
    scaler = devices.scaler(device, precision)

    def step(images: "Tensor", colour: "Tensor", labels: "Tensor") -> None:
        with devices.autocast(device, precision):
            loss = cross_entropy(net(images), labels)
        scaler.scale(loss).backward()
        if recipe.clip is not None:
            scaler.unscale_(optimizer)
            clip_grad_norm_(net.parameters(), recipe.clip)
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

        def forward(self, images: "Tensor") -> "Tensor":
            return self.body((images.contiguous().float() / 255.0 - self.mean) / self.std)

    return Plain()


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

    from shards import Loader, ShardSet

    kind, engine = _LOADERS[source]
    with (
        ShardSet(prepared(kind, images) / "set") as data,
        closing(
            Loader(
                data.select("train"),
                batch_size=images.batch_size,
                resolution=images.resolution_px,
                engine=engine,
                device=device,
                threads=images.workers,
            )
        ) as loader,
    ):
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


# ------------------------------------------------------------------ the matrix peak

_MATRICES = {"cpu": (2048, 2), "cuda": (8192, 20)}
"""Side of the matrices and products in a pass, by type of device: smaller ones do not fill a GPU."""


def matrix_peak(device: "torch.device", precision: str) -> Running:
    """Products in one precision, `fp32`, `bf16` or `fp16`; a pass counts its GFLOP (2 n³ a product)."""
    import torch

    from train import device as devices

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    side, products = _MATRICES[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))

    def took_s(product: "Callable[[], Tensor]") -> float:
        begin = time.perf_counter()
        for _ in range(products):
            product()
        devices.synchronize(device)
        return time.perf_counter() - begin

    # the first of four calls warms up
    fastest = min(products_of(left, right), key=lambda product: min([took_s(product) for _ in range(4)][1:]))

    def once() -> float:
        took_s(fastest)
        return products * 2 * side**3 / 1e9

    def warm() -> None:
        once()

    return Running(once, warm)


def products_of(left: "Tensor", right: "Tensor") -> "list[Callable[[], Tensor]]":
    """The ways to multiply two matrices (n, n), n a multiple of 16: on a CPU also as a convolution of 1×1.

    PyTorch multiplies and convolves with different libraries there. On AMD's processors MKL uses AVX2 and oneDNN
    AVX-512, so networks that are mostly convolutions were faster than a peak of MKL alone.
    """
    import torch

    out = torch.empty_like(left)
    ways: list[Callable[[], Tensor]] = [lambda: torch.mm(left, right, out=out)]
    if left.device.type == "cpu":
        side = len(left)  # 16 images: with few, PyTorch convolves on one thread, with MKL
        pixels = left.view(16, 1, side // 16, side).permute(0, 3, 1, 2)
        kernels = right.t().contiguous()[:, :, None, None]
        ways.append(lambda: torch.nn.functional.conv2d(pixels, kernels).permute(0, 2, 3, 1).reshape(side, side))
    return ways


def matrix_products(names: Sequence[str], device: "torch.device") -> dict[str, str]:
    """Precision → the system that measures its matrix peak, for each precision that one of `names` computes in."""
    peaks = {precision_of(MATRIX, device): MATRIX}
    if any(FP32 in name for name in names):
        peaks.setdefault("fp32", MATRIX + FP32)
    return peaks


# ------------------------------------------------------------------ the measurement


def measure_training(
    job: TrainingJob, names: Sequence[str], environment: Environment, *, rounds: int, seconds: float, announce: Announce
) -> list[Row]:
    """Time the ways to train one model, and the matrix product, in turn; warm page cache."""
    from train import device as devices
    from train import models

    device = devices.choose(job.device)
    peaks = matrix_products(names, device)
    every = [*names, *peaks.values()]
    series, about = take_turns(
        set_up, every, job, job.images.cache / "logs", rounds=rounds, seconds=seconds, announce=announce, frozen=True
    )
    parameters, forward = models.cost(job.model, job.images.resolution_px, 7)
    rows: list[Row] = []
    for name in names:
        style = name.partition(", ")[0]
        columns = _columns(job, name, precision_of(name, device), environment)
        noted = columns | {"note": _NOTES.get(style, "") if CACHED in name else ""}
        rows += series_rows(series[name], **noted)
        rows.append(_share_of_peak(series[name], series[peaks[columns["precision"]]], forward, columns))
        if "compile_s" in about.get(name, {}):
            rows.append(Row(metric="compile_s", unit="s", value=about[name]["compile_s"], **columns))
    for above, below in RATIOS:
        if above in names and below in names:
            columns = _columns(job, above, precision_of(above, device), environment)
            rows.append(ratio_row(series[above], series[below], beside=below, **columns))
    for precision, name in peaks.items():
        whole = _columns(job, name, precision, environment)
        flops = [sample.per_s for sample in series[name].samples]
        rows.append(summary_row(flops, series[name].failed, metric="gflop_per_s", unit="GFLOP/s", **whole))
    model: dict[str, Any] = _columns(job, job.model, "", environment) | {"workers": None}
    rows.append(Row(metric="parameters", unit="1", value=float(parameters), **model))
    rows.append(Row(metric="forward_flop_per_image", unit="FLOP", value=float(forward), **model))
    return rows


def _share_of_peak(series: Series, peak: Series, forward: int, columns: dict[str, Any]) -> Row:
    """FLOP/s of training divided by those of the matrix product, round by round."""
    failed = series.failed or peak.failed
    shares = []
    if not failed:
        for own, best in zip(series.samples, peak.samples, strict=True):
            shares.append(own.per_s * forward * FORWARD_AND_BACKWARD / (best.per_s * 1e9))
    return summary_row(shares, failed, metric="share_of_peak", unit="1", **columns)


def _columns(job: TrainingJob, name: str, precision: str, environment: Environment) -> dict[str, Any]:
    return {
        "benchmark": "training",
        "system": name,
        "model": job.model,
        "precision": precision,
        "packed": "" if MATRIX in name or name == job.model else "originals" if FOLDER in name else "400 px jpg",
        "resolution_px": job.images.resolution_px,
        "batch_size": job.images.batch_size,
        "workers": job.images.workers,
        "page_cache": "warm",
        "environment": environment,
    }


def training_text(rows: Sequence[Row]) -> str:
    """The rows as Markdown: a line per model and way to train it."""
    own = [row for row in rows if row.benchmark == "training"]
    parts = ["## Training\n", "Whole steps: forward, loss, backward, optimizer. Median [interval].\n"]
    lines = []
    for model in dict.fromkeys(row.model for row in own):
        part = [row for row in own if row.model == model]
        found = {(row.system, row.metric): row for row in part if not row.beside}
        for system in dict.fromkeys(row.system for row in part if row.metric == "img_per_s"):
            metrics = ("img_per_s", "share_of_peak", "compile_s")
            speed = found[system, "img_per_s"]
            line = [model, str(speed.batch_size or ""), system, speed.precision]
            lines.append([*line, *(cell(found.get((system, metric))) for metric in metrics)])
    header = ["model", "batch", "system", "precision", "img/s", "share of its matrix peak", "compile s"]
    parts.append(table(header, lines))
    parts.append(busy_text(own))
    parts.append("Ratios of images per second, taken within each round:\n")
    ratios = [[row.model, f"{row.system} / {row.beside}", cell(row)] for row in own if row.beside]
    parts += [table(["model", "ratio", "img/s"], ratios), targets_text(own)]
    lines = []
    for model in dict.fromkeys(row.model for row in own):
        facts = {row.metric: row for row in own if row.model == model}
        peaks = [row for row in own if row.model == model and row.metric == "gflop_per_s"]
        shown = (facts.get(name) for name in ("parameters", "forward_flop_per_image"))
        lines.append([model, *(cell(row) for row in shown), "; ".join(f"{cell(r)} {r.precision}" for r in peaks)])
    parts.append(table(["model", "parameters", "FLOP / image, forward", "matrix peak, GFLOP/s"], lines))
    parts += [notes(own), machine_text(own)]
    return "\n".join(part for part in parts if part)
