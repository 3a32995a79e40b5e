"""The command line of a benchmark: the options that several have, as one `Settings`, and the writing of its table."""

import functools
import re
import shlex
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.common.cli import Command, typed_line
from shards.common.errors import UsageError
from shards.common.machine import available_cores

if TYPE_CHECKING:
    from benchmarks.datasets import Job
    from benchmarks.measure import Measurement, Row
    from benchmarks.pages import Page

_FOLDER = click.Path(path_type=Path, file_okay=False)

OUT = click.option(
    "--out",
    type=_FOLDER,
    default="benchmarks/results",
    show_default=True,
    help="Folder for tables and charts. Older ones of the same name are replaced.",
)
ONLY = click.option(
    "--only", multiple=True, help="Only systems whose name contains this text, which saves time. Repeatable."
)
WORKERS = click.option(
    "--workers",
    type=click.IntRange(1),
    default=available_cores,
    show_default="the cores",
    help="Threads or processes of a loader. More than the cores gain nothing.",
)
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N. auto takes a GPU if there is one."
)
ADD = click.option("--add", is_flag=True, help="Keep the rows that the table in --out has for other models.")
_COMMON = (
    click.option(
        "--source",
        type=_FOLDER,
        envvar="HAM10000_SAMPLE",
        default="data/ham10000",
        show_default=True,
        help="HAM10000-shaped folder of original images, or its parent [env HAM10000_SAMPLE]. It is only read.",
    ),
    click.option(
        "--cache",
        type=_FOLDER,
        default="data/bench",
        show_default=True,
        help="Folder that keeps prepared data, so that a second run starts sooner; it grows to some GB.",
    ),
    OUT,
    click.option("--quick", is_flag=True, is_eager=True, help="A few minutes: fewer images and rounds."),
)
Decorator = Callable[[Callable], Callable]


def quick_option(
    *names: str, kind: Any, text: str, default: Any, quick: Any, shown: str = "", multiple: bool = False
) -> Decorator:
    """An option with another default under --quick. shown: what the help says of `default`, if not its value."""

    def words(value: Any) -> str:
        return " ".join(map(str, value)) if multiple else str(value)

    other = "" if quick == default else f", quick {words(quick)}"
    return click.option(
        *names,
        type=kind,
        multiple=multiple,
        help=f"{text}  [default: {shown or words(default)}{other}]",
        callback=lambda context, _, value: (
            (quick if context.params["quick"] else default) if value in (None, ()) else value
        ),
    )


def training_options(models: Sequence[str] = (), quick: Sequence[str] = ()) -> list[Decorator]:
    """The options of the benchmarks that train, with their defaults. models: none for all eight."""
    model = {"default": tuple(models), "quick": tuple(quick or models), "shown": " ".join(models) or "all eight"}
    return [
        quick_option(
            "--model",
            "models",
            kind=str,
            text="Model to train; each takes its own time. Repeatable.",
            multiple=True,
            **model,
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(1),
            default=16,
            show_default=True,
            help="Images per step. More take more memory.",
        ),
        DEVICE,
    ]


@dataclass(frozen=True)
class Settings:
    """What the command line says, in the options that several benchmarks have. name: of the benchmark.

    models: none for all. resolution: side of the images, px. seconds: minimum length of a round.
    """

    name: str
    quick: bool
    out: Path
    cache: Path
    source: Path
    rounds: int
    seconds: float = 0.0
    workers: int = 2
    only: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    resolution: int = 224
    batch_size: int = 64
    device: str = "auto"
    add: bool = False

    def chosen(self, systems: dict[str, Any]) -> list:
        """The systems that --only names; without it, all. Raises UsageError where there are none."""
        texts = [text.lower() for text in self.only] or [""]
        found = [system for name, system in systems.items() if any(text in name.lower() for text in texts)]
        if not found:
            known = "; ".join(systems)
            raise UsageError(f"--only {' '.join(self.only)}: no system has such a name; they are {known}")
        return found

    def check_models(self) -> None:
        """Raise UsageError for an unknown model, or one that does not take images of this size."""
        from train.models import check_resolution, timm_name

        for model in self.models:
            timm_name(model)
            check_resolution(model, self.resolution)

    def job(self, packed_px: int, count: int, quick: int, whole_batches: bool = False) -> "Job":
        """About `count` images of the source, with --quick about `quick`.

        Raises DataError where the source is not a HAM10000-shaped folder.
        """
        from benchmarks.datasets import Job, originals_in, sized

        whole = Job(originals_in(self.source), self.cache, packed_px, self.resolution, self.batch_size, self.workers)
        return sized(whole, quick if self.quick else count, whole_batches=whole_batches)

    @contextmanager
    def measurement(self, job: "Job", steps: int) -> Generator["Measurement", None, None]:
        """Where and how long to time. It shows how many of the `steps` have begun.

        Raises UsageError for a device that is not there.
        """
        from benchmarks.datasets import described
        from benchmarks.machine import environment
        from benchmarks.measure import Measurement
        from shards.common.progress import Progress
        from train import device as devices

        command = f"{command_line('benchmarks.run')}  # {described(job)}"
        machine = environment(command, devices.gpu_uuid(devices.choose(self.device)))
        with Progress(self.name, steps, "runs") as bar:
            yield Measurement(machine, self.rounds, self.seconds, lambda step: bar.advance(1))

    @property
    def table(self) -> Path:
        """The CSV."""
        return self.out / f"{self.name}{'-quick' if self.quick else ''}.csv"

    def publish(self, page: "Page", rows: list["Row"], show: bool = True) -> None:
        """Write the CSV and the Markdown made from it, and show that."""
        from benchmarks.tables import write_csv

        write_csv(self.table, rows)
        markdown = page.write(self.table)
        if show:
            click.echo(markdown)
        click.echo(f"wrote {self.table} and {self.table.with_suffix('.md')}", err=True)


def benchmark(
    name: str, *options: Decorator, rounds: tuple[int, int], seconds: tuple[float, float] | None = None
) -> Callable[[Callable], click.Command]:
    """Make a function a subcommand. It gets its `Settings`, and the options that only it has by their names.

    options: those of `Settings` that it has beside the common ones. rounds, seconds: the default, and that of --quick;
    without seconds a round is one pass.
    """
    length = {
        "text": "Minimum length of a round, s. Longer ones vary less.",
        "kind": click.FloatRange(0, min_open=True),
    }
    times = {"text": "Timed rounds per system. More make the intervals narrower.", "kind": click.IntRange(5)}
    timing = [quick_option("--rounds", default=rounds[0], quick=rounds[1], **times)]
    if seconds:
        timing.append(quick_option("--seconds", default=seconds[0], quick=seconds[1], **length))

    def make(function: Callable) -> click.Command:
        @functools.wraps(function)
        def call(**given: Any) -> None:
            shared = {field.name: given.pop(field.name) for field in fields(Settings) if field.name in given}
            function(Settings(name, **shared), **given)

        built: Callable = call
        for option in reversed([*_COMMON, *timing, *options]):
            built = option(built)
        return click.command(name, cls=Command)(built)

    return make


def command_line(module: str) -> str:
    """The command line as a user would type it, without the machine's own paths."""
    words = [re.sub(r"(^|=)/\S*/", r"\1", word) for word in typed_line(module)]
    return shlex.join(words)
