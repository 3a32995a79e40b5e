"""What the subcommands of `benchmarks.run` share: options, the choice of systems, and the writing of tables."""

import re
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.common.machine import available_cores

if TYPE_CHECKING:
    from benchmarks.datasets import Job
    from benchmarks.machine import Environment
    from benchmarks.measure import Row
    from benchmarks.worker import Announce
    from shards.common.progress import Progress

_FOLDER = click.Path(path_type=Path, file_okay=False)


def common(command: Callable) -> Callable:
    """The options that all benchmarks on images have."""
    for option in (
        click.option(
            "--quick", is_flag=True, is_eager=True, help="About two minutes: fewer systems, images and rounds."
        ),
        click.option(
            "--out", type=_FOLDER, default="benchmarks/results", show_default=True, help="Folder for the tables."
        ),
        click.option(
            "--cache", type=_FOLDER, default="data/bench", show_default=True, help="Folder that keeps prepared data."
        ),
        click.option(
            "--source",
            type=_FOLDER,
            envvar="HAM10000_SAMPLE",
            default="data/ham10000",
            show_default=True,
            help="HAM10000-shaped folder of original images, or its parent [env HAM10000_SAMPLE].",
        ),
    ):
        command = option(command)
    return command


def shared(command: Callable) -> Callable:
    """The options of the benchmarks that compare systems: which ones, and with how many workers."""
    for option in (
        common,
        click.option("--only", multiple=True, help="Only systems whose name contains this text. Repeatable."),
        click.option(
            "--workers",
            type=click.IntRange(1),
            default=available_cores,
            show_default="the cores",
            help="Threads or processes of a loader.",
        ),
    ):
        command = option(command)
    return command


def rounds_option(default: int, quick: int) -> Callable[[Callable], Callable]:
    """The option for the number of rounds, with its default and that of --quick."""
    return _quick_option("--rounds", click.IntRange(5), "Timed rounds per system.", default, quick)


def seconds_option(default: float, quick: float) -> Callable[[Callable], Callable]:
    """The option for the minimum length of a round, with its default and that of --quick."""
    kind = click.FloatRange(0, min_open=True)
    return _quick_option("--seconds", kind, "Minimum length of a round, s.", default, quick)


def _quick_option(name: str, kind: click.ParamType, text: str, default: Any, quick: Any) -> Callable:
    return click.option(
        name,
        type=kind,
        help=f"{text}  [default: {default}, quick {quick}]",
        callback=lambda context, _, value: (quick if context.params["quick"] else default) if value is None else value,
    )


def training_options(
    models: Sequence[str] = (), resolution: int = 224, quick: str = ""
) -> Callable[[Callable], Callable]:
    """The options of the benchmarks that train, with these defaults. Without `models`: all eight, and with --quick the
    one that `quick` names."""
    if models:
        model = click.option("--model", "models", multiple=True, default=models, show_default=True, help="Repeatable.")
    else:
        model = click.option(
            "--model", "models", multiple=True, help=f"Repeatable.  [default: all eight, quick {quick}]"
        )

    def add(command: Callable) -> Callable:
        for option in (
            model,
            click.option("--resolution", default=resolution, show_default=True, help="Side of the images, px."),
            click.option(
                "--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Images per step."
            ),
            click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        ):
            command = option(command)
        return command

    return add


def chosen(systems: dict, only: tuple[str, ...], left_out: Collection[str] = ()) -> list:
    """The systems that `--only` names; without it, all except `left_out`. Raises UsageError where there are none."""
    from shards.common.errors import UsageError

    if only:
        found = [s for name, s in systems.items() if any(text.lower() in name.lower() for text in only)]
    else:
        found = [s for name, s in systems.items() if name not in left_out]
    if not found:
        raise UsageError(f"--only {' '.join(only)}: no system has such a name; they are {', '.join(systems)}")
    return found


def check_models(models: Sequence[str], resolution: int) -> None:
    """Raise UsageError for an unknown model, or one that does not take images of this size, px."""
    from train.models import check_resolution, timm_name

    for model in models:
        timm_name(model)
        check_resolution(model, resolution)


def training_images(source: Path, cache: Path, resolution: int, batch_size: int, workers: int, quick: bool) -> "Job":
    """The images of a benchmark that trains. Raises UsageError where they do not fill one batch, DataError where the
    source is not a HAM10000-shaped folder."""
    from benchmarks.datasets import Job, originals_in, samples, sized
    from shards.common.errors import UsageError

    job = sized(Job(originals_in(source), cache, 400, resolution, batch_size, workers), 624 if quick else 1248)
    count = len(samples(job))
    if batch_size > count:
        raise UsageError(f"--batch-size {batch_size}: more than the {count:,} samples of an epoch; use a smaller one")
    return job


def advance(bar: "Progress") -> "Announce":
    """Counts a step on the bar when the next one begins."""
    return lambda step: bar.advance(1)


def command_line(job: "Job | None" = None) -> str:
    """The command line as a user would type it, without the machine's own paths, and a comment on what `job` reads.

    Raises DataError where the source is not a HAM10000-shaped folder.
    """
    from benchmarks.datasets import described

    words = [re.sub(r"(^|=)/\S*/", r"\1", word) for word in sys.argv[1:]]
    command = shlex.join(["python", "-m", "benchmarks.run", *words])
    return command if job is None else f"{command}  # {described(job)}"


def measured_on(job: "Job", device: str) -> "Environment":
    """What every row says of its origin: the command line, the machine, and the GPU that `device` names.

    Raises UsageError for a device that is not there, DataError where the source is not a HAM10000-shaped folder.
    """
    from benchmarks.machine import environment
    from train import device as devices

    return environment(command_line(job), devices.gpu_uuid(devices.choose(device)))


def kept(out: Path, name: str, models: Collection[str], resolution: int) -> list["Row"]:
    """The rows of a table about other models than these; none where there is no table yet.

    Raises UsageError where they have another resolution. Batch sizes may differ: the table has one per model.
    """
    from benchmarks.tables import read_csv
    from shards.common.errors import UsageError

    table = out / f"{name}.csv"
    rows = [row for row in read_csv(table) if row.model not in models] if table.exists() else []
    for row in rows:
        if row.resolution_px != resolution:
            raise UsageError(
                f"--add: {table} has {row.model} at --resolution {row.resolution_px}, not {resolution}; use "
                "the same one, or another --out"
            )
    return rows


def publish(out: Path, name: str, rows: list, text: Callable[[list], str], show: bool = True) -> None:
    """Write the CSV, read it back, write its Markdown, and show that."""
    from benchmarks.tables import read_csv, write_csv
    from shards.common.files import write_durably

    table = out / f"{name}.csv"
    write_csv(table, rows)
    markdown = text(read_csv(table))
    write_durably(out / f"{name}.md", markdown.encode())
    if show:
        click.echo(markdown)
    click.echo(f"wrote {table} and {table.with_suffix('.md')}", err=True)
