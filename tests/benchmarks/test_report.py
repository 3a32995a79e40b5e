"""The report: every table, and charts that are the same every time."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.measure import Row, median_interval
from benchmarks.report import bars, draw, markdown, read_results, tables_in
from benchmarks.tables import read_csv
from shards.common.errors import DataError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture
def results(tmp_path) -> Path:
    """Some of the committed tables, one of them as --quick names it."""
    for name, copy in (("loader", "loader"), ("grid", "grid"), ("predict", "predict-quick")):
        shutil.copy(RESULTS / f"{name}.csv", tmp_path / f"{copy}.csv")
    return tmp_path


def test_bars_are_as_long_as_their_values():
    rows = [Row("loader", name, "img_per_s", "img/s", value) for name, value in (("a", 50.0), ("b", 100.0))]
    (axes,) = bars("loader", [*rows, Row("loader", "c", "img_per_s", "img/s", None, failed="why")]).axes
    assert [bar.get_width() for bar in axes.patches] == [100.0, 50.0]  # from the bottom
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "b", "a"]
    assert [text.get_text() for text in axes.texts] == [" failed", " 100 img/s", " 50.0 img/s"]


def test_charts_show_a_panel_per_model_and_name_the_sizes():
    def row(model: str, value: float, **more) -> Row:
        return Row("stalls", "x", "accelerator_utilization", "1", value, value - 0.1, value + 0.1, model=model, **more)

    figure = bars("stalls", [row("resnet18", 0.5, page_cache="warm"), row("vit_b16", -0.25)])
    assert [axes.texts[0].get_text() for axes in figure.axes] == [" 50.0 %", " -25.0 %"]
    row = Row("loader", "a", "img_per_s", "img/s", 1.0, packed="341x256 jpg", resolution_px=224)
    (axes,) = bars("loader", [row, replace(row, system="b", packed="originals")]).axes
    assert axes.get_title(loc="left") == "packed at 341x256, 224 px: images per second"


def test_charts_are_the_same_bytes_every_time_and_name_no_date(results):
    once, again = (draw(read_results(results)) for _ in range(2))
    assert once == again and set(once) == {"loader.svg", "grid.svg", "predict.svg"}
    assert all(svg.startswith(b"<?xml") and b"<dc:date>" not in svg for svg in once.values())
    assert b"dermscale native jpg</text>" in once["loader.svg"]


def test_a_folder_without_results_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"benchmarks\.run loader"):
        read_results(tmp_path)


def test_the_report_command_writes_markdown_that_shows_the_charts(results):
    from click.testing import CliRunner

    from benchmarks.run import main

    found = CliRunner().invoke(main, ["report", "--out", str(results)])
    assert found.exit_code == 0, found.output
    text = (results / "RESULTS.md").read_text()
    assert text.startswith("# Results")
    charts = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert charts == ["loader.svg", "grid.svg", "predict.svg"] and all((results / name).exists() for name in charts)


# ------------------------------------------------------------------ what is committed


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.csv")), ids=lambda path: path.name)
def test_every_committed_table_is_still_read_and_its_intervals_are_reproduced(path):
    rows = read_csv(path)
    assert rows and all(row.environment for row in rows)
    for row in rows:
        if row.low is not None:
            found = median_interval(row.values)
            assert (found.median, found.low, found.high) == pytest.approx((row.value, row.low, row.high), rel=1e-5)
            assert round(found.coverage, 4) == row.coverage


def test_the_committed_pages_are_those_of_the_committed_tables():
    results = read_results(RESULTS)
    text = (RESULTS / "RESULTS.md").read_text()
    assert text == markdown(results)
    tables = tables_in(RESULTS)
    assert len(tables) > len(results)
    for path, page in tables:
        assert page.text(read_csv(path)) == path.with_suffix(".md").read_text(), path
