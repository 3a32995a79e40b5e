"""`report`: RESULTS.md and charts (SVG) from the CSV files of all benchmarks."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks import beside, grid, latency, loader, pack, predict, stalls, store, together, training, utilization
from benchmarks.measure import Row
from benchmarks.options import OUT
from benchmarks.pages import Page, place
from benchmarks.tables import number, read_csv
from shards.common.cli import Command, typed
from shards.common.errors import DataError
from shards.common.files import write_durably

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGES: dict[str, Page] = {
    benchmark.PAGE.name: benchmark.PAGE
    for benchmark in (loader, beside, latency, pack, training, together, stalls, utilization, grid, predict, store)
}
"""Every benchmark by its name, in the order of the report."""


@click.command("report", cls=Command)
@OUT
def command(out: Path) -> None:
    """RESULTS.md and charts (SVG) from the CSV files of the other subcommands, and the Markdown beside each of them."""
    results = read_results(out)
    charts = draw(results)
    for name, svg in charts.items():
        write_durably(out / name, svg)
    write_durably(out / "RESULTS.md", markdown(results).encode())
    for path, page in tables_in(out):
        page.write(path)
    click.echo(f"wrote {out / 'RESULTS.md'} and {len(charts)} charts from {', '.join(results)}")


def tables_in(folder: Path) -> list[tuple[Path, Page]]:
    """Every CSV of a benchmark in the folder and the folders in it, with its page."""
    named = ((path, path.stem.removesuffix("-quick")) for path in sorted(folder.rglob("*.csv")))
    return [(path, PAGES[name]) for path, name in named if name in PAGES]


def read_results(folder: Path) -> dict[str, list[Row]]:
    """The rows of every benchmark that has a CSV in the folder, a quick one where it has no other.

    Raises DataError where there is none.
    """
    found = {}
    for name in PAGES:
        path = _table(folder, name)
        if path is not None:
            found[name] = read_csv(path)
    if not found:
        raise DataError(f"{folder}: holds no results; run `{typed('benchmarks.run')} loader` first")
    return found


def _table(folder: Path, name: str) -> Path | None:
    return next(filter(Path.is_file, (folder / f"{name}.csv", folder / f"{name}-quick.csv")), None)


def markdown(results: dict[str, list[Row]]) -> str:
    """RESULTS.md: every table, each benchmark's after its chart."""
    parts = [
        "# Results\n",
        "Made by `python -m benchmarks.run report` from the CSV files beside this one; every row there names the "
        "machine, the versions and the command. Systems took turns in every round; figures are medians with an "
        "interval of at least 95 % from six rounds on (93.75 % with five), and ratios are taken within each round. "
        "Each part ends with the machine that it was measured on; do not compare figures of different machines.\n",
    ]
    for name, rows in results.items():
        heading, _, tables = PAGES[name].text(rows).partition("\n")
        parts.append(f"{heading}\n\n![Chart of the values in the tables below]({name}.svg)\n{tables}")
    return "\n".join(parts)


# ------------------------------------------------------------------ charts


_TOO_FAST = "ceiling: memory copy only"
"""Not in the charts: beside it the other bars would be too short to read."""

_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "dermscale",  # ids are not random
}


def draw(results: Mapping[str, Sequence[Row]]) -> dict[str, bytes]:
    """File name → SVG: bars for each benchmark. The same rows give the same bytes."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        return {f"{name}.svg": _svg(bars(name, rows)) for name, rows in results.items()}


def _svg(figure: "Figure") -> bytes:
    """A figure as SVG, without the date and the version of the library."""
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def bars(name: str, rows: Sequence[Row]) -> "Figure":
    """Horizontal bars with their intervals, and a panel for each model."""
    from matplotlib.figure import Figure

    measured, title = PAGES[name].chart
    models: dict[str, list[Row]] = {}
    for row in rows:
        if row.metric == measured and row.system != _TOO_FAST:
            models.setdefault(row.model, []).append(row)
    heights = [0.6 + 0.17 * len(own) for own in models.values()]
    figure = Figure(figsize=(7.5, sum(heights)), layout="constrained")
    grid = figure.subplots(len(models), squeeze=False, height_ratios=heights)
    for (axes,), (model, own) in zip(grid, models.items(), strict=True):
        for at, row in enumerate(reversed(own)):
            _bar(axes, at, row)
        axes.set_yticks(range(len(own)), [row.system for row in reversed(own)])
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.margins(x=0.15, y=0.01)
        axes.set_title(f"{', '.join(filter(None, (model, place(own))))}: {title}", fontsize=8, loc="left")
    return figure


def _bar(axes: "Axes", at: int, row: Row) -> None:
    """A bar with its interval and its number; `failed` if the row has no value."""
    if row.value is None:
        axes.text(0, at, " failed", va="center")
        return
    scale, unit = (100, "%") if row.unit == "1" else (1, row.unit)
    colour = "C0" if "dermscale" in row.system else "0.6" if "ceiling" in row.system or "cached" in row.system else "C1"
    low, high = (scale * end for end in row.ends)
    axes.barh(at, scale * row.value, color=colour, height=0.7)
    axes.hlines(at, low, high, color="black", linewidth=1)
    axes.text(max(high, 0), at, f" {number(scale * row.value)} {unit}", va="center", fontsize=7)
