"""A study as one HTML page that needs nothing else.

    python -m train.report runs/study

Writes runs/study/report.html: what was found in plain words, learning curves with bands, costs, classes confused,
calibration, differences between models, variance shares, speed, settings. A single run folder does as well.
"""

import base64
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.common import cli
from shards.common.errors import UsageError

if TYPE_CHECKING:
    from train.study.analysis import Analysis
    from train.study.report.charts import Figure
    from train.study.runs import Study

TILE_NOTE = (
    "Images of the data set, under its own licence. HAM10000 is CC BY-NC 4.0: for non-commercial use, with its source "
    "named; do not publish this page without looking that up."
)


@click.command(context_settings={"show_default": True})
@click.argument("study", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), show_default="STUDY/report.html", help="Page to write.")
@click.option(
    "--pictures", type=click.Path(path_type=Path), help="Also write every chart as an SVG file into this folder."
)
@click.option(
    "--tiles", type=click.IntRange(min=0), default=0, help="Show so many of the most confident mistakes as images."
)
@click.option(
    "--data", type=click.Path(path_type=Path), show_default="that of the runs", help="Shard set, for --tiles."
)
@click.option("--resamples", type=click.IntRange(min=200), default=1000, help="Draws behind the intervals.")
def main(study: Path, out: Path | None, pictures: Path | None, tiles: int, data: Path | None, resamples: int) -> None:
    """Write the report of STUDY: a folder of train.grid, a folder of run folders, or one run folder."""
    from shards.common.files import write_durably
    from train.study.analysis import analyse
    from train.study.report.page import standalone
    from train.study.runs import read

    read_study = read(study)
    target = out or study / "report.html"
    if target.is_dir():
        raise UsageError(f"--out {target}: is a folder; name the file to write, such as {target / 'report.html'}")
    found = analyse(read_study, resamples=resamples, at=_at)
    figures = draw(found)
    page = compose(found, figures, tiles=tiles, data=data)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_durably(target, page.encode())
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for figure in figures:
            for number, chart in enumerate(figure.charts):
                name = chart.split('id="', 1)[1].split('"', 1)[0] if len(figure.charts) > 1 else figure.name
                write_durably(pictures / f"{name or number}.svg", standalone(chart, figure.legend).encode())
    click.echo(f"{target}: {len(read_study.runs)} runs, {len(figures)} pictures, {len(page) / 1e6:.1f} MB")


def _at(what: str, done: int, steps: int) -> None:
    """A line a part: the whole takes seconds to a minute."""
    if sys.stderr.isatty():
        click.echo(f"{done + 1}/{steps} {what}", err=True)


def draw(found: "Analysis") -> "list[Figure]":
    """The pictures of a report, in order; those that the study has no numbers for are left out."""
    from train.study.analysis import METRICS
    from train.study.report import charts as figures
    from train.study.report import charts_compare as figures_compare
    from train.study.report import charts_detail as figures_detail

    drawn = [figures.learning_curves(found, metric) for metric in METRICS if found.curves[metric]]
    drawn.append(figures.cost(found))
    drawn += [figures_compare.forest(found, metric) for metric in METRICS]
    drawn.append(figures_compare.variance(found))
    drawn += [figures_detail.confusions(found), figures_detail.class_recalls(found), figures_detail.calibration(found)]
    drawn.append(figures_compare.leakage(found))
    drawn.append(figures_detail.speed(found))
    return [figure for figure in drawn if figure is not None]


def compose(found: "Analysis", figures: "list[Figure]", *, tiles: int = 0, data: Path | None = None) -> str:
    """The page as text. tiles: how many of the most confident mistakes are shown, from the shard set in `data`."""
    from train.study.report import page as report_page
    from train.study.report.charts_detail import results_table
    from train.study.report.findings import count, findings

    study = found.study
    sections = [
        report_page.section(
            "section-results", "Results at the largest fraction", report_page.table(results_table(found))
        )
    ]
    sections += [report_page.figure(figure) for figure in figures]
    if tiles:
        sections.append(
            report_page.section("section-mistakes", "The most confident mistakes", mistakes(found, tiles, data))
        )
    missing = _missing(found)
    if missing:
        text = "".join(f"<p>{line}</p>" for line in missing)
        sections.append(report_page.section("section-missing", "What is not shown, and why", text))
    shared, differing = settings(study)
    sections.append(
        report_page.section("section-settings", "Settings and versions", report_page.settings(shared, differing))
    )
    first = study.runs[0].environment["shard_set"]["source"]
    name = first.get("dataset", "skin lesions") if isinstance(first, dict) else "skin lesions"
    lead = f"{count(len(study.runs), 'run')} of {count(len(study.models), 'model')}, data set: {name}"
    return report_page.page(f"Study {study.folder.resolve().name}", lead, warnings(study), findings(found), sections)


