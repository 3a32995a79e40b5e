"""What the subcommands of `benchmarks.run` share: options, the choice of systems, and writing tables."""

import re
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shards.common.machine import available_cores

if TYPE_CHECKING:
    from benchmarks.machine import Environment
    from benchmarks.measure import Row
    from benchmarks.peers.system import Work
    from shards.common.progress import Progress

Told = Callable[[str], None]

_FOLDER = click.Path(path_type=Path, file_okay=False)


def common(command: Callable) -> Callable:
    """The options that all benchmarks on images have."""
    for option in (
        click.option(
            "--quick", is_flag=True, help="Two minutes: less of everything; which systems, each command says."
        ),
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
        click.option(
            "--rounds", type=click.IntRange(5), help="Timed rounds per system.  [default: 5 to 9; stalls 20, quick 10]"
        ),
    ):
        command = option(command)
    return command


def shared(command: Callable) -> Callable:
    """The options of the benchmarks whose systems can be chosen, and share a number of workers."""
    for option in (
        common,
        click.option("--only", multiple=True, help="Only systems whose name contains this; repeatable."),
        click.option(
            "--workers",
            type=click.IntRange(1),
            default=available_cores,
            show_default="the cores",
            help="Threads or processes.",
        ),
    ):
        command = option(command)
    return command


def seconds_option(default: str, quick: str = "0.5") -> Callable[[Callable], Callable]:
    """The option for the least length of a round; default, quick: as the help says them."""
    kind = click.FloatRange(0, min_open=True)
    return click.option(
        "--seconds", type=kind, help=f"Least length of a round, s.  [default: {default}, quick {quick}]"
    )


def training_options(
    models: Sequence[str] = (), resolution: int = 224, quick: str = ""
) -> Callable[[Callable], Callable]:
    """The options of the benchmarks that train, with these defaults; no models: all eight, with --quick that one."""
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
    """The systems that `--only` names; without it all but those `left_out`. Raises UsageError where there are none."""
    from shards.common.errors import UsageError

    if only:
        found = [s for name, s in systems.items() if any(text.lower() in name.lower() for text in only)]
    else:
        found = [s for name, s in systems.items() if name not in left_out]
    if not found:
        raise UsageError(f"--only {' '.join(only)}: no system is called like that; they are {', '.join(systems)}")
    return found


def check_models(models: Sequence[str], resolution: int) -> None:
    """Raise UsageError for a model that is not known, or that does not take images of this size, px."""
    from train.models import check_resolution, timm_name

    for model in models:
        timm_name(model)
        check_resolution(model, resolution)


def training_work(source: Path, cache: Path, resolution: int, batch_size: int, workers: int, quick: bool) -> "Work":
    """The images of a benchmark that trains. Raises UsageError where they do not make one batch, DataError where the
    source is not what it should be."""
    from benchmarks.datasets import names, sized
    from benchmarks.peers.system import Work
    from shards.common.errors import UsageError

    work = sized(Work(images(source), cache, 400, resolution, batch_size, workers), 624 if quick else 1248)
    count = len(names(work))
    if batch_size > count:
        raise UsageError(f"--batch-size {batch_size}: more than the {count:,} samples of an epoch; use a smaller one")
    return work


def advance(bar: "Progress") -> Callable[[str], None]:
    """Counts a step on the bar when the next one begins."""
    return lambda step: bar.advance(1)


def images(source: Path) -> Path:
    """The folder of originals: the source itself, or its `originals` part."""
    inner = source / "originals"
    return inner if inner.is_dir() else source


def command_line(work: "Work | None" = None) -> str:
    """The command line as a user would type it, without the machine's own paths; what `work` reads is a comment at its
    end.

    Raises DataError where the source is not what it should be.
    """
    from benchmarks.datasets import described

    words = [re.sub(r"(^|=)/\S*/", r"\1", word) for word in sys.argv[1:]]
    command = shlex.join(["python", "-m", "benchmarks.run", *words])
    return command if work is None else f"{command}  # {described(work)}"


def measured_on(work: "Work", device: str) -> "Environment":
    """What goes into every row: the command line, the machine, and of its GPUs the one that `device` names.

    Raises UsageError for a device that is not there, DataError where the source is not what it should be.
    """
    from benchmarks.machine import environment
    from train import device as devices

    return environment(command_line(work), devices.gpu_uuid(devices.choose(device)))


def kept(out: Path, name: str, models: Collection[str], work: "Work") -> list["Row"]:
    """The rows of a table that are of other models than these; none where there is no table yet.

    Raises UsageError where they are of another resolution than `work`. Batch sizes may differ: each model's stands
    beside it.
    """
    from benchmarks.tables import read_csv
    from shards.common.errors import UsageError

    table = out / f"{name}.csv"
    rows = [row for row in read_csv(table) if row.model not in models] if table.exists() else []
    for row in rows:
        if row.resolution_px != work.resolution_px:
            raise UsageError(
                f"--add: {table} has {row.model} at --resolution {row.resolution_px}, not {work.resolution_px}; use "
                "the same one, or another --out"
            )
    return rows


def publish(out: Path, name: str, rows: list, text: Callable[[list], str], show: bool = True) -> None:
    """Write the CSV, and the Markdown from the CSV as it was read back; show the Markdown."""
    from benchmarks.tables import read_csv, write_csv
    from shards.common.files import write_durably

    table = out / f"{name}.csv"
    write_csv(table, rows)
    markdown = text(read_csv(table))
    write_durably(out / f"{name}.md", markdown.encode())
    if show:
        click.echo(markdown)
    click.echo(f"wrote {table} and {table.with_suffix('.md')}", err=True)
