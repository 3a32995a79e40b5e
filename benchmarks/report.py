"""`report`: one page and one Markdown file from the CSVs of all benchmarks, and what they say in words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from benchmarks.grid import grid_text
from benchmarks.loader import loader_text, packed_sizes
from benchmarks.measure import Row
from benchmarks.pack import packing_text
from benchmarks.predict import predicting_in_words, predicting_text
from benchmarks.speed import training_text
from benchmarks.stalls import stalls_text
from benchmarks.tables import cell, figure, read_csv
from benchmarks.targets import verdict
from benchmarks.timeline import Moment, read_timeline, timelines_html
from benchmarks.utilization import utilization_in_words
from benchmarks.utilization_page import utilization_text
from shards.common.errors import DataError

TEXTS: dict[str, Callable[[Sequence[Row]], str]] = {
    "loader": loader_text,
    "pack": packing_text,
    "training": training_text,
    "stalls": stalls_text,
    "utilization": utilization_text,
    "grid": grid_text,
    "predict": predicting_text,
}
"""Name of a benchmark and of its CSV → its Markdown."""

TITLES = {
    "loader": "Loading",
    "pack": "Packing",
    "training": "Training",
    "stalls": "Stalls",
    "utilization": "Utilization",
    "grid": "Grid",
    "predict": "Predicting",
}

PICTURES = {
    "pack": {"img_per_s": "", "bytes_per_image": "payload of an image", "psnr_source_db": "PSNR to the source"},
    "training": {"img_per_s": "", "share_of_peak": "share of its matrix peak"},
    "stalls": {
        "img_per_s": "",
        "prep_stall": "prep stall",
        "whole_stall": "whole stall, cold files",
        "data_wait": "data wait",
        "accelerator_utilization": "accelerator utilization",
    },
    "grid": {"cells_per_s": "", "overhead_share": "overhead, share of the wall time"},
}
"""What bars show of a benchmark: metric → its name in the title. Of the others, images per second."""

_BOUND = 0.95
"""A system within this share of its ceiling is bound by the ceiling."""


def read_results(folder: Path) -> dict[str, list[Row]]:
    """The rows of every benchmark that has a CSV in the folder, a quick one where it has no other.

    Raises DataError where there is none.
    """
    found = {}
    for name in TEXTS:
        path = _table(folder, name)
        if path is not None:
            found[name] = read_csv(path)
    if not found:
        raise DataError(f"{folder}: holds no results; run `python -m benchmarks.run loader` first")
    return found


def _table(folder: Path, name: str) -> Path | None:
    return next(filter(Path.is_file, (folder / f"{name}.csv", folder / f"{name}-quick.csv")), None)


def read_timelines(folder: Path) -> list[Moment]:
    """The raw readings beside the utilization table that `read_results` takes; none without such a table.

    Raises DataError where they are damaged or missing.
    """
    table = _table(folder, "utilization")
    return [] if table is None else read_timeline(table.with_name(f"{table.stem}-timeline.csv"))


def markdown(results: dict[str, list[Row]]) -> str:
    """RESULTS.md: what was found in words, then every table."""
    parts = [
        "# Results\n",
        "Made by `python -m benchmarks.run report` from the CSV files beside this one; every row there names the "
        "machine, the versions and the command. Systems took turns in every round; figures are medians with an "
        "interval of at least 95 % from six rounds on (93.75 % with five), and ratios are taken within each round.\n",
    ]
    said = [line for name, rows in results.items() for line in in_words(name, rows, results.get("stalls", ()))]
    if machines := machines_text(results):
        parts.append(f"{machines}\n")
    if said:
        parts.append("\n".join(f"- {line}" for line in said) + "\n")
    parts += [TEXTS[name](rows) for name, rows in results.items()]
    return "\n".join(parts)


def in_words(name: str, rows: Sequence[Row], stalls: Sequence[Row] = ()) -> list[str]:
    """The main findings of a benchmark as sentences; only what the rows say. Ratios of its first sizes, and those that
    have a target: the others are in the tables.

    stalls: rows of that benchmark, whose many short turns may tell what limits a model where training's cannot.
    """
    if name == "training":
        return [line for model in dict.fromkeys(row.model for row in rows) for line in _limit_of(model, rows, stalls)]
    if name == "stalls":
        return _stalls_in_words(rows)
    if name == "utilization":
        return utilization_in_words(rows)
    if name == "predict":
        return predicting_in_words(rows)
    said = []
    places = {}
    for row, size in zip(rows, packed_sizes(rows), strict=True):
        if row.beside and row.value is not None:
            place = (size, row.resolution_px)
            places[place] = None
            if place != next(iter(places)) and not verdict(row):
                continue
            where = ", ".join(filter(None, (row.packed, f"{row.resolution_px} px" if row.resolution_px else "")))
            meant = f"; {verdict(row)}" if verdict(row) else ""
            said.append(
                f"{TITLES[name]}: {row.system} is {cell(row)} times {row.beside} ({where or 'all cells'}){meant}."
            )
    if len(places) > 1:
        others = ", ".join(f"{size} → {px} px" if px else size for size, px in list(places)[1:])
        said.append(f"{TITLES[name]}: the same for {others} is in the tables.")
    failed = dict.fromkeys((row.system, row.failed) for row in rows if row.failed and not row.beside)
    said += [f"{TITLES[name]}: {system} failed: {reason}." for system, reason in failed]
    return said


def _limit_of(model: str, rows: Sequence[Row], stalls: Sequence[Row]) -> list[str]:
    """What limits a model on this machine: its own arithmetic, or the loader."""
    own = [row for row in rows if row.model == model]
    best = max(
        (r for r in own if r.metric == "img_per_s" and r.value and "native" in r.system), default=None, key=_value
    )
    if best is None or best.value is None:
        return []
    style = best.system.partition(", ")[0]
    headspace = next((r for r in own if r.beside.startswith(style) and r.system == best.system and r.value), None)
    share = next((r for r in own if r.metric == "share_of_peak" and r.system == best.system and r.value), None)
    text = f"Training: {model} runs fastest {style}, at {figure(best.value)} img/s"
    if headspace is not None and headspace.value is not None:
        text += f", {100 * headspace.value:.0f} % of what it does without a loader"
        limit = _limit(headspace)
        if not limit:
            low, high = headspace.ends
            text += f" [{100 * low:.0f}, {100 * high:.0f}]"
            fits = (model, best.system, "accelerator_utilization", "warm", _machine(best))
            told = ((r, (r.model, r.system, r.metric, r.page_cache, _machine(r))) for r in stalls if r.value)
            finer = next((row for row, of in told if of == fits), None)
            limit = _limit(finer) if finer else ""
            if finer and limit:
                low, high = finer.ends
                text += f", [{100 * low:.0f}, {100 * high:.0f}] in the stalls benchmark"
        text += f": {limit} limits it" if limit else ": whether loading limits it is not decided"
    if share is not None and share.value is not None:
        text += f"; its operations are {100 * share.value:.0f} % of the measured matrix peak"
    return [text + "."]


def _limit(share: Row) -> str:
    """What limits a system that reaches this share of its ceiling; empty where the interval lies across the bound."""
    low, high = share.ends
    return "its own arithmetic" if low >= _BOUND else "loading" if high < _BOUND else ""


def _value(row: Row) -> float:
    return row.value or 0.0


def _stalls_in_words(rows: Sequence[Row]) -> list[str]:
    from benchmarks.stalls import agreement, by_engine

    said = []
    for model, engine, found in by_engine(rows):
        for cache, metric in (("warm", "prep_stall"), ("cold", "whole_stall")):
            stall, wait = found.get((cache, metric)), found.get((cache, "data_wait"))
            if stall is not None and stall.value is not None:
                apart = agreement(stall, wait)
                said.append(
                    f"Stalls: {model}, {engine}, {cache} files: {100 * stall.value:.1f} % of the time lost"
                    + (
                        f" (counted as waiting in the loop: {100 * wait.value:.1f} %; {apart})"
                        if wait and wait.value is not None
                        else ""
                    )
                    + "."
                )
    return said


# ------------------------------------------------------------------ the page


def bars(name: str, title: str, rows: Sequence[Row], unit: str) -> str:
    """Horizontal bars with intervals, one a row, the longest first; failed rows say so. An `<svg>` element.

    Bars begin at 0: of a value below it, only the number is shown.
    """
    from train.study.report.svg import wrap

    shown = sorted(rows, key=lambda row: -(row.value or 0.0))
    longest = max((0.0, *(row.high or row.value or 0.0 for row in shown))) or 1.0
    left = 16 + 6.8 * max((len(row.system) for row in shown), default=0)  # letters are about so wide on average
    width, step = left + 470, 24
    room = 280
    parts = []
    for i, row in enumerate(shown):
        y = 12 + i * step
        parts.append(f'<text class="ink" x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(row.system)}</text>')
        if row.value is None:
            parts.append(f'<text class="ink" x="{left}" y="{y + 12}">failed: {escape(row.failed[:60])}</text>')
            continue
        kind = (
            "c0" if "dermscale" in row.system else "c7" if "ceiling" in row.system or "cached" in row.system else "c1"
        )
        length = room * max(row.value, 0.0) / longest
        parts.append(f'<rect class="box {kind}" x="{left}" y="{y}" width="{length:.1f}" height="16"/>')
        end = left + length
        if row.low is not None and row.high is not None:
            low, high = (left + room * max(bound, 0.0) / longest for bound in (row.low, row.high))
            parts.append(
                f'<path class="bar {kind}" d="M{low:.1f} {y + 8}H{high:.1f}M{low:.1f} {y + 4}v8M{high:.1f} {y + 4}v8"/>'
            )
            end = max(end, high)
        parts.append(
            f'<text class="ink" x="{end + 6:.1f}" y="{y + 12}">{escape(figure(row.value))} {escape(unit)}</text>'
        )
    told = "; ".join(f"{row.system} {cell(row)} {unit}" for row in shown)
    return wrap(name, title, told, width, 24 + step * len(shown), parts)


def _in_percent(row: Row) -> Row:
    """A share as a percentage; other rows as they are."""
    if row.unit != "1":
        return row
    value, low, high = (None if x is None else 100 * x for x in (row.value, row.low, row.high))
    return replace(row, unit="%", value=value, low=low, high=high)


def page(results: dict[str, list[Row]], timelines: Sequence[Moment] = ()) -> str:
    """report.html: the bars first, then the timelines, then the tables; no script, no network."""
    from train.study.report.page import page as whole
    from train.study.report.page import section

    sections = []
    for name, rows in results.items():
        pictures = PICTURES.get(name, {"img_per_s": ""})
        body = []
        groups: dict[tuple, list[Row]] = {}
        for row, size in zip(rows, packed_sizes(rows), strict=True):
            if row.metric in pictures:
                place = (row.resolution_px, size, row.model, pictures[row.metric])
                groups.setdefault(place, []).append(_in_percent(row))
        for i, ((px, size, model, what), part) in enumerate(groups.items()):
            sizes = (f"packed at {size}" if size else "", f"{px} px" if px else "")
            title = ", ".join(filter(None, (model, *sizes, what)))
            body.append(f"<h3>{escape(title)}</h3><div class='charts one'>")
            body.append(bars(f"{name}-{i}", f"{TITLES[name]}: {title}", part, part[0].unit) + "</div>")
        if name == "utilization":
            body.append(timelines_html(timelines))
        body.append(f"<details><summary>Tables</summary>{_html(TEXTS[name](rows))}</details>")
        sections.append(section(name, TITLES[name], "".join(body)))
    stalls = results.get("stalls", ())
    said = {name: in_words(name, rows, stalls) for name, rows in results.items()}
    findings = [(TITLES[name], lines) for name, lines in said.items() if lines]
    gpus = {row.environment.gpu for rows in results.values() for row in rows if row.environment}
    warnings = ["No GPU was there: nothing here was measured on one."] if gpus == {"none"} else []
    return whole("What was measured", machines_text(results), warnings, findings, sections)


def _machine(row: Row) -> str:
    """The machine that a row was measured on; empty where it does not say."""
    of = row.environment
    return "" if of is None else f"{of.cpu}, {of.cores} cores, {of.ram_gib} GiB; GPU: {of.gpu}"


def machines_text(results: Mapping[str, Sequence[Row]]) -> str:
    """Which machine the benchmarks ran on, in a sentence; which ones ran where, if there were several."""
    on: dict[str, dict[str, None]] = {}  # machine → benchmarks, in order
    for name, rows in results.items():
        for text in filter(None, map(_machine, rows)):
            on.setdefault(text, {})[TITLES[name]] = None
    if len(on) < 2:
        return "".join(f"{text}." for text in on)
    of_each = " ".join(f"{', '.join(names)}: {text}." for text, names in on.items())
    return f"{of_each} Figures of different machines are not to be compared."


def _html(text: str) -> str:
    """Our own Markdown (headings, tables, lists, paragraphs) as HTML."""
    out, table = [], False
    for line in [*text.splitlines(), ""]:
        if line.startswith("| "):
            cells = [part.strip() for part in line.replace("\\|", "¦").strip("|").split("|")]
            if set("".join(cells)) == {"-"}:
                continue
            tag = "td" if table else "th"
            out.append("" if table else '<div class="scroll"><table>')
            out.append("<tr>" + "".join(f"<{tag}>{escape(c.replace('¦', '|'))}</{tag}>" for c in cells) + "</tr>")
            table = True
            continue
        if table:
            out.append("</table></div>")
            table = False
        if line.startswith("#"):
            out.append(f"<h4>{escape(line.lstrip('# '))}</h4>")
        elif line:
            out.append(f"<p>{escape(line.removeprefix('- '))}</p>")
    return "".join(out)
