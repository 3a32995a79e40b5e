"""ENTRY: measure this project beside its peers.

    .venv-peers/bin/python -m benchmarks.run loader --source data/ham10000 --quick

Each benchmark writes one CSV under --out and the Markdown made from it. The peers need `make peers` and its
interpreter; with another one their rows say so.
"""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards import cli

if TYPE_CHECKING:
    from benchmarks.machine import Environment
    from benchmarks.measure import Row
    from benchmarks.training import TrainingJob
    from preprocess.progress import Progress

Told = Callable[[str], None]

_FOLDER = click.Path(path_type=Path, file_okay=False)


def _shared(command: Callable) -> Callable:
    """The options that all benchmarks on images have."""
    for option in (
        click.option("--quick", is_flag=True, help="Two minutes: fewer images, one job, shorter rounds."),
        click.option("--out", type=_FOLDER, default="benchmarks/results", show_default=True, help="Where tables go."),
        click.option("--cache", type=_FOLDER, default="data/bench", show_default=True, help="Keeps prepared data."),
        click.option(
            "--source",
            type=_FOLDER,
            envvar="HAM10000_SAMPLE",
            default="data/ham10000",
            show_default=True,
            help="HAM10000-shaped folder of originals, or one that has it in originals/ [env HAM10000_SAMPLE].",
        ),
        click.option("--rounds", type=click.IntRange(5), help="Timed rounds per system.  [default: 9, quick 6]"),
        click.option("--only", multiple=True, help="Only systems whose name contains this; repeatable."),
        click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads or processes."),
    ):
        command = option(command)
    return command


@click.group()
def main() -> None:
    """Measure this project beside its peers: interleaved rounds, medians with intervals, the machine in every row."""


@main.command()
@_shared
@click.option(
    "--packed", "packed_px", type=int, multiple=True, help="Longer side packed.  [default: 341 400, quick 341]"
)
@click.option(
    "--resolution", "resolutions_px", type=int, multiple=True, help="Output side.  [default: 224 128, quick 224]"
)
def loader(
    quick: bool,
    out: Path,
    cache: Path,
    source: Path,
    rounds: int | None,
    workers: int,
    only: tuple[str, ...],
    packed_px: tuple[int, ...],
    resolutions_px: tuple[int, ...],
) -> None:
    """Images per second and CPU seconds of loaders at equal work."""
    from benchmarks.loaders import jobs, loader_text, measure_loaders
    from benchmarks.machine import environment
    from benchmarks.peers import SYSTEMS
    from benchmarks.work import Work
    from preprocess.progress import Progress

    chosen = _chosen(SYSTEMS, only)
    work = Work(_images(source), cache, workers=workers, copies=2 if quick else 8)
    machine = environment(_command())
    rounds = rounds or (6 if quick else 9)
    packed_px = packed_px or ((341,) if quick else (341, 400))
    todo = jobs(work, packed_px, resolutions_px or ((224,) if quick else (224, 128)))
    rows = []
    with Progress("loader", len(todo) * len(chosen) * (1 + rounds), "runs") as bar:
        for job in todo:
            seconds = 0.5 if quick else 2.0
            told = _advance(bar)
            rows += measure_loaders(chosen, job, machine, rounds=rounds, seconds=seconds, told=told)
    _publish(out, "loader-quick" if quick else "loader", rows, loader_text)


@main.command()
@_shared
@click.option("--packed", "packed_px", type=int, multiple=True, help="Longer side packed.  [default: 400]")
def pack(
    quick: bool,
    out: Path,
    cache: Path,
    source: Path,
    rounds: int | None,
    workers: int,
    only: tuple[str, ...],
    packed_px: tuple[int, ...],
) -> None:
    """Images per second, bytes and PSNR of writers, by write mode."""
    from benchmarks.machine import environment
    from benchmarks.packers import PACKERS
    from benchmarks.packing import measure_packing, packing_text
    from benchmarks.work import Work
    from preprocess.progress import Progress

    chosen = _chosen(PACKERS, only)
    rounds = rounds or (6 if quick else 9)
    machine = environment(_command())
    rows = []
    with Progress("pack", len(packed_px or (400,)) * len(chosen) * (1 + rounds), "runs") as bar:
        for px in packed_px or (400,):
            work = Work(_images(source), cache, workers=workers, packed_px=px, copies=1 if quick else 2)
            seconds = 0.5 if quick else 2.0
            told = _advance(bar)
            rows += measure_packing(chosen, work, machine, rounds=rounds, seconds=seconds, told=told)
    _publish(out, "pack-quick" if quick else "pack", rows, packing_text)


