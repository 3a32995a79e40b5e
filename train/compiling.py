"""`--compile`: whether `torch.compile` pays off for a network, the compiled code, and eager training if it fails.

All of its state is here. A process keeps one `Compilation` from run to run (`train/workspace.py`), because later runs
of the same network keep the decision and reuse the code. Compiling, and the timing that decides about it, comes before
the first step and leaves no trace in the weights or in the random state.
"""

import functools
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from shards.common import kept
from shards.common.errors import one_line
from shards.order import rank_slice
from train import device as devices
from train import models
from train.config import Config, pixel_share
from train.console import Console
from train.device import Decision
from train.distributed import World
from train.step import TrainingStep, leaving_no_trace

COST_S = {"cpu": (0.0, 3.5), "cuda": (10.0, 0.5)}
"""Seconds that compiling takes: a fixed part, and a part for each convolution or linear layer. Measured: the 21 layers
of ResNet-18 took 74 s on two CPU cores, and 21 s for an H100 with 16 cores; the 50 of ViT-B/16, many of them alike,
took 23 s for the H100."""

GAIN = {"cpu": 0.1, "cuda": 0.5}
"""Share of the uncompiled training time that compiled steps are expected to save, until they are timed here. On an
H100 they saved 66 % of ResNet-18's time and 36 % of ViT-B/16's on one cached batch (`benchmarks/results/gpu`). On CPUs
they saved about 10 % at equal precision; AlexNet was faster without (docs/speed.md)."""


@dataclass(frozen=True)
class Trial:
    """What compiling one network costs and saves on this machine: seconds of a step, and of compiling for one size."""

    eager_s: float
    compiled_s: float
    compile_s: float


class Compilation:
    """All state of `torch.compile` in a process, for one network at a time.

    decision: of the current run. images_ahead: images that later runs in this process will train the same network on;
    they share the cost of compiling.
    """

    def __init__(self) -> None:
        self.decision = Decision("off", "nothing is trained yet")
        self.images_ahead = 0
        self._code: Callable[..., Tensor] | None = None
        self._mode: str | None = None  # of `_code`
        self._compiled_for: set[tuple[Any, ...]] = set()  # (images, px, precision)
        self._earlier: Decision | None = None  # of earlier runs of this network; `auto` keeps to it
        self._timed = False  # whether that decision has been checked by timing both
        self._recorded = False  # whether the decision is from an earlier start of the run

    def forget(self) -> None:
        """Drop the compiled code and the decision: the network changes."""
        self._earlier, self._timed = None, False
        self._compiled_for.clear()
        if self._code is not None:
            self._code = None
            torch.compiler.reset()

    def decide(
        self, step: TrainingStep, config: Config, sizes: list[int], total: int, world: World, recorded: Decision | None
    ) -> None:
        """Make the decision for a run. The first process decides for all.

        sizes: resolution of each epoch, px. total: steps of the run. recorded: what an earlier start of this run
        decided; it stays.
        """
        self._recorded = recorded is not None

        def decide() -> Decision:
            if config.compile != "auto" or self._earlier is None:
                layers = models.depth(step.net) * len(set(sizes))  # each size is compiled on its own
                steps = total * pixel_share(config, len(sizes)) + self.images_ahead / config.batch_size
                images = _own_images(config, world)
                trial = recall(step, config, images, world) if config.compile == "auto" else None
                self._timed = trial is not None
                self._earlier = choose(
                    config.compile,
                    layers,
                    step.device,
                    lambda: steps * (trial.eager_s if trial else step_s(step, images, config.resolution)),
                    trial,
                )
            return self._earlier

        self.decision = world.from_first(decide) if recorded is None else recorded

    def compile(self, step: TrainingStep, config: Config, sizes: list[int], world: World, console: Console) -> float:
        """Make `step` call compiled code if that is the decision; return the seconds that this took.

        sizes: the resolutions still to come, ascending, px. If the compiler fails in any process, all steps stay eager,
        with a warning.
        """
        if config.compile == "on" and self.decision.value == "off":
            console.warn(f"training without torch.compile: {self.decision.reason}")
        if self.decision.value == "off" or not sizes:
            return 0.0
        began = time.perf_counter()
        failed: RuntimeError | OSError | None = None
        try:
            try:
                self._make_code(step, config, sizes, world, console)
            except (RuntimeError, OSError) as error:
                failed = error
            if world.sum(torch.tensor(float(failed is not None), device=step.device)):
                raise failed or RuntimeError("it failed in another process")
            if config.compile == "auto" and not self._recorded and not self._timed:
                compile_s = (time.perf_counter() - began) / len(sizes)
                self.decision = self._earlier = world.from_first(lambda: tried(step, config, world, compile_s))
                self._timed = True
        except (RuntimeError, OSError) as error:  # of TorchDynamo and Inductor; of a compiler that is missing
            if devices.is_out_of_memory(error):
                raise
            self.decision = self._earlier = Decision("off", f"compiling failed: {one_line(error, 200)}")
            console.warn(f"training without torch.compile: {self.decision.reason}")
        if self.decision.value == "off":
            step.model = step.net
        return time.perf_counter() - began

    def _make_code(self, step: TrainingStep, config: Config, sizes: list[int], world: World, console: Console) -> None:
        """Compile the network for all `sizes`, unless an earlier run has, and let `step` call the code."""
        limit = 2 * (len(sizes) + len(self._compiled_for))  # beyond it torch.compile would silently run eager code
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
        mode = devices.compile_mode(step.device, world.size, step.graphed)
        if self._code is None or mode != self._mode:
            self._code, self._mode = torch.compile(step.net, dynamic=False, mode=mode), mode
            self._compiled_for.clear()
        step.model = self._code
        images = _own_images(config, world)
        for px in sizes:
            console.at(f"compiling for {px} px", 0, 1)
            if (images, px, step.precision) not in self._compiled_for:
                warm_up(step, images, px)
                self._compiled_for.add((images, px, step.precision))


