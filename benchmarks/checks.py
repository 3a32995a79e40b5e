"""The checks of a GPU, as one list: `python -m benchmarks.gpu_check` and the tests marked `gpu` run the same ones.

Each engine is compared with native's pixels on the CPU, alone and under load on lagging streams. Every model is trained
for a few steps while the device is sampled. Nothing here is special to CUDA: the tests run the same checks on a CPU.
"""

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.monitor import HZ, MOST_CORE_SHARE, Sampler, reader_of
from shards import Batch, Loader, Selection, ShardSet
from shards.common.errors import DermscaleError
from shards.common.kept import file_of
from shards.common.machine import available_cores
from shards.engines import Engine, Request, selfcheck
from shards.engines.dali import DaliEngine
from shards.engines.native import NativeEngine
from shards.engines.resident import ResidentEngine
from train import device as devices
from train import models
from train.checkpoint import Progress
from train.config import Config, learning_rate, resolved
from train.console import Silent
from train.distributed import World
from train.loop import train_once
from train.models import MODELS
from train.prepare import choose_data, compile_and_distribute, prepare
from train.workspace import Workspace

WRITE_MODES = {"jpg": "jpg", "raw": "raw", "mixed": "proportion"}
"""The shard sets that are checked, by their contents → how they are packed."""
LEAST_HZ = 10.0
"""Readings per second that the sampler has to reach beside training."""
COMPILED_WITHIN = 0.05
"""How far the loss may be from the uncompiled network's after the same steps, as a share of it: bfloat16 rounds
differently there."""
_LOSSES = ("first_loss", "last_loss")

Found = tuple[bool, dict[str, Any]]
"""Whether a check passed, and its numbers."""


@dataclass(frozen=True)
class Settings:
    """How much is checked.

    models: names for training, None for all eight. compiled: those that are also trained with `torch.compile`. steps,
    seconds: the minimum that is timed of each. batches: for each engine, in the comparison and under load. load_side,
    load_repeats: of the matrix products that are queued for each batch. images, packed_px: of the data that is made.
    """

    models: tuple[str, ...] | None = None
    compiled: tuple[str, ...] = ("resnet18", "vit_b16")
    whole_run: str = "resnet18"
    steps: int = 20
    seconds: float = 1.5
    batch_size: int = 64
    resolution: int = 224
    batches: int = 16
    load_side: int = 4096
    load_repeats: int = 8
    images: int = 256
    packed_px: int = 400


@dataclass
class Context:
    """What checks run on, and what they have found so far.

    sets: shard sets by their contents. scratch: an empty folder for runs. numbers: of each check that passed, by name.
    """

    device: torch.device
    settings: Settings
    sets: Mapping[str, Path]
    scratch: Path
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    sampler: Sampler | None = None
    _opened: dict[str, ShardSet] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)
    _expected: tuple[Any, list[Request], list[Tensor]] | None = None

    def selection(self, contents: str, split: str) -> Selection:
        """The samples of a split; the set is open until `close`."""
        if contents not in self._opened:
            self._opened[contents] = self._stack.enter_context(ShardSet(self.sets[contents]))
        return self._opened[contents].select(split)

    def expected(self, contents: str, split: str) -> tuple[list[Request], list[Tensor]]:
        """Requests for batches of a split, and native's images for them on the CPU; the last ones are kept."""
        if self._expected is None or self._expected[0] != (contents, split):
            selection, settings = self.selection(contents, split), self.settings
            batch_size = min(settings.batch_size, len(selection))
            requests = requests_of(selection, train=split == "train", batch_size=batch_size, batches=settings.batches)
            self._expected = (contents, split), requests, reference(selection, requests, settings.resolution)
        return self._expected[1:]

    def start_sampling(self) -> Found:
        """Read the device from now on, until `close`. Raises DataError where its driver does not answer."""
        self.sampler = self._stack.enter_context(Sampler(reader_of(self.device), HZ))
        return True, self.sampler.reader.about

    def close(self) -> None:
        """End the sampler, and close the sets."""
        self._stack.close()


@dataclass(frozen=True)
class Check:
    """One check. run: does it. needs: the name of a check that has to pass before, because this one could end the
    process, or has nothing to judge."""

    name: str
    run: Callable[[Context], Found]
    needs: str = ""