def _models(command: Callable) -> Callable:
    """The options of the benchmarks that train."""
    for option in (
        click.option("--model", "models", multiple=True, help="Repeatable.  [default: all eight, quick resnet18]"),
        click.option("--resolution", type=int, default=224, show_default=True, help="Side of the images, px."),
        click.option("--batch-size", type=int, default=16, show_default=True, help="Images per step."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    ):
        command = option(command)
    return command


@main.command()
@_shared
@_models
def training(quick: bool, rounds: int | None, only: tuple[str, ...], **settings: Any) -> None:
    """Images per second of the models: eager, channels-last, compiled, each beside a cached batch."""
    from benchmarks.speed import SYSTEMS, measure_training, training_text

    names = _chosen({name: name for name in SYSTEMS}, only)

    def measure(job: "TrainingJob", machine: "Environment", rounds: int, seconds: float, told: Told) -> list["Row"]:
        return measure_training(job, names, machine, rounds=rounds, seconds=seconds, told=told)

    _train("training", measure, len(names) + 1, training_text, quick, rounds, **settings)


@main.command()
@_shared
@_models
@click.option(
    "--style",
    type=click.Choice(["eager NCHW", "channels-last", "compiled"]),
    default="channels-last",
    show_default=True,
    help="How the models are run.",
)
def stalls(quick: bool, rounds: int | None, only: tuple[str, ...], style: str, **settings: Any) -> None:
    """How much of training waits for data: cached batch, warm files, cold files, and the counted wait."""
    from benchmarks.stalls import measure_stalls, stalls_text
    from shards.errors import UsageError

    if only:
        raise UsageError("--only: the systems of `stalls` belong together; choose models with --model")

    def measure(job: "TrainingJob", machine: "Environment", rounds: int, seconds: float, told: Told) -> list["Row"]:
        return measure_stalls(job, style, machine, rounds=rounds, seconds=seconds, told=told)

    _train("stalls", measure, 3, stalls_text, quick, rounds, **settings)


def _train(
    name: str,
    measure: Callable[["TrainingJob", "Environment", int, float, Told], list["Row"]],
    systems: int,
    text: Callable[[list], str],
    quick: bool,
    rounds: int | None,
    *,
    models: tuple[str, ...],
    source: Path,
    cache: Path,
    out: Path,
    workers: int,
    resolution: int,
    batch_size: int,
    device: str,
) -> None:
    """Run a benchmark that trains, model by model; what is done is written after each, so that a stop loses one."""
    from benchmarks.machine import environment
    from benchmarks.training import TrainingJob
    from benchmarks.work import Work
    from preprocess.progress import Progress
    from train.models import MODELS, check_resolution, timm_name

    models = models or (("resnet18",) if quick else tuple(MODELS))
    for model in models:
        timm_name(model)
        check_resolution(model, resolution)
    rounds = rounds or (5 if quick else 6)
    work = Work(_images(source), cache, 400, resolution, batch_size, workers, copies=2 if quick else 4)
    machine = environment(_command())
    rows: list[Row] = []
    with Progress(name, len(models) * systems * (1 + rounds), "runs") as bar:
        for model in models:
            job = TrainingJob(work, model, device)
            rows += measure(job, machine, rounds, 0.5 if quick else 4.0, _advance(bar))
            _publish(out, f"{name}-quick" if quick else name, rows, text, show=model == models[-1])


def _chosen(systems: dict, only: tuple[str, ...]) -> list:
    """The systems that `--only` names, all without it. Raises UsageError where there are none."""
    from shards.errors import UsageError

    chosen = [s for name, s in systems.items() if not only or any(text.lower() in name.lower() for text in only)]
    if not chosen:
        raise UsageError(f"--only {' '.join(only)}: no system is called like that; they are {', '.join(systems)}")
    return chosen


def _advance(bar: "Progress") -> Callable[[str], None]:
    """Counts a step on the bar when the next one begins."""
    return lambda step: bar.advance(1)


def _images(source: Path) -> Path:
    """The folder of originals: the source itself, or its `originals` part."""
    inner = source / "originals"
    return inner if inner.is_dir() else source


def _command() -> str:
    """The command line as a user would type it, without the machine's own paths."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", "benchmarks.run", *words])


def _publish(out: Path, name: str, rows: list, text: Callable[[list], str], show: bool = True) -> None:
    """Write the CSV, and the Markdown from the CSV as it was read back; show the Markdown."""
    from benchmarks.tables import read_csv, write_csv
    from shards.writer import write_durably

    table = out / f"{name}.csv"
    write_csv(table, rows)
    markdown = text(read_csv(table))
    write_durably(out / f"{name}.md", markdown.encode())
    if show:
        click.echo(markdown)
    click.echo(f"wrote {table} and {table.with_suffix('.md')}", err=True)


if __name__ == "__main__":
    cli.run(main)
