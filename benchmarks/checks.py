"""Checks of the engines on a GPU: DALI's own check, the choice of `auto`, every engine's pixels, alone and under load.

Each engine is compared with native's pixels on the CPU; under load, the streams that read its batches lag. Nothing here
is special to CUDA: the tests run the same checks on a CPU. `benchmarks/gpu_check.py` runs them, and those of training.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards import Loader, Selection, ShardSet
from shards.common.kept import file_of
from shards.common.machine import available_cores
from shards.engines import Engine, Request, selfcheck
from shards.engines.dali import DaliEngine
from shards.engines.native import NativeEngine
from shards.engines.resident import ResidentEngine
from train import device as devices
from train.workspace import Workspace

WRITE_MODES = {"jpg": "jpg", "raw": "raw", "mixed": "proportion"}
"""The shard sets that are checked, by their contents → how they are packed."""

Found = tuple[bool, dict[str, Any]]
"""Whether a check passed, and its numbers."""


@dataclass(frozen=True)
class Settings:
    """How much is checked.

    batches: for each engine, in the comparison and under load. load_side, load_repeats: of the matrix products that are
    queued for each batch. causes: models for which the causes of waiting are told apart, and whether they are compiled.
    models: names for training, None for all eight; styles: how each is trained. whole_run: the model of whole runs.
    steps, seconds: the minimum that is timed of each training. compared: steps whose losses are compared. at_once:
    numbers of cells that share the device. images: of the set for training; other_images: of the sets that only engines
    are compared on. packed_px: their longer side.
    """

    batches: int = 16
    load_side: int = 4096
    load_repeats: int = 8
    causes: tuple[tuple[str, bool], ...] = (("resnet18", False), ("vit_b16", False), ("resnet18", True))
    models: tuple[str, ...] | None = None
    styles: tuple[str, ...] = ("eager", "graphed", "compiled")
    whole_run: str = "resnet18"
    steps: int = 20
    seconds: float = 1.0
    compared: int = 50
    at_once: tuple[int, ...] = (1, 2, 4)
    batch_size: int = 64
    resolution: int = 224
    images: int = 3600
    other_images: int = 256
    packed_px: int = 400


@dataclass
class Context:
    """What the checks of one section run on, and what they have found so far.

    sets: shard sets by their contents. scratch: a folder for runs. numbers: of each check that passed, by name.
    workspace: the network of the last training, and its compiled code.
    """

    device: torch.device
    settings: Settings
    sets: Mapping[str, Path]
    scratch: Path
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    workspace: Workspace = field(default_factory=Workspace)
    _stack: ExitStack = field(default_factory=ExitStack)
    _opened: dict[str, ShardSet] = field(default_factory=dict)
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

    def close(self) -> None:
        """Close what is open."""
        self.workspace.close()
        self._stack.close()


@dataclass(frozen=True)
class Check:
    """One check. run: does it. needs: the name of a check that has to pass before, because this one could end the
    process, or has nothing to judge."""

    name: str
    run: Callable[[Context], Found]
    needs: str = ""


def engine_checks(contents: str, device_type: str) -> list[Check]:
    """Self-checks of DALI, the choice of `auto`, and each engine's pixels and stream order.

    contents: a key of WRITE_MODES. device_type: `cuda` or `cpu`.
    """
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


# ------------------------------------------------------------------ data


def make_sets(folder: Path, settings: Settings) -> dict[str, Path]:
    """Paint lesions and pack them as JPEG, raw, and half of each; the sets by their contents."""
    from preprocess.ham10000 import read_source
    from preprocess.packing import Settings as PackSettings
    from preprocess.packing import pack
    from preprocess.synthetic import write_folder
    from shards.format import EncodeSpec

    workers, sets = available_cores(), {}
    for contents, mode in WRITE_MODES.items():
        images = settings.images if contents == "jpg" else settings.other_images
        if not (source := folder / f"{images} images").exists():
            write_folder(source, images, seed=0, difficulty=0.5, workers=workers)
        spec = EncodeSpec(write_mode=mode, max_resolution=settings.packed_px)
        sets[contents] = folder / contents
        pack(read_source(source), sets[contents], PackSettings(encode=spec, workers=workers))
    return sets