def checks_of(settings: Settings, contents: Sequence[str], device_type: str) -> list[Check]:
    """Every check, in order: engines on each shard set, then training while the device is sampled.

    contents: keys of WRITE_MODES. device_type: `cuda` or `cpu`.
    """
    found = [check for each in contents for check in _engine_checks(each, device_type)]
    connection = f"connection to the {'driver' if device_type == 'cuda' else 'counters'}"
    found.append(Check(connection, Context.start_sampling))
    trained = contents[0] if "jpg" not in contents else "jpg"
    for compiled, names in ((False, settings.models or tuple(MODELS)), (True, settings.compiled)):
        found += [Check(_training_name(name, compiled), partial(_train, trained, name, compiled)) for name in names]
    found.append(Check(f"whole run of {settings.whole_run}", partial(_whole_run, trained)))
    return [*found, Check("sampling", _judge_sampling, needs=connection)]


def _engine_checks(contents: str, device_type: str) -> list[Check]:
    """Self-checks of DALI, the choice of `auto`, and each engine's pixels and stream order."""
    engines = [name for name in ENGINES if (contents, name) != ("raw", "dali whole")]  # raw: both graphs are the same
    own = {f"dali {variant}": f"self-check of dali {variant} ({contents})" for variant in selfcheck.NAMES}
    found = [
        Check(title, partial(_self_check, contents, name.removeprefix("dali ")))
        for name, title in own.items()
        if name in engines
    ]
    found.append(Check(f"choice of auto ({contents})", partial(_choice, contents)))
    for split, what in (("train", "training"), ("val", "evaluation")):
        for name in engines:
            needs = own.get(name, "")
            found.append(
                Check(f"parity of {name} ({contents}, {what})", partial(_parity, contents, split, name), needs)
            )
            for stream in ("default stream", "own stream") if split == "train" else ():
                if stream == "default stream" or device_type == "cuda":
                    title = f"stream order of {name} ({contents}, {stream})"
                    found.append(Check(title, partial(_stream_order, contents, name, stream), needs))
    return found


# ------------------------------------------------------------------ engines

ENGINES = ("native", "dali region", "dali whole", "resident")
"""Every engine; DALI's two graphs count as two."""


def make_engine(name: str, contents: str, selection: Selection, device: torch.device) -> Engine:
    """Build an engine for a selection on a device."""
    if name == "native":
        return NativeEngine(selection.data, str(device))
    if name == "resident":
        return ResidentEngine(selection, str(device))
    return DaliEngine(selection.data, str(device), contents=contents, variant=name.removeprefix("dali "))


def _self_check(contents: str, variant: str, context: Context) -> Found:
    """The check that `auto` makes in its own process, without its cached result."""
    selection, device = context.selection(contents, "train"), context.device
    file_of("dali", selfcheck.key_of(selection.data, device, variant, selection.samples)).unlink(missing_ok=True)
    passed, reason = selfcheck.check(selection, device, variant)
    return passed, {"reason": reason}


def _choice(contents: str, context: Context) -> Found:
    """The engine that `auto` takes: this fails only if it can take none."""
    selection = context.selection(contents, "train")
    batch_size = min(context.settings.batch_size, len(selection))
    with closing(Loader(selection, batch_size=batch_size, engine="auto", device=context.device)) as loader:
        return True, {"engine": loader.engine_name, "reason": loader.engine_reason}


def _parity(contents: str, split: str, name: str, context: Context) -> Found:
    requests, expected = context.expected(contents, split)
    allowed = tolerance(name, contents, context.device)
    with closing(make_engine(name, contents, context.selection(contents, split), context.device)) as engine:
        return parity(engine, context.device, requests, expected, context.settings.resolution, allowed)


def _stream_order(contents: str, name: str, stream: str, context: Context) -> Found:
    device, settings = context.device, context.settings
    requests, expected = context.expected(contents, "train")
    allowed = tolerance(name, contents, device)
    with closing(make_engine(name, contents, context.selection(contents, "train"), device)) as engine:
        load = heavy_kernels(device, settings.load_side, settings.load_repeats)
        consumer = torch.cuda.stream(torch.cuda.Stream(device)) if stream == "own stream" else nullcontext()
        return stress(engine, requests, expected, settings.resolution, allowed, load, consumer)


@dataclass(frozen=True)
class Tolerance:
    """How far images may differ, of 255: a `share` of values by at most `within`, on average by less than `mean`."""

    within: int
    share: float
    mean: float

    def holds(self, histogram: np.ndarray) -> bool:
        """Whether the differences with this histogram, (256,), are within it."""
        count = histogram.sum()
        near, total = histogram[: self.within + 1].sum(), histogram @ np.arange(256)
        return bool(count > 0 and near >= self.share * count and total / count < self.mean)


