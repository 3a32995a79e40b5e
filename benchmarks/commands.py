"""The subcommands of `benchmarks.run` that train."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.options import (
    Told,
    advance,
    check_models,
    chosen,
    common,
    images,
    kept,
    measured_on,
    publish,
    seconds_option,
    shared,
    training_options,
    training_work,
)

if TYPE_CHECKING:
    from benchmarks.machine import Environment
    from benchmarks.measure import Row
    from benchmarks.training import TrainingJob


_QUICK = {"training": "alexnet", "stalls": "resnet18"}
"""The model that --quick trains; alexnet compiles fastest."""
_ADD = click.option("--add", is_flag=True, help="Keep what the table in --out has of models that are not named now.")


@click.command()
@shared
@training_options(quick=_QUICK["training"])
@_ADD
@seconds_option("4", quick="0.25")
@click.option("--fp32", is_flag=True, help="Also eager and compiled in float32, where the device trains in less.")
def training(quick: bool, rounds: int | None, only: tuple[str, ...], fp32: bool, **settings: Any) -> None:
    """Images per second of the models: eager, channels-last, compiled, each beside a cached batch.

    Compiling starts cold: a minute for resnet18 on two cores, so --quick trains alexnet, and the target, which is one
    of resnet18, is not judged. --quick leaves out eager NCHW with this project's loader, but where --only names it.
    """
    from benchmarks.speed import IN_FP32, NOT_IN_QUICK, SYSTEMS, matrix_products, measure_training, training_text
    from train import device as devices

    known = {name: name for name in (*SYSTEMS, *(IN_FP32 if fp32 else ()))}
    names = chosen(known, only, NOT_IN_QUICK if quick else ())

    def measure(job: "TrainingJob", machine: "Environment", rounds: int, seconds: float, told: Told) -> list["Row"]:
        return measure_training(job, names, machine, rounds=rounds, seconds=seconds, told=told)

    peaks = matrix_products(names, devices.choose(settings["device"]))
    rounds, seconds = rounds or (5 if quick else 6), settings.pop("seconds") or (0.25 if quick else 4.0)
    _train("training", measure, len(names) + len(peaks), training_text, quick, rounds, seconds=seconds, **settings)


@click.command()
@shared
@training_options(quick=_QUICK["stalls"])
@_ADD
@seconds_option("1")
@click.option(
    "--style",
    type=click.Choice(["eager NCHW", "channels-last", "compiled"]),
    default="channels-last",
    show_default=True,
    help="How the models are run.",
)
@click.option(
    "--engine",
    "engines",
    type=click.Choice(["jpg", "raw", "resident", "dali"]),
    multiple=True,
    help="Repeatable: native with JPEG or raw files, resident, or dali with JPEG files.  [default: the first three, on "
    "a GPU all four; quick jpg]",
)
def stalls(
    quick: bool, rounds: int | None, only: tuple[str, ...], style: str, engines: tuple[str, ...], **settings: Any
) -> None:
    """How much of training waits for data: cached batch, warm files, cold files, and the counted wait.

    Rounds are many and short, 20 here (10 with --quick) unless --rounds says otherwise: on a machine whose speed
    drifts, two systems are compared as well as their turns are near each other. A turn is a step at least, so a model
    whose steps take seconds wants a smaller --batch-size.
    """
    from benchmarks.stalls import ENGINES, measure_stalls, stalls_text
    from shards.common.errors import UsageError
    from train import device as devices

    if only:
        raise UsageError("--only: the systems of `stalls` belong together; choose models with --model")

    def measure(job: "TrainingJob", machine: "Environment", rounds: int, seconds: float, told: Told) -> list["Row"]:
        return measure_stalls(
            replace(job, waited_for=True), style, engines, machine, rounds=rounds, seconds=seconds, told=told
        )

    gpu = devices.choose(settings["device"]).type == "cuda"
    engines = engines or (("jpg",) if quick else tuple(name for name in ENGINES if gpu or name != "dali"))
    systems = 1 + sum(len(ENGINES[engine]) for engine in engines)
    rounds, seconds = rounds or (10 if quick else 20), settings.pop("seconds") or (0.5 if quick else 1.0)
    _train("stalls", measure, systems, stalls_text, quick, rounds, seconds=seconds, **settings)


def _train(
    name: str,
    measure: Callable[["TrainingJob", "Environment", int, float, Told], list["Row"]],
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
    """Run a benchmark that trains, model by model; what is done is written after each, so that a stop loses one."""
    from benchmarks.training import TrainingJob
    from shards.common.progress import Progress
    from train.models import MODELS

    models = models or ((_QUICK[name],) if quick else tuple(MODELS))
    check_models(models, resolution)
    work = training_work(source, cache, resolution, batch_size, workers, quick)
    machine = measured_on(work, device)
    table = f"{name}-quick" if quick else name
    rows = kept(out, table, models, work) if add else []
    with Progress(name, len(models) * systems * (2 + rounds), "runs") as bar:
        for model in models:
            job = TrainingJob(work, model, device)
            rows += measure(job, machine, rounds, seconds, advance(bar))
            publish(out, table, rows, text, show=model == models[-1])


@click.command()
@common
@training_options(["resnet18"], resolution=64)
@click.option("--epochs", type=click.IntRange(1), help="Of every cell.  [default: 20, quick 1]")
@click.option("--fractions", help="Of every model and seed.  [default: 1/8,1/4,1/2,1, quick 1]")
@click.option("--compile", type=click.Choice(["on", "off"]), help="torch.compile.  [default: on, quick off]")
def grid(
    quick: bool,
    out: Path,
    cache: Path,
    source: Path,
    rounds: int | None,
    models: tuple[str, ...],
    resolution: int,
    batch_size: int,
    epochs: int | None,
    fractions: str | None,
    compile: str | None,
    device: str,
) -> None:
    """A study whose cells share a worker process, against one process per cell."""
    from benchmarks.datasets import sized
    from benchmarks.grid import GridJob, grid_text, measure_grid
    from benchmarks.peers.system import Work
    from shards.common.progress import Progress
    from train.study.cells import parse_fractions

    check_models(models, resolution)
    shares = tuple(parse_fractions(fractions or ("1" if quick else "1/8,1/4,1/2,1")))
    work = sized(Work(images(source), cache, 200, resolution, batch_size), 96 if quick else 312)
    epochs = epochs or (1 if quick else 20)
    job = GridJob(work, tuple(models), shares, (0, 1), epochs, compile or ("off" if quick else "on"), device)
    machine = measured_on(work, device)
    rounds = rounds or (5 if quick else 6)
    with Progress("grid", 2 * (2 + rounds), "studies") as bar:
        rows = measure_grid(job, machine, rounds=rounds, told=advance(bar))
    publish(out, "grid-quick" if quick else "grid", rows, grid_text)


@click.command()
@common
@click.option(
    "--packed", "packed_px", type=click.IntRange(1), default=400, show_default=True, help="Longer side packed, px."
)
@click.option("--resolution", type=int, default=224, show_default=True, help="Side of the images, px.")
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda or cuda:N.")
def predict(
    quick: bool, out: Path, cache: Path, source: Path, rounds: int | None, packed_px: int, resolution: int, device: str
) -> None:
    """Prediction beside evaluation with a resnet18, and how long `train.predict` and `train.serve` take to start."""
    from benchmarks.datasets import sized
    from benchmarks.peers.system import Work
    from benchmarks.predict import measure_predicting, predicting_text
    from shards.common.progress import Progress
    from train.models import check_resolution

    check_resolution("resnet18", resolution)
    work = sized(Work(images(source), cache, packed_px, resolution, batch_size=64), 96 if quick else 624)
    machine = measured_on(work, device)
    rounds = rounds or (6 if quick else 9)
    with Progress("predict", 1 + 3 * (2 + rounds) + 2 * (1 + rounds), "runs") as bar:
        rows = measure_predicting(
            work, "resnet18", device, machine, rounds=rounds, seconds=0.5 if quick else 4.0, told=advance(bar)
        )
    publish(out, "predict-quick" if quick else "predict", rows, predicting_text)