def warnings(study: "Study") -> list[str]:
    """What a reader must know before anything else."""
    from train.study.report.findings import count

    told = []
    if study.runs[0].environment["shard_set"]["split"].get("unit") == "image":
        told.append("Split by image: training holds views of the test lesions, so every score here is too good.")
    if study.runs[0].environment["shard_set"]["source"].get("dataset") == "synthetic":
        told.append("Synthetic pictures: these numbers test the software and say nothing about skin.")
    if study.failed:
        told.append(f"{count(len(study.failed), 'cell')} failed: {', '.join(row['cell'] for row in study.failed[:5])}.")
    return told


def _missing(found: "Analysis") -> list[str]:
    from html import escape

    lines = [escape(f"{row['cell']} failed: {row['error']}.") for row in found.study.failed]
    if found.no_differences:
        lines.append(escape(f"Differences between models: {found.no_differences}."))
    reasons = {reason for reason in found.variance.values() if isinstance(reason, str)}
    lines += [escape(f"Variance shares: {reason}.") for reason in sorted(reasons)]
    if found.leakage is None:
        lines.append("What a split by image gains falsely: not measured here; see python -m train.leakage --help.")
    return lines


def settings(study: "Study") -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What all runs share and what differs between them, by name: settings, machine, versions, data."""
    values: dict[str, list[Any]] = {}
    for run in study.runs:
        environment = run.environment
        flat = {key: value for key, value in run.config.items() if key not in ("data", "checkpoint_s")}
        flat |= {f"{key} used": taken["value"] for key, taken in environment["decisions"].items()}
        keys = ("device_name", "cuda", "cores", "platform", "python", "world_size")
        flat |= {key: environment.get(key) for key in keys}
        flat |= {f"version of {name}": version for name, version in environment["versions"].items()}
        data = environment["shard_set"]
        flat |= {"shard set SHA-256": data["index_sha256"], **{f"split {k}": v for k, v in data["split"].items()}}
        for key, value in flat.items():
            known = values.setdefault(key, [])
            if value not in known:
                known.append(value)
    budget = {"budget": study.settings["budget"]} if study.settings else {}
    shared = budget | {key: known[0] for key, known in values.items() if len(known) == 1 and known[0] is not None}
    return shared, {key: known for key, known in values.items() if len(known) > 1}


def mistakes(found: "Analysis", count: int, data: Path | None) -> str:
    """The images that the best model's first run was most sure of and wrong about, as HTML.

    Raises UsageError or DataError where the shard set is not there, or is not the one that the run was tested on.
    """
    from shards.shardset import ShardSet
    from train.study import analysis
    from train.study.report import page as report_page

    model = analysis.best_model(found)
    run = found.study.of(model, found.study.largest(model))[0]
    folder = data or Path(run.config["data"])
    chosen = analysis.mistakes(run, count)
    with ShardSet(folder) as shards:
        if shards.manifest.index_sha256 != run.result["shard_set_sha256"]:
            raise UsageError(f"--data {folder}: is not the shard set that the runs were tested on; name that one")
        rows = {name: i for i, name in enumerate(shards.column("image_id").tolist())}
        items = []
        for one in chosen:
            words = f"{one['true']} called {one['called']}, {100 * one['probability']:.0f} % sure"
            url = "data:image/jpeg;base64," + base64.b64encode(_jpeg(shards, rows[one["image_id"]])).decode()
            items.append((url, f"{one['image_id']}: {words}", f"{words} · {one['image_id']}"))
        note = f"{TILE_NOTE} Source: {shards.manifest.citation} Licence: {shards.manifest.licence}"
    if not items:
        return f"<p>{model} made no mistake on the test split.</p>"
    return f"<p>{model}, seed {run.row['seed']}.</p>" + report_page.tiles(items, note)


def _jpeg(shards: Any, sample: int) -> bytes:
    """A sample as a JPEG of at most 256 px."""
    import cv2

    from shards.jpeg import encode_jpeg

    image = shards.pixels(sample)
    shrink = 256 / max(image.shape[:2])
    if shrink < 1:
        image = cv2.resize(image, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    return encode_jpeg(image)


if __name__ == "__main__":
    cli.run(main)