SAME = Tolerance(within=0, share=1.0, mean=0.25)
ROUNDING = Tolerance(within=1, share=1.0, mean=0.25)
RAW = Tolerance(within=1, share=1.0, mean=1.0)
DECODED_ON_GPU = Tolerance(within=4, share=0.999, mean=1.0)
"""Another JPEG decoder than libjpeg's: nvJPEG."""


def tolerance(engine: str, contents: str, device: torch.device) -> Tolerance:
    """How far an engine may differ from native on the CPU. contents: `jpg`, `raw` or `mixed`."""
    if engine == "native":
        return SAME
    if engine == "resident" or device.type == "cpu":
        return ROUNDING
    return RAW if contents == "raw" else DECODED_ON_GPU


def judged(pairs: Iterable[tuple[Tensor, Tensor]], allowed: Tolerance, **about: Any) -> Found:
    """Whether images are those expected, and by how much they differ: `about` and max_difference, mean_difference,
    share_within_4, values, and the histogram of the differences up to its last entry.

    pairs: expected and found batches, both (n, 3, S, S) uint8, compared on the device of the second. Raises ValueError
    for another shape or type.
    """
    histogram = np.zeros(256, np.int64)
    for expected, got in pairs:
        if expected.shape != got.shape or got.dtype != torch.uint8:
            raise ValueError(f"a batch is {tuple(got.shape)} {got.dtype}, and should be {tuple(expected.shape)} uint8")
        apart = (expected.to(got.device).int() - got.int()).abs().flatten()
        histogram += torch.bincount(apart, minlength=256).cpu().numpy()
    values = int(histogram.sum())
    largest = int(np.flatnonzero(histogram)[-1]) if values else 0
    numbers = {
        "max_difference": largest,
        "mean_difference": float(histogram @ np.arange(256)) / max(values, 1),
        "share_within_4": float(histogram[:5].sum()) / max(values, 1),
        "values": values,
        "histogram": histogram[: largest + 1].tolist(),
    }
    return allowed.holds(histogram), about | {"allowed": asdict(allowed)} | numbers


def requests_of(selection: Selection, *, train: bool, batch_size: int, batches: int) -> list[Request]:
    """The first batches of the epochs 0, 1, … as engines get them; fewer if an evaluation has fewer."""
    requests: list[Request] = []
    with closing(Loader(selection, batch_size=batch_size, train=train, seed=1, engine="native")) as loader:
        for epoch in range(batches if train else 1):
            loader.set_epoch(epoch)
            order, plan = loader.plan()
            for start in range(0, len(loader) * batch_size, batch_size):
                rows = order[start : start + batch_size]
                requests.append(Request(selection.samples[rows], plan.boxes[rows], plan.symmetry[rows]))
                if len(requests) == batches:
                    return requests
    return requests


def reference(selection: Selection, requests: Iterable[Request], resolution: int) -> list[Tensor]:
    """Native's images on the CPU, (n, 3, S, S) uint8 each."""
    with closing(NativeEngine(selection.data, "cpu")) as native:
        return [images.clone() for images in native.run(requests, resolution)]


def parity(
    engine: Engine,
    device: torch.device,
    requests: list[Request],
    expected: list[Tensor],
    resolution: int,
    allowed: Tolerance,
) -> Found:
    """Whether an engine gives the expected images on `device`, and by how much they differ."""

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for wanted, images in zip(expected, engine.run(iter(requests), resolution), strict=True):
            if not images.is_contiguous(memory_format=torch.channels_last) or images.device != device:
                raise ValueError(f"a batch is not channels-last on {device}")
            yield wanted, images

    images = sum(len(batch) for batch in expected)
    return judged(pairs(), allowed, images=images, batches=len(requests), resolution_px=resolution)


def heavy_kernels(device: torch.device, side: int, repeats: int) -> Callable[[], None]:
    """A load: `repeats` products of (side, side) float32 matrices, queued on the current stream without waiting."""
    matrix = torch.rand(side, side, device=device)
    out = torch.empty_like(matrix)
    devices.synchronize(device)  # another stream may use them

    def load() -> None:
        for _ in range(repeats):
            torch.mm(matrix, matrix, out=out)

    return load


