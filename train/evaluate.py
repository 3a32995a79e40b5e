"""Test trained runs on another image set: how far what they learned carries.

    python -m train.evaluate --run runs/resnet18_f1_s0_u0 --data data/pad --map pad-ufes-20-ham10000 --by sex,age
    python -m train.evaluate --run runs/a --run runs/b --data data/isic2019 --map isic2019-ham10000

Writes a folder with result.json and predictions.parquet: every metric over the classes that both have, with intervals
that keep the images of a lesion or patient together, by subgroup if asked. `python -m train.report` shows it.
"""

from pathlib import Path

import click

from shards.common import cli
from shards.common.errors import DataError, UsageError
from shards.store import Place, name_of
from train.inference.options import network_options


@click.command(cls=cli.Command, context_settings={"show_default": True, "max_content_width": 120})
@network_options
@click.option(
    "--data",
    required=True,
    type=Place(),
    help="Shard set to test on, packed with any classes: a folder, or an address such as s3://bucket/set.",
)
@click.option(
    "--map",
    "set_map",
    metavar="NAME|FILE",
    help="What the set's labels are among the run's classes: isic2019-ham10000 …, or a table with the columns from and "
    "to. Without it, equal names are equal classes.",
)
@click.option(
    "--map-run",
    "run_map",
    metavar="NAME|FILE",
    help="What the run's classes become first: ham10000-malignant, for a set of two classes. Probabilities are added.",
)
@click.option(
    "--split",
    type=click.Choice(("all", "train", "val", "test")),
    show_default="all; test for the run's own set",
    help="Which images of the set are used. Those that a run was trained or tuned on are left out.",
)
@click.option(
    "--by",
    metavar="COLUMN,...",
    help="Also measure subgroups by these columns: sex, age, site, attribution, skin_tone or any other. age:40:60 "
    "names the ends of bins.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    show_default="elsewhere/DATA in the first run",
    help="New folder to write. train.report shows only those in elsewhere in a run.",
)
@click.option(
    "--resamples",
    type=click.IntRange(min=200),
    default=1000,
    help="Resamples for the intervals. More make their ends steadier and the command slower.",
)
def main(
    folders: tuple[Path, ...],
    data: str | Path,
    set_map: str | None,
    run_map: str | None,
    split: str | None,
    by: str | None,
    out: Path | None,
    resamples: int,
    device: str,
    memory_format: str,
    threads: int | None,
) -> None:
    """Test runs on another image set. Of several runs, the mean of the probabilities is tested.

    Metrics are those of a run, over the classes that both have. Probabilities are divided by their sum over these.
    """
    shown = folders[0] / "elsewhere"
    target = out or shown / name_of(data)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: is there already; delete it, or choose another folder with --out")
    asked = [_column(part) for part in (by or "").split(",") if part.strip()]
    with cli.importing():
        from shards.common.progress import Progress
        from shards.labelmap import read_map
        from shards.shardset import ShardSet
        from train import device as devices
        from train.inference.elsewhere import Elsewhere, write
        from train.inference.predictor import Ensemble

        maps = [None if name is None else read_map(name) for name in (set_map, run_map)]
        devices.use_threads(threads)
        ensemble = Ensemble(folders, device, memory_format)
    with ShardSet(data) as shards, Progress("evaluating", lines=False, transient=True) as progress:
        job = Elsewhere(ensemble, folders, shards, split, *maps, warn=progress.warn)
        result, table = job.measure(asked, resamples, progress.at)
        write(target, result, table)
    for line in (*result["notes"], result["summary"]):
        click.echo(line)
    what = "it" if target.resolve().parent == shown.resolve() else f"only what is in {shown}"
    click.echo(f"{target}: `{cli.typed('train.report')} {folders[0]}` shows {what}")


def _column(part: str) -> tuple[str, list[float]]:
    """A column of --by, and the ends of its bins. Raises UsageError."""
    name, *ends = (one.strip() for one in part.split(":"))
    try:
        edges = [float(end) for end in ends]
    except ValueError:
        edges = [0.0, 0.0]
    if not name or edges != sorted(set(edges)):
        raise UsageError(f"--by {part.strip()}: name a column, and the ends of bins as rising numbers, as in age:40:60")
    return name, edges


if __name__ == "__main__":
    cli.run(main)
