import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.grid import ALONE, SHARED, GridJob, grid_text, measure_grid, set_up
from benchmarks.loader import jobs, loader_text, measure_loaders, packed_sizes
from benchmarks.machine import environment
from benchmarks.measure import Row, Sample, Series, ratio_row, series_rows, summary_row
from benchmarks.peers.pytorch import SYSTEMS
from benchmarks.peers.system import Work
from benchmarks.predict import EVALUATION, PREDICT, START_PREDICT
from benchmarks.report import bars, in_words, machines_text, markdown, page, read_results
from benchmarks.tables import write_csv
from shards.common.errors import DataError
from tests.support.benchdata import write_source


def series(*per_s: float) -> Series:
    return Series([Sample(100, 100 / rate, 1.0, 0.25) for rate in per_s])


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Tables of made-up rows, as the other subcommands write them."""
    out = tmp_path_factory.mktemp("results")
    machine = replace(environment("test"), gpu="none")  # also where the tests run beside one
    ours, peer = series(300, 310, 290, 305, 300, 295), series(100, 105, 95, 100, 102, 98)
    common = {"benchmark": "loader", "packed": "341x256 jpg", "resolution_px": 224, "environment": machine}
    rows = series_rows(ours, system="dermscale native jpg", **common)
    rows += series_rows(peer, system="FFCV jpg", note="other DCT <i>", **common)
    rows += series_rows(Series(failed="no | luck <here>"), system="SPDL", **common)
    rows.append(ratio_row(ours, peer, system="dermscale native jpg", beside="FFCV jpg", **common))
    write_csv(out / "loader.csv", rows)
    common = {"benchmark": "training", "model": "resnet18", "resolution_px": 224, "environment": machine}
    loaded, cached = series(18, 18, 18, 18, 18, 18), series(20, 20, 20, 20, 20, 20)
    rows = series_rows(loaded, system="compiled, native loader", **common)
    rows += series_rows(cached, system="compiled, cached batch", **common)
    rows.append(ratio_row(loaded, cached, system="compiled, native loader", beside="compiled, cached batch", **common))
    write_csv(out / "training.csv", rows)
    common = {"benchmark": "predict", "packed": "400x300 jpg", "resolution_px": 224, "environment": machine}
    evaluated, predicted = series(50, 50, 50, 50, 50, 50), series(40, 40, 40, 40, 40, 40)
    rows = series_rows(evaluated, system=EVALUATION, **common) + series_rows(predicted, system=PREDICT, **common)
    rows.append(ratio_row(predicted, evaluated, system=PREDICT, beside=EVALUATION, **common))
    rows.append(summary_row([3.0] * 6, system=START_PREDICT, metric="start_s", unit="s", **common))
    write_csv(out / "predict-quick.csv", rows)
    return out


def test_words_say_only_what_the_rows_say(results):
    found = read_results(results)
    loader = in_words("loader", found["loader"])
    assert any("dermscale native jpg is 3.01 [2.94, 3.05] times FFCV jpg" in line for line in loader)
    assert any(line == "Loading: SPDL failed: no | luck <here>." for line in loader)
    (training,) = in_words("training", found["training"])
    assert "resnet18 runs fastest compiled, at 18.0 img/s, 90 % of what it does without a loader" in training
    assert ": loading limits it" in training


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((0.96, 0.99), ", [96, 99] in the stalls benchmark: its own arithmetic limits it."),
        ((0.80, 0.94), ", [80, 94] in the stalls benchmark: loading limits it."),
        ((0.90, 0.99), "[80, 110]: whether loading limits it is not decided."),
    ],
)
def test_many_short_turns_tell_the_limit_where_training_cannot(ends, said):
    system, cached = "channels-last, native loader", "channels-last, cached batch"
    own = [
        Row("training", system, "img_per_s", "img/s", 20.0, model="resnet18"),
        Row("training", system, "img_per_s ratio", "×", 0.97, 0.80, 1.10, beside=cached, model="resnet18"),
    ]
    finer = Row("stalls", system, "accelerator_utilization", "1", 0.97, *ends, model="resnet18", page_cache="warm")
    others = [replace(finer, page_cache="cold"), replace(finer, model="alexnet"), replace(finer, metric="prep_stall")]
    others.append(replace(finer, environment=environment("x")))  # on another machine
    assert in_words("training", own, [*others, finer])[0].endswith(said)
    assert in_words("training", own, others)[0].endswith("[80, 110]: whether loading limits it is not decided.")
    sure = [own[0], replace(own[1], low=0.96)]
    assert in_words("training", sure, [finer])[0].endswith("without a loader: its own arithmetic limits it.")


def test_words_say_whether_predicting_is_as_fast_as_it_is_meant_to_be(results):
    assert in_words("predict", read_results(results)["predict"]) == [
        f"Predicting: {PREDICT} is 0.80 [0.80, 0.80] times evaluation (400x300 jpg, 224 px); at least 0.6: held.",
        f"Predicting: {START_PREDICT} takes 3.00 [3.00, 3.00] s; under 5 s: held.",
    ]


def test_markdown_has_every_table(results):
    text = markdown(read_results(results))
    for part in (
        "## Loader",
        "## Training",
        "## Predicting",
        "| dermscale native jpg | 300",
        "Other processes used 25 %",
        "other DCT <i>",
    ):
        assert part in text


def test_page_stands_alone_and_escapes_what_it_shows(results):
    html = page(read_results(results))
    assert "<script" not in html
    assert not re.findall(r'(?:src|href)="(?!#|data:)', html)
    assert "&lt;here&gt;" in html
    assert "<here>" not in html
    assert html.count("<svg") == 3
    assert "nothing here was measured on one" in html


def test_tables_of_several_machines_say_which_is_of_which(results):
    found = read_results(results)
    one = machines_text(found)
    assert one.endswith("GPU: none.") and "Loading" not in one and one in markdown(found)
    rows = [
        replace(row, environment=replace(row.environment, cpu="Abacus")) if row.environment else row
        for row in found["training"]
    ]
    several = found | {"training": rows}
    said = machines_text(several)
    assert f"Loading, Predicting: {one}" in said and "Training: Abacus, " in said and "not to be compared" in said
    assert said in markdown(several) and said in page(several)
    assert machines_text({"training": []}) == ""


def test_systems_that_read_no_packed_images_stand_with_the_job_that_they_were_measured_in():
    def job(size: str, rate: float) -> list[Row]:
        known = {"benchmark": "loader", "resolution_px": 224}
        rows = series_rows(series(*[3 * rate] * 6), system="dermscale native jpg", packed=f"{size} jpg", **known)
        return rows + series_rows(series(*[rate] * 6), system="torchvision ImageFolder", packed="originals", **known)

    first, second = loader_text([*job("341x256", 100), *job("400x300", 50)]).split("### Packed at 400x300")
    assert "| torchvision ImageFolder | 100" in first and "| torchvision ImageFolder | 50" in second
    whole = page({"loader": [*job("341x256", 100), *job("400x300", 50)]})
    assert whole.count(">torchvision ImageFolder</text>") == 2


def test_what_reads_no_packed_images_comes_after_what_says_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.loader.stats", lambda work: ((0.0, 0.0, 0.0), f"{work.packed_px}x1"))
    monkeypatch.setattr(
        "benchmarks.loader.take_turns", lambda _, names, *rest, **more: (dict.fromkeys(names, series(*[1.0] * 6)), {})
    )
    systems = [SYSTEMS["torchvision ImageFolder"], SYSTEMS["webdataset"]]
    rows = []
    for job in jobs(Work(tmp_path, tmp_path), (341, 400), (224,)):
        rows += measure_loaders(systems, job, environment("x"), rounds=6, seconds=1.0, told=print)
    assert packed_sizes(rows) == ["341x1"] * 4 + ["400x1"] * 4
    assert {row.system for row in rows[:4]} == {"torchvision ImageFolder", "webdataset"}


def test_words_of_packing_name_no_resolution():
    def ratio(size: str) -> Row:
        columns = {"benchmark": "pack", "system": "dermscale jpg", "packed": f"{size} jpg"}
        return ratio_row(series(*[300.0] * 6), series(*[100.0] * 6), beside="webdataset", **columns)

    assert in_words("pack", [ratio("400x300"), ratio("600x450")])[-1] == (
        "Packing: the same for 600x450 is in the tables."
    )


def test_words_are_of_the_first_sizes_and_name_the_others():
    def ratio(size: str, px: int) -> Row:
        columns = {
            "benchmark": "loader",
            "system": "dermscale native jpg",
            "packed": f"{size} jpg",
            "resolution_px": px,
        }
        return ratio_row(series(*[300.0] * 6), series(*[100.0] * 6), beside="webdataset", **columns)

    first, others = in_words("loader", [ratio("341x256", 224), ratio("341x256", 128), ratio("400x300", 224)])
    assert "(341x256 jpg, 224 px)" in first
    assert others == "Loading: the same for 341x256 → 128 px, 400x300 → 224 px is in the tables."


def test_bars_are_as_long_as_their_values():
    rows = [Row("loader", name, "img_per_s", "img/s", value) for name, value in (("a", 50.0), ("b", 100.0))]
    svg = bars("x", "title", [*rows, Row("loader", "c", "img_per_s", "img/s", None, failed="why")], "img/s")
    widths = [float(width) for width in re.findall(r'<rect[^>]*width="([\d.]+)"', svg)]
    assert widths[0] == pytest.approx(2 * widths[1])
    assert "failed: why" in svg


def test_bars_show_what_the_tables_say_of_stalls_packing_and_the_peak():
    def row(benchmark: str, metric: str, unit: str, value: float, **more: Any) -> Row:
        return Row(benchmark, "channels-last, native loader", metric, unit, value, value - 0.1, value + 0.1, **more)

    stalls = [row("stalls", "prep_stall", "1", -0.02, model="resnet18", page_cache="warm")]
    stalls.append(row("stalls", "data_wait", "1", 0.25, model="resnet18", page_cache="warm"))
    packed = (("bytes_per_image", "bytes", 22_000.0), ("psnr_source_db", "dB", 38.0))
    pack = [row("pack", name, unit, value, packed="400x300 jpg") for name, unit, value in packed]
    training = [row("training", "share_of_peak", "1", 0.5, model="resnet18")]
    html = page({"pack": pack, "training": training, "stalls": stalls})
    assert html.count("<svg") == 5
    for said in ("resnet18, prep stall", "resnet18, data wait", "payload of an image", "share of its matrix peak"):
        assert f"<h3>{said}</h3>" in html or f", {said}</h3>" in html
    for figure in ("-2.00 %", "25.0 %", "22,000 bytes", "38.0 dB", "50.0 %"):
        assert f">{figure}</text>" in html
    assert 'width="-' not in html


def test_a_folder_without_results_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"benchmarks\.run loader"):
        read_results(tmp_path)


def test_the_report_command_writes_both(results):
    from click.testing import CliRunner

    from benchmarks.run import main

    found = CliRunner().invoke(main, ["report", "--out", str(results)])
    assert found.exit_code == 0, found.output
    assert (results / "RESULTS.md").read_text().startswith("# Results")
    assert (results / "report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.slow
def test_both_ways_to_train_a_study_finish_every_cell(tmp_path):
    source = write_source(tmp_path)
    work = Work(source, tmp_path / "bench", packed_px=64, resolution_px=32, batch_size=8, copies=1)
    for name, fractions in ((SHARED, (0.5, 1.0)), (ALONE, (1.0,))):
        job = GridJob(work, ("resnet18",), fractions, seeds=(0,), device="cpu")
        running = set_up(name, job)
        assert running.once() == job.cells == len(fractions)
        (overhead,) = (tmp_path / "bench/grid").glob(f"{name.replace(' ', '-').replace(',', '')}.overhead")
        _, line = overhead.read_text().splitlines()  # of the second study: the first was to warm up
        found = json.loads(line)
        assert 0 < found["overhead_share"] < 1
        assert ("later_cell_s" in found) == (name == SHARED)
        if name == SHARED:
            assert 0 < found["later_cell_s"] < 30


def test_a_study_that_cannot_run_is_a_failed_row(tmp_path):
    work = Work(tmp_path, tmp_path / "bench")
    rows = measure_grid(GridJob(work, ("resnet18",)), environment("x"), rounds=5, told=lambda step: None)
    assert all(row.value is None for row in rows)
    assert all("HAM10000_metadata.csv" in row.failed for row in rows)
    assert "failed" in grid_text(rows)