def stress(
    engine: Engine,
    requests: list[Request],
    expected: list[Tensor],
    resolution: int,
    allowed: Tolerance,
    load: Callable[[], None],
    consumer: AbstractContextManager[Any] | None = None,
) -> Found:
    """Whether batches are complete for a consumer whose stream lags far behind the host.

    Heavy kernels are queued before each batch is read, and the batch is released before they have run. An engine that
    does not order its writes with the consumer's reads gives unfinished images, or overwrites them. consumer: makes
    another stream the current one; the load is on both then.
    """
    kept: list[Tensor] = []
    load()
    with consumer or nullcontext():
        for images in engine.run(iter(requests), resolution):
            load()
            kept.append(images.clone())  # queued behind the load
            del images  # from here on the engine may reuse the memory
    if kept:
        devices.synchronize(kept[0].device)  # the comparison is on another stream
    pairs = zip(expected, kept, strict=True)
    return judged(pairs, allowed, batches=len(requests), resolution_px=resolution)


# ------------------------------------------------------------------ training


def _training_name(model: str, compiled: bool) -> str:
    return f"training of {model}{' (compiled)' if compiled else ''}"


def _train(contents: str, model: str, compiled: bool, context: Context) -> Found:
    """Training steps of a model; compiled, its losses are those of the uncompiled network, if that was trained."""
    sampler = context.sampler
    passed, numbers = training_steps(context.sets[contents], model, context.device, context.settings, compiled)
    if compiled:
        eager = context.numbers.get(_training_name(model, False), {})
        numbers["eager_losses"] = [eager.get(name) for name in _LOSSES]
        passed &= not eager or _near(numbers, eager)
    began, ended = numbers.pop("span")
    if sampler:
        summary = sampler.summary(began - sampler.started, ended - sampler.started)
        numbers |= {"utilization": summary["metrics"], "reached_hz": summary["reached_hz"], "span_s": ended - began}
    return passed, numbers


def _near(compiled: Mapping[str, Any], eager: Mapping[str, Any]) -> bool:
    """Whether the losses of two trainings on the same batches are the same, except for rounding."""
    return all(abs(compiled[name] - eager[name]) <= COMPILED_WITHIN * eager[name] for name in _LOSSES)


def _whole_run(contents: str, context: Context) -> Found:
    """A run as `train.run` makes it: steps, checkpoint, evaluation of val and test, result.json."""
    settings = context.settings
    data = context.sets[contents]
    config = _config(data, settings.whole_run, context.device, settings, steps=settings.steps)
    result = train_once(config, context.scratch / "run", world=World(device=context.device))
    score = result["test"]["balanced_accuracy"]["value"]
    kept = ("img_per_s", "data_wait_fraction", "train_loss", "seconds", "peak_memory_bytes", "decisions", "steps")
    numbers = {name: result[name] for name in kept} | {"test_balanced_accuracy": score}
    return math.isfinite(result["train_loss"]) and score is not None, numbers


def _judge_sampling(context: Context) -> Found:
    """Whether the sampler was fast enough beside training, cheap, and ran to the end. Compiling may slow it down."""
    assert context.sampler is not None  # `needs`
    trained = [numbers for numbers in context.numbers.values() if numbers.get("reached_hz")]
    context.close()
    summary = context.sampler.summary()
    seconds = sum(numbers["span_s"] for numbers in trained)
    pace = sum(numbers["reached_hz"] * numbers["span_s"] for numbers in trained) / seconds if trained else 0.0
    passed = not summary["error"] and pace >= LEAST_HZ and summary["sampler_core_share"] < MOST_CORE_SHARE
    return passed, {**summary, "training_hz": pace}


WARM_UP = 5
"""Steps before the timed ones; they allocate memory and choose kernels."""
WATCHED = 10
"""Maximum number of steps in which waiting is counted. The device ends each of them before the next batch is asked for,
which takes time, so speeds are measured in other steps."""

_SCHEDULE = 1000
"""Further steps of the learning rate's schedule: a fast device makes many in the minimum time."""


