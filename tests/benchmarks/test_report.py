"""The report: every table, and charts that are the same every time."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.machine import environment
from benchmarks.measure import Row, Series, median_interval, ratio_row, series_rows, summary_row
from benchmarks.predict import EVALUATION, PREDICT, START_PREDICT
from benchmarks.report import bars, draw, markdown, read_results, tables_in
from benchmarks.tables import read_csv, write_csv
from shards.common.errors import DataError
from tests.support.benchdata import series

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def figures(benchmark: str, rates: dict[str, Series], pair: tuple[str, str], **more) -> list[Row]:
    """Made-up rows of each system, and the ratio of two."""
    machine = replace(environment("test"), gpu="none")  # also where the tests run beside one
    columns = {"benchmark": benchmark, "resolution_px": 224, "environment": machine, **more}
    rows = [row for name, found in rates.items() for row in series_rows(found, system=name, **columns)]
    return [*rows, ratio_row(rates[pair[0]], rates[pair[1]], system=pair[0], beside=pair[1], **columns)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Tables of made-up rows, as the other subcommands write them."""
    out = tmp_path_factory.mktemp("results")
    ours, peer = series(300, 310, 290, 305, 300, 295), series(100, 105, 95, 100, 102, 98)
    rates = {"dermscale native jpg": ours, "FFCV jpg": peer, "SPDL": Series(failed="no | luck <here>")}
    rows = figures("loader", rates, ("dermscale native jpg", "FFCV jpg"), packed="341x256 jpg", note="other DCT <i>")
    write_csv(out / "loader.csv", rows)
    loaded, cached = "compiled, native loader", "compiled, cached batch"
    rates = {loaded: series(*[18.0] * 6), cached: series(*[20.0] * 6)}
    write_csv(out / "training.csv", figures("training", rates, (loaded, cached), model="resnet18"))
    rates = {EVALUATION: series(*[50.0] * 6), PREDICT: series(*[40.0] * 6)}
    rows = figures("predict", rates, (PREDICT, EVALUATION), packed="400x300 jpg")
    start = {"benchmark": "predict", "system": START_PREDICT, "metric": "start_s", "unit": "s"}
    write_csv(out / "predict-quick.csv", [*rows, summary_row([3.0] * 6, **start)])
    return out


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
    assert once == again and set(once) == {"loader.svg", "training.svg", "predict.svg"}
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
    assert charts == ["loader.svg", "training.svg", "predict.svg"] and all((results / name).exists() for name in charts)


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
