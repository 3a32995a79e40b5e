"""A study as one HTML page that needs nothing else.

    python -m train.report runs/study

Writes runs/study/report.html: the findings in plain words, learning curves with bands, costs, confused classes,
calibration, differences between models, variance shares, tests on other sets, speed, settings. A single run folder
works too. Several folders become one study, to see runs from random weights beside runs from pretrained ones for
example.
"""

from pathlib import Path

import click

from shards.common import cli
from shards.common.errors import UsageError
from shards.store import Place


@click.command(cls=cli.Command, context_settings={"show_default": True})
@click.argument("studies", metavar="STUDY...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    show_default="report.html in the first STUDY",
    help="Page to write. An older one is replaced.",
)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    help="Also write every picture as SVG, PDF and PNG into this folder. Takes some seconds more.",
)
@click.option(
    "--tiles",
    type=click.IntRange(min=0),
    default=0,
    help="Show this many of the most confident mistakes as images. The page then holds images under their own licence.",
)
@click.option(
    "--data",
    type=Place(),
    show_default="that of the runs",
    help="Shard set for --tiles, where the runs' own has moved.",
)
@click.option(
    "--resamples",
    type=click.IntRange(min=200),
    default=1000,
    help="Resamples for the intervals. More make their ends steadier and the report slower.",
)
def main(
    studies: tuple[Path, ...],
    out: Path | None,
    pictures: Path | None,
    tiles: int,
    data: str | Path | None,
    resamples: int,
) -> None:
    """Write the report of STUDY: a folder that a grid wrote, a folder of run folders, or one run folder.

    Several are reported as one study. Their runs must have the same test images.
    """
    from shards.common.files import encoded, write_durably
    from shards.common.progress import Progress
    from train.study.analysis import analyse
    from train.study.report.charts import charts
    from train.study.report.elsewhere import carried
    from train.study.report.page import compose
    from train.study.runs import read

    runs = read(*studies)
    target = out or studies[0] / "report.html"
    if target.is_dir():
        raise UsageError(f"--out {target}: is a folder; name the file to write, such as {target / 'report.html'}")
    with Progress("report", lines=False, transient=True) as progress:
        found = analyse(runs, resamples=resamples, at=progress.at)
    drawn = charts(found) + carried(found)
    page = compose(found, drawn, tiles=tiles, data=data)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_durably(target, encoded(page))
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for chart in drawn:
            for picture in chart.pictures:
                name = picture.name if len(chart.pictures) > 1 else chart.name
                for kind, content in picture.files().items():
                    write_durably(pictures / f"{name}.{kind}", content)
    click.echo(f"{target}: {len(runs.runs)} runs, {len(drawn)} charts, {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
