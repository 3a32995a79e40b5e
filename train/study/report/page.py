"""The report as one HTML page: no script, no network, light and dark, wide and narrow."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from shards.common.errors import UsageError
from train.study.analysis import Analysis, mistakes
from train.study.report.charts import Chart, Table, results_table
from train.study.report.findings import count, findings, missing, warnings
from train.study.report.picture import DARK, FONTS, LIGHT
from train.study.runs import Study

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What the page may load: nothing but what is in it."""

TILE_NOTE = (
    "Images of the data set, under its own licence. HAM10000 is CC BY-NC 4.0: for non-commercial use, with "
    "attribution. Check the licence before you publish this page."
)


class Section(NamedTuple):
    """A part of the page. name: unique, letters, digits and dashes. body: HTML."""

    name: str
    heading: str
    body: str


def compose(found: Analysis, charts: Sequence[Chart], *, tiles: int = 0, data: str | Path | None = None) -> str:
    """The page as text. tiles: how many of the most confident mistakes are shown, from the shard set in `data`.

    Raises UsageError or DataError where that shard set is not there, or is not the one that the runs were tested on.
    """
    study = found.study
    sections = [Section("results", "Results at the largest fraction", _table(results_table(found)))]
    sections += [Section(chart.name, chart.title, _chart(chart)) for chart in charts]
    if tiles:
        sections.append(Section("mistakes", "The most confident mistakes", _tiles(found, tiles, data)))
    reasons = missing(found)
    if reasons:
        sections.append(Section("missing", "What is not shown, and why", _paragraphs(reasons)))
    rows = [[name, ", ".join(map(str, values))] for name, values in settings(study).items()]
    sections.append(Section("settings", "Settings and versions", _table(Table(("what", "value"), rows), text=(0, 1))))
    source = study.runs[0].environment["shard_set"]["source"]
    data_set = source.get("dataset", "skin lesions") if isinstance(source, dict) else "skin lesions"
    lead = f"{count(len(study.runs), 'run')} of {count(len(study.models), 'model')}, data set: {data_set}"
    return _page(f"Study {study.folder.resolve().name}", lead, warnings(study), findings(found), sections)


def _page(
    title: str,
    lead: str,
    alarms: Sequence[str],
    answers: Sequence[tuple[str, Sequence[str]]],
    sections: Sequence[Section],
) -> str:
    said = "".join(f"<dt>{escape(question)}</dt><dd>{_paragraphs(lines)}</dd>" for question, lines in answers)
    links = "".join(f'<a href="#section-{one.name}">{escape(one.heading)}</a>' for one in sections)
    parts = "".join(
        f'<section id="section-{one.name}"><h2>{escape(one.heading)}</h2>{one.body}</section>\n' for one in sections
    )
    warned = "".join(f'<p class="warn">{escape(text)}</p>' for text in alarms)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{style()}</style></head><body>\n'
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
        f"{warned}</header>\n"
        f'<main>\n<nav aria-label="Sections">{links}</nav>\n'
        f'<dl class="findings">{said}</dl>\n{parts}</main></body></html>\n'
    )


def style() -> str:
    """The style sheet of the page and of its charts, without line breaks."""
    rules = files("train.study.report").joinpath("report.css").read_text(encoding="utf-8").splitlines()
    light, dark = ("".join(f"--{name}:{value};" for name, value in colours.items()) for colours in (LIGHT, DARK))
    return (
        f":root{{color-scheme:light dark;--fonts:{FONTS};{light}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}" + "".join(line.strip() for line in rules)
    )


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _chart(one: Chart) -> str:
    """The pictures of a chart, what they show, and the numbers behind them."""
    kind = "one" if len(one.pictures) == 1 else "small" if len(one.pictures) > 2 else ""
    shown = "" if one.pictures else " open"
    body = f'<div class="charts {kind}">{"".join(picture.svg() for picture in one.pictures)}</div>'
    body += f'<p class="caption">{escape(one.caption)}</p>'
    body += f"<details{shown}><summary>The numbers</summary>{_table(one.table)}</details>"
    if one.more is not None:
        words = [i for i, head in enumerate(one.more.head) if head == "notes"]
        body += f"<details{shown}><summary>{escape(one.more_title)}</summary>{_table(one.more, text=words)}</details>"
    return body


def _table(one: Table, *, text: Sequence[int] = ()) -> str:
    """A table that scrolls sideways where it is too wide. text: columns of words, which may wrap."""

    def row(cells: Sequence[str], tag: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        kinds = (' class="text"' if i in text else "" for i in range(len(cells)))
        return "".join(f"<{tag}{kind}{scope}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in one.rows)
    return (
        f'<div class="scroll"><table><thead><tr>{row(one.head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def settings(study: Study) -> dict[str, list[Any]]:
    """Settings, machine, versions and data by name, each with its values in the runs; first what all runs share."""
    values: dict[str, list[Any]] = {"budget": [study.settings["budget"]]} if study.settings else {}
    for run in study.runs:
        for key, value in _settings(run.config, run.environment):
            known = values.setdefault(key, [])
            if value not in known:
                known.append(value)
    return dict(sorted(((k, known) for k, known in values.items() if known != [None]), key=lambda one: len(one[1]) > 1))


def _settings(config: Mapping[str, Any], environment: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((key, value) for key, value in config.items() if key not in ("data", "checkpoint_s"))
    yield from ((f"{key} used", taken["value"]) for key, taken in environment["decisions"].items())
    for key in ("device_name", "cuda", "cores", "platform", "python", "world_size"):
        yield key, environment.get(key)
    yield from ((f"version of {name}", version) for name, version in environment["versions"].items())
    yield "shard set SHA-256", environment["shard_set"]["index_sha256"]
    yield from ((f"split {key}", value) for key, value in environment["shard_set"]["split"].items())


# ------------------------------------------------------------------ images


def _tiles(found: Analysis, number: int, data: str | Path | None) -> str:
    """The images that the best model's first run was most confident about and wrong, as HTML."""
    from shards.shardset import ShardSet

    model, run = found.best.model, found.best.runs[0]
    folder = data or run.config["data"]
    items = []
    with ShardSet(folder) as shards:
        if shards.manifest.index_sha256 != run.result["shard_set_sha256"]:
            raise UsageError(f"--data {folder}: is not the shard set that the runs were tested on; name that one")
        rows = {name: i for i, name in enumerate(shards.column("image_id").tolist())}
        for one in mistakes(run, number):
            name = one["image_id"]
            words = escape(f"{one['true']} classified as {one['called']}, {100 * one['probability']:.0f} % confident")
            url = "data:image/jpeg;base64," + base64.b64encode(_jpeg(shards, rows[name])).decode()
            items.append(
                f'<figure><img src="{url}" alt="{escape(name)}: {words}"><figcaption>{words} · {escape(name)}'
                "</figcaption></figure>"
            )
        note = f"{TILE_NOTE} Source: {shards.manifest.citation} Licence: {shards.manifest.licence}"
    if not items:
        return f"<p>{model} made no mistake on the test split.</p>"
    return (
        f"<p>{model}, seed {run.row['seed']}.</p>"
        f'<p class="warn">{escape(note)}</p><div class="tiles">{"".join(items)}</div>'
    )


def _jpeg(shards: Any, sample: int) -> bytes:
    """A sample as a JPEG of at most 256 px."""
    from shards.encode import shrink
    from shards.jpeg import encode_jpeg

    return encode_jpeg(shrink(shards.pixels(sample), 256))
