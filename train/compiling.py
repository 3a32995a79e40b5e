"""Whether `torch.compile` pays for itself in a run, and the compiling itself, done and timed before the first step."""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from train import device as devices
from train.device import Decision

Batch = tuple[Tensor, Tensor, Tensor]
"""images (N, 3, H, W) uint8, colour (N, 3, 4) float32, labels (N,) int64."""

FAILURES = (RuntimeError, OSError)
"""What compiling can end in: TorchDynamo's and Inductor's errors are RuntimeErrors, a missing compiler an OSError."""

COST_S = {"cpu": (0.0, 3.5), "cuda": (10.0, 0.5)}
"""Seconds that compiling takes, and those for each convolution or linear layer: for two CPU cores ResNet-18's 21 took
74 s; for an H100 beside 16 cores they took 21 s, and ViT-B/16's 50, of which many are alike, 23 s."""

MOST_COST = {"cpu": 0.05, "cuda": 0.2}
"""The share of the uncompiled training time that compiling may cost at the most. On a CPU it may turn out to gain
nothing (AlexNet ran faster without), so it has to be nearly free; on an H100 training with batches of 64 took ResNet-18
and ViT-B/16 less than half of the time (`benchmarks/results/gpu`), and with larger ones it gains less."""


def decide(wanted: str, layers: int, device: torch.device, eager_run_s: Callable[[], float]) -> Decision:
    """`on` or `off`, and why. wanted: `auto`, `on` or `off`.

    layers: to be compiled, counted once for each size. eager_run_s: estimates the training time without. `auto`
    compiles where that costs a small share of the run. On a CPU `faster` then has the last word.
    """
    if wanted == "off":
        return Decision("off", "asked for")
    if compiler() is None:
        return Decision("off", "no C++ compiler found (g++, c++ or clang++ on PATH, or CXX)")
    if wanted == "on":
        return Decision("on", "asked for")
    kind = device.type if device.type in MOST_COST else "cpu"
    start_s, layer_s = COST_S[kind]
    eager_s, cost_s, most = eager_run_s(), start_s + layer_s * layers, MOST_COST[kind]
    estimate = f"compiling takes about {cost_s:.0f} s and training without it about {eager_s:.0f} s"
    if cost_s > most * eager_s:
        return Decision("off", f"{estimate}: more than {100 * most:.0f} % of it")
    return Decision("on", estimate)


def faster(
    net: nn.Module,
    eager: Callable[[Batch], Tensor],
    compiled: Callable[[Batch], Tensor],
    count: int,
    px: int,
    device: torch.device,
) -> Decision:
    """Time both on batches of `count` images of `px`, in turns, and keep the faster; `net` stays as it is."""
    batch = example(count, px, device)
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    with leaving_no_trace(net, device):
        for _ in range(5):
            for name, step in (("off", eager), ("on", compiled)):
                devices.synchronize(device)
                start = time.perf_counter()
                step(batch)
                devices.synchronize(device)
                seconds[name].append(time.perf_counter() - start)
    off, on = (statistics.median(seconds[name][1:]) for name in ("off", "on"))
    return Decision("on" if on < off else "off", f"a step takes {on:.3g} s compiled and {off:.3g} s without")


def compiler() -> str | None:
    """The C++ compiler that `torch.compile` would use, None where there is none."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def example(count: int, px: int, device: torch.device) -> Batch:
    """A batch of noise in the loader's shapes and layout."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, px, px, 3), dtype=torch.uint8, generator=generator).to(device)
    colour = torch.eye(3, 4).repeat(count, 1, 1).to(device)
    return images.permute(0, 3, 1, 2), colour, (torch.arange(count) % 7).to(device)


@contextmanager
def leaving_no_trace(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back the random numbers and the buffers of `net` (running means), and drop its gradients, on leaving."""
    random_state = devices.random_state(device)
    buffers = [buffer.clone() for buffer in net.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(net.buffers(), buffers, strict=True):
                buffer.copy_(before)
        for parameter in net.parameters():
            parameter.grad = None
        devices.set_random_state(device, random_state)


def step_s(net: nn.Module, step: Callable[[Batch], Tensor], count: int, px: int, device: torch.device) -> float:
    """Seconds of one forward and backward pass of a batch of `count` images of `px`; `net` stays as it is.

    On a CPU, where a batch's time grows with its size, at most eight images are timed and the result is scaled.
    """
    timed = min(count, 8) if device.type == "cpu" else count
    batch = example(timed, px, device)
    seconds = []
    with leaving_no_trace(net, device):
        for _ in range(3):
            devices.synchronize(device)
            start = time.perf_counter()
            step(batch)
            devices.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return min(seconds) * count / timed


def warm_up(net: nn.Module, step: Callable[[Batch], Tensor], count: int, px: int, device: torch.device) -> None:
    """Compile `step`, forward and backward, for batches of `count` images of `px`; `net` stays as it is."""
    with leaving_no_trace(net, device):
        for _ in range(devices.steps_to_compile(device)):
            for parameter in net.parameters():
                parameter.grad = None
            step(example(count, px, device))
        devices.synchronize(device)