def _own_images(config: Config, world: World) -> int:
    """Images of each global batch that this process trains on."""
    share = rank_slice(config.batch_size, world.rank, world.size)
    return share.stop - share.start


# ------------------------------------------------------------------ the rule


def choose(
    wanted: str, layers: int, device: torch.device, eager_run_s: Callable[[], float], trial: Trial | None = None
) -> Decision:
    """`on` or `off`, and why. wanted: `auto`, `on` or `off`.

    layers: how many are compiled, counted once for each size. eager_run_s: estimates the training time without
    compiling. trial: of this network on this machine, if there was one. `auto` compiles if that saves more time than it
    costs; `tried` checks that afterwards.
    """
    if wanted == "off":
        return Decision("off", "asked for")
    if compiler() is None:
        return Decision("off", "no C++ compiler found (g++, c++ or clang++ on PATH, or CXX)")
    if wanted == "on":
        return Decision("on", "asked for")
    kind = device.type if device.type in GAIN else "cpu"
    start_s, layer_s = COST_S[kind]
    eager_s, cost_s, gain, source = eager_run_s(), start_s + layer_s * layers, GAIN[kind], "expected"
    if trial is not None:
        cost_s, gain, source = trial.compile_s, 1 - trial.compiled_s / trial.eager_s, "measured here before"
    reason = (
        f"compiling takes about {cost_s:.0f} s and saves about {gain * eager_s:.0f} s of the {eager_s:.0f} s "
        f"without it ({source})"
    )
    return Decision("on" if gain * eager_s > cost_s else "off", reason)


def compiler() -> str | None:
    """The C++ compiler that `torch.compile` would use, None if there is none."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


# ------------------------------------------------------------------ passes on a batch of noise


def tried(step: TrainingStep, config: Config, world: World, compile_s: float) -> Decision:
    """Time compiled (`step.model`) and eager (`step.net`) steps, and keep the result for later runs on this machine.

    compile_s: what compiling for one size took.
    """
    images = _own_images(config, world)
    off, on = times(step, images, config.resolution)
    kept.keep("compile", _key(step, config, images, world), asdict(Trial(off, on, compile_s)))
    return Decision("on" if on < off else "off", f"a step takes {on:.3g} s compiled and {off:.3g} s without")


def recall(step: TrainingStep, config: Config, images: int, world: World) -> Trial | None:
    """The result of an earlier `tried`, of the same network, batch, software and processor."""
    fields = {"eager_s": float, "compiled_s": float, "compile_s": float}
    found = kept.recall("compile", _key(step, config, images, world), fields)
    return None if found is None else Trial(**found)


def _key(step: TrainingStep, config: Config, images: int, world: World) -> dict[str, Any]:
    """Everything that a trial depends on."""
    return {
        "model": config.model,
        "px": config.resolution,
        "images": images,
        "precision": step.precision,
        "graphed": step.graphed,
        "freeze": config.freeze,
        "drop_path": config.drop_path,
        "mixing": step.mixing is not None,
        "memory_format": config.memory_format,
        "device": devices.describe(step.device),
        "processes": world.size,
        "per_device": world.per_device,
        "torch": torch.__version__,
    }


def times(step: TrainingStep, images: int, px: int) -> tuple[float, float]:
    """Seconds of a step of the network without compiling, and of `step.model`; timed in turns."""
    compiled, batch = step.model, example(images, px, step.device)
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    with leaving_no_trace(step):
        passes: dict[str, Callable[[], Tensor]] = {}
        for _ in range(5):
            for name, model in (("off", step.net), ("on", compiled)):
                step.model = model
                if name not in passes:
                    run = functools.partial(step.backward, *batch)
                    passes[name] = devices.Recorder(step.device).record(run) if step.graphed else run
                seconds[name].append(_seconds(passes[name], step.device))
    off, on = (statistics.median(seconds[name][1:]) for name in ("off", "on"))
    return off, on


def step_s(step: TrainingStep, images: int, px: int) -> float:
    """Seconds of a forward and backward pass of `images` images of `px`.

    On a CPU at most eight images are timed and the result is scaled, because the time grows with the batch.
    """
    timed = min(images, 8) if step.device.type == "cpu" else images
    batch = example(timed, px, step.device)
    with leaving_no_trace(step):
        run = functools.partial(step.backward, *batch)
        return min(_seconds(run, step.device) for _ in range(3)) * images / timed


def warm_up(step: TrainingStep, images: int, px: int) -> None:
    """Compile the forward and backward pass for batches of `images` images of `px`."""
    with leaving_no_trace(step):
        for _ in range(devices.steps_to_compile(step.device)):
            for parameter in step.net.parameters():
                parameter.grad = None
            step.backward(*example(images, px, step.device))
        devices.synchronize(step.device)


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    devices.synchronize(device)
    start = time.perf_counter()
    run()
    devices.synchronize(device)
    return time.perf_counter() - start


def example(count: int, px: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of noise in the loader's shapes and layout: images, colour and labels as in `shards.Batch`.

    The labels are those of the first two classes, which every set has.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, px, px, 3), dtype=torch.uint8, generator=generator).to(device)
    colour = torch.eye(3, 4).repeat(count, 1, 1).to(device)
    return images.permute(0, 3, 1, 2), colour, (torch.arange(count) % 2).to(device)
