"""The order of the checks of `benchmarks/gpu_check.py`, and which of them hang on which."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import checks
from benchmarks.check_training import training_steps, whole_run
from benchmarks.evidence import Evidence
from benchmarks.monitor import HZ, MOST_CORE_SHARE, CoreSource, Sampler, Source
from shards import Loader, Selection, ShardSet
from shards.engines import selfcheck
from train.device import gpu_uuid
from train.models import MODELS

if TYPE_CHECKING:
    from shards.engines import Engine

LEAST_HZ = 10.0

COMPILED_WITHIN = 0.05
"""How far the loss may be from the uncompiled network's after the same steps, as a share of it: bfloat16 rounds
elsewhere."""

_LOSSES = ("first_loss", "last_loss")

Found = tuple[bool, dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """How much is checked.

    models: names for training, None for all eight. compiled: those also trained with `torch.compile`. steps, seconds:
    the least that is timed of each. batches: loaded per engine in the comparison and, under load, in the stress test.
    load_side, load_repeats: of the matrix products that are queued for each batch. images, packed_px: of the data that
    is made.
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


def run_suite(
    evidence: Evidence, device: torch.device, settings: Settings, sets: Mapping[str, Path], scratch: Path
) -> None:
    """Self-checks, comparison, stress, training; all sampled, where the device can be."""
    for kinds, path in sets.items():
        with ShardSet(path) as data:
            _check_engines(evidence, device, settings, kinds, data)
    path = sets.get("jpg") or next(iter(sets.values()))
    sampler = _start_sampling(evidence, device)
    with sampler or nullcontext():
        for model in settings.models or tuple(MODELS):
            _check_training(evidence, device, settings, path, model, False, sampler)
        for model in settings.compiled:
            _check_training(evidence, device, settings, path, model, True, sampler)
        evidence.check(
            f"whole run of {settings.whole_run}",
            lambda: whole_run(
                path,
                scratch / "run",
                settings.whole_run,
                device,
                steps=settings.steps,
                batch_size=settings.batch_size,
                resolution=settings.resolution,
            ),
        )
    if sampler is not None:
        trained = [check["numbers"] for check in evidence.checks if "reached_hz" in check["numbers"]]
        evidence.check("sampling", lambda: _judge_sampling(sampler, trained))


# ------------------------------------------------------------------ engines


def _check_engines(evidence: Evidence, device: torch.device, settings: Settings, kinds: str, data: ShardSet) -> None:
    train, val = data.select("train"), data.select("val")
    useless = set()
    for variant in selfcheck.NAMES:
        if f"dali {variant}" in checks.engines(train, device):
            passed = evidence.check(
                f"self-check of dali {variant} ({kinds})", partial(_self_check, train, device, variant)
            )
            if not passed:
                useless.add(f"dali {variant}")
    evidence.check(f"choice of auto ({kinds})", partial(_choice, train, device, settings))
    for selection, training in ((train, True), (val, False)):
        work = checks.requests_of(
            selection, train=training, batch_size=min(settings.batch_size, len(selection)), batches=settings.batches
        )
        expected = checks.reference(selection, work, settings.resolution)
        what = "training" if training else "evaluation"
        for name, make in checks.engines(selection, device).items():
            trials: dict[str, Callable[[Engine, checks.Tolerance], Found]] = {
                f"parity of {name} ({kinds}, {what})": lambda engine, allowed, work=work, expected=expected: (
                    checks.parity(engine, device, work, expected, settings.resolution, allowed)
                )
            }
            if training:
                for stream, consumer in _consumers(device).items():
                    trials[f"stream order of {name} ({kinds}, {stream})"] = (
                        lambda engine, allowed, work=work, expected=expected, consumer=consumer: checks.stress(
                            engine,
                            work,
                            expected,
                            settings.resolution,
                            allowed,
                            checks.heavy_kernels(device, settings.load_side, settings.load_repeats),
                            consumer(),
                        )
                    )
            for title, trial in trials.items():
                if name in useless:
                    evidence.leave_out(title, "its self-check failed, and what follows could end the process")
                else:
                    evidence.check(title, partial(_with_engine, make, trial, checks.tolerance(name, kinds, device)))