def training_steps(data: Path, model: str, device: torch.device, settings: Settings, compiled: bool) -> Found:
    """Training steps on loaded batches, then on one cached batch, at least `settings.steps` each, for at least
    `settings.seconds`; the losses must be numbers.

    img_per_s: with loaded batches; cached_img_per_s: with the cached one, the most that the model could take.
    last_loss: of step WARM_UP + `settings.steps`, also if more follow. data_wait_share: share of the time of further
    steps on loaded batches in which the device waited for one, 0 to 1. span: start and end of the timed steps on
    loaded batches, by `time.perf_counter()`.
    """
    steps, watched, total = settings.steps, min(settings.steps, WATCHED), _SCHEDULE + settings.steps
    family = models.family(model)
    compile = "on" if compiled else "off"
    config = resolved(_config(data, model, device, settings, steps=total, compile=compile), family)
    world, workspace = World(device=device), Workspace()
    devices.reset_peak_memory(device)
    with ExitStack() as stack:
        stack.callback(workspace.close)
        selections = choose_data(config, workspace.open(data), family, world)
        run = prepare(config, family, world, workspace, selections, {}, stack)
        progress = Progress()
        compile_and_distribute(run, progress, Silent())
        batches = stack.enter_context(closing(_endless(run.loaders["train"])))
        losses: list[Tensor] = []

        def step(batch: Batch) -> None:
            rate = learning_rate(config, min(run.step.done, total - 1), total)
            losses.append(run.step(batch.images, batch.colour, batch.labels, rate))

        def timed(source: Iterator[Batch]) -> tuple[float, float, int]:
            """Start and end of the steps, by `time.perf_counter()`, and how many they were."""
            for _ in range(WARM_UP):
                step(next(source))
            devices.synchronize(device)
            began, count = time.perf_counter(), 0
            while not count or time.perf_counter() - began < settings.seconds:
                for _ in range(steps):  # synchronized once in so many
                    step(next(source))
                devices.synchronize(device)
                count += steps
            return began, time.perf_counter(), count

        def waiting() -> float:
            """Share of the time of `watched` steps that was spent waiting for batches."""
            for _ in range(WARM_UP):  # with the batches that were prepared while the cached one was timed
                step(next(batches))
            devices.synchronize(device)
            waited, began = 0.0, time.perf_counter()
            for _ in range(watched):
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                step(batch)
                devices.synchronize(device)  # otherwise the host waits for batches that are not needed yet
            return waited / (time.perf_counter() - began)

        began, ended, count = timed(batches)
        cached_began, cached_ended, cached_count = timed(itertools.repeat(next(batches)))
        step_s = (ended - began) / count
        data_wait_share = waiting()
        values = torch.stack(losses).float().cpu()
        if compiled and run.compilation.decision.value != "on":
            raise DermscaleError(f"torch.compile was not used: {run.compilation.decision.reason}")
        return bool(values.isfinite().all()), {
            "span": (began, ended),
            "steps": count,
            "batch_size": settings.batch_size,
            "resolution_px": settings.resolution,
            "step_s": step_s,
            "img_per_s": settings.batch_size / step_s,
            "cached_img_per_s": settings.batch_size * cached_count / (cached_ended - cached_began),
            "data_wait_share": data_wait_share,
            "compile_s": progress.seconds["compile"],
            "first_loss": float(values[0]),
            "last_loss": float(values[WARM_UP + steps - 1]),
            "peak_memory_bytes": devices.peak_memory_bytes(device),
            "decisions": {name: asdict(taken) for name, taken in run.decisions.items()},
        }


def _config(data: Path, model: str, device: torch.device, settings: Settings, **more: Any) -> Config:
    """The configuration of a training. more: its other fields."""
    more |= {"batch_size": settings.batch_size, "resolution": settings.resolution}
    return Config(model=model, data=str(data), device=str(device), **more)


def _endless(loader: Loader) -> Generator[Batch, None, None]:
    """Batches of one epoch after the other."""
    while True:
        yield from loader


# ------------------------------------------------------------------ data


def make_sets(folder: Path, images: int, packed_px: int) -> dict[str, Path]:
    """Paint lesions and pack them as JPEG, raw, and half of each; the sets by their contents."""
    from preprocess.ham10000 import read_source
    from preprocess.packing import Settings as PackSettings
    from preprocess.packing import pack
    from preprocess.synthetic import write_folder
    from shards.format import EncodeSpec

    workers = available_cores()
    write_folder(folder / "images", images, seed=0, difficulty=0.5, workers=workers)
    sets = {}
    for contents, mode in WRITE_MODES.items():
        spec = EncodeSpec(write_mode=mode, max_resolution=packed_px)
        sets[contents] = folder / contents
        pack(read_source(folder / "images"), sets[contents], PackSettings(encode=spec, workers=workers))
    return sets