def _with_engine(
    make: "Callable[[], Engine]",
    trial: "Callable[[Engine, checks.Tolerance], Found]",
    allowed: checks.Tolerance,
) -> Found:
    with closing(make()) as engine:
        return trial(engine, allowed)


def _consumers(device: torch.device) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Streams that a consumer may be on, as contexts: the default one and, where there are others, one of its own."""
    found: dict[str, Callable[[], AbstractContextManager[Any]]] = {"default stream": nullcontext}
    if device.type == "cuda":
        found["own stream"] = lambda: torch.cuda.stream(torch.cuda.Stream(device))
    return found


def _self_check(selection: Selection, device: torch.device, variant: str) -> Found:
    """The check that `auto` makes in a process of its own, made afresh."""
    selfcheck.cache_file(selfcheck.key_of(selection.data, device, variant, selection.samples)).unlink(missing_ok=True)
    passed, reason = selfcheck.check(selection, device, variant)
    return passed, {"reason": reason}


def _choice(selection: Selection, device: torch.device, settings: Settings) -> Found:
    """What `auto` takes: a fact rather than a check, that fails only where nothing can be taken."""
    batch_size = min(settings.batch_size, len(selection))
    with closing(Loader(selection, batch_size=batch_size, engine="auto", device=device)) as loader:
        return True, {"engine": loader.engine_name, "reason": loader.engine_reason}


# ------------------------------------------------------------------ training and sampling


def readings_of(device: torch.device) -> Source:
    """Where the device's utilization is read. Raises DataError where the driver does not answer."""
    from benchmarks.gpu import GpuSource

    return CoreSource() if device.type == "cpu" else GpuSource(gpu_uuid(device))


def _start_sampling(evidence: Evidence, device: torch.device) -> Sampler | None:
    """A sampler that is not started yet; None, and a failed check, where the device cannot be read."""
    made: list[Sampler] = []

    def start() -> Found:
        made.append(Sampler(readings_of(device), HZ))
        return True, made[0].source.about

    evidence.check("connection to the driver" if device.type == "cuda" else "connection to the counters", start)
    return made[0] if made else None


def _check_training(
    evidence: Evidence,
    device: torch.device,
    settings: Settings,
    path: Path,
    model: str,
    compiled: bool,
    sampler: Sampler | None,
) -> None:
    def train() -> Found:
        passed, numbers = training_steps(
            path,
            model,
            device,
            steps=settings.steps,
            seconds=settings.seconds,
            batch_size=settings.batch_size,
            resolution=settings.resolution,
            compiled=compiled,
        )
        if compiled:
            eager = next((c["numbers"] for c in evidence.checks if c["name"] == f"training of {model}"), {})
            numbers["eager_losses"] = [eager.get(name) for name in _LOSSES]
            passed &= "last_loss" not in eager or _near(numbers, eager)
        began, ended = numbers.pop("span")
        if sampler:
            summary = sampler.summary(began - sampler.started, ended - sampler.started)
            numbers |= {"utilization": summary["metrics"], "reached_hz": summary["reached_hz"], "span_s": ended - began}
        return passed, numbers

    evidence.check(f"training of {model}{' (compiled)' if compiled else ''}", train)


def _near(compiled: Mapping[str, Any], eager: Mapping[str, Any]) -> bool:
    """Whether the losses of two trainings that saw the same batches are the same, but for rounding."""
    return all(abs(compiled[name] - eager[name]) <= COMPILED_WITHIN * eager[name] for name in _LOSSES)


def _judge_sampling(sampler: Sampler, trained: Sequence[Mapping[str, Any]]) -> Found:
    """Whether the sampler kept its pace beside training, cheaply and to the end; compiling may hold it up.

    trained: `reached_hz` and `span_s` of each training.
    """
    summary = sampler.summary()
    readings = sum(numbers["reached_hz"] * numbers["span_s"] for numbers in trained)
    pace = readings / sum(numbers["span_s"] for numbers in trained) if trained else 0.0
    passed = not summary["error"] and pace >= LEAST_HZ and summary["sampler_core_share"] < MOST_CORE_SHARE
    return passed, {**summary, "training_hz": pace}
