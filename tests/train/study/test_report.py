"""The report: complete, true to the numbers, self-contained, readable by everyone, and drawn by a real browser."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from shards.format import HAM10000
from tests.support.made_study import write_leakage, write_study
from tests.support.report_pages import assert_drawn, browse, told, words
from train.metrics.differences import model_difference
from train.study import analysis
from train.study import runs as study_data
from train.study.report.charts import Chart, charts, cost
from train.study.report.findings import findings, warnings
from train.study.report.page import compose, settings
from train.study.report.picture import DARK, LIGHT, look, short, styled


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two models, four fractions, three seeds, one failed cell, and what a split by image gains."""
    out = write_study(tmp_path_factory.mktemp("made") / "study", lesions=120, fail=("alexnet_f0.125_s2_u2",))
    write_leakage(out)
    return out


@pytest.fixture(scope="module")
def found(folder) -> analysis.Analysis:
    return analysis.analyse(study_data.read(folder), resamples=200)


@pytest.fixture(scope="module")
def drawn(found) -> list[Chart]:
    return charts(found)


@pytest.fixture(scope="module")
def page(found, drawn) -> str:
    return compose(found, drawn)


# ------------------------------------------------------------------ complete and self-contained


def elements_of(page: str) -> list[ElementTree.Element]:
    """Every element of a page, which must be well-formed."""
    text = re.sub(r"<((?:meta|link|img)\b[^>]*)>", r"<\1/>", page.partition("\n")[2])
    return list(ElementTree.fromstring(text.replace("<html ", '<html xmlns:xlink="xlink" ')).iter())


def test_every_part_that_a_study_needs_is_there(page, drawn):
    named = {"curves-balanced_accuracy", "curves-macro_auc", "cost", "forest-balanced_accuracy", "forest-macro_auc"}
    named |= {"gaps", "variance", "confusion", "recall", "reliability", "leakage", "speed"}
    assert {chart.name for chart in drawn} == named
    assert set(re.findall(r'<section id="section-([^"]*)"', page)) == named | {"results", "missing", "settings"}


def test_the_page_is_well_formed_and_loads_nothing(page):
    elements = elements_of(page)
    assert not {one.tag for one in elements} & {"script", "iframe", "object", "embed", "video", "base", "form"}
    for one in elements:
        for name in ("src", "href", "{xlink}href", "data", "action", "srcset"):
            assert one.get(name, "#").startswith(("#", "data:")), one.get(name)
    assert "url(" not in page and "@import" not in page and "http://" not in page and "https://" not in page
    policy = next(one.get("content") for one in elements if one.get("http-equiv") == "Content-Security-Policy")
    assert policy and "default-src 'none'" in policy and "http" not in policy
    ids = [one.get("id") for one in elements if one.get("id")]
    assert len(ids) == len(set(ids))


def test_every_chart_says_in_words_what_it_shows_and_has_its_numbers_in_a_table(drawn, page):
    for chart in drawn:
        (part,) = re.findall(rf'<section id="section-{chart.name}">.*?</section>', page, flags=re.S)
        assert part.count('<svg class="chart"') == len(chart.pictures) and len(chart.caption) > 50
        assert part.count("<tr>") - 1 >= len(chart.table.rows) > 0
        for picture in chart.pictures:
            name = picture.name
            assert f' id="{name}" ' in part and f'role="img" aria-labelledby="{name}-t {name}-d"' in part
            for kind, text in (("title", picture.title), ("desc", picture.alt)):
                assert len(text) > 10 and f'<{kind} id="{name}-{kind[0]}">{text}</{kind}>' in unescape(part), name


def test_every_run_is_a_point_of_the_learning_curve_with_its_score_in_words(found, page):
    (chart,) = re.findall(r'<svg class="chart" id="curve-balanced_accuracy.*?</svg>', page, flags=re.S)
    assert chart.count('class="point"') == len(found.study.runs) == 23
    assert chart.count('class="band"') == 2
    for run in found.study.runs:
        row = run.row
        score = f"{100 * row['balanced_accuracy']:.1f} %"
        assert f"<title>{row['model']}, {row['n_train']:,} images, seed {row['seed']}: {score}</title>" in chart


# ------------------------------------------------------------------ true to the numbers, and in words


@pytest.mark.parametrize("column", ["balanced_accuracy", "recall_mel"])
def test_means_lowest_and_highest_are_those_of_the_runs(found, page, column):
    table = found.study.table.groupby(["model", "fraction"])[column].agg(["mean", "min", "max"])
    for model, sizes in found.sizes.items():
        assert table.loc[model].to_numpy() == pytest.approx(np.array([size.score(column) for size in sizes]))
        assert f"{100 * table.loc[(model, 1.0), 'mean']:.1f} %" in words(page)


def test_pooled_confusion_is_the_crosstab_of_the_predictions(found):
    runs = found.sizes["resnet18"][-1].runs
    classes, counts = analysis.confusion(runs)
    tables = [pd.read_parquet(run.folder / "predictions.parquet") for run in runs]
    table = pd.concat(tables)
    called = table[[f"logit_{name}" for name in HAM10000.names]].to_numpy().argmax(axis=1)
    expected = pd.crosstab(table["label"], called).reindex(index=range(7), columns=range(7), fill_value=0)
    assert classes == list(HAM10000.names) and np.array_equal(counts, expected.to_numpy())


def test_differences_are_those_of_the_pairs_and_corrected_for_their_number(found):
    assert found.compared_at == 1.0 and len(found.differences) == 1
    pair = found.differences[0]
    sides = [[run.tested() for run in found.sizes[model][-1].runs] for model in (pair["first"], pair["second"])]
    expected = model_difference(*sides, metrics=("balanced_accuracy",), resamples=200)["balanced_accuracy"]
    cell = pair["metrics"]["balanced_accuracy"]
    assert {key: cell[key] for key in expected} == expected
    assert cell["p_holm"] == pytest.approx(cell["p"])  # one pair


def test_gaps_and_gains_by_size_are_the_paired_differences(found, page):
    small, large = found.sizes["resnet18"][:2]
    other = found.sizes["alexnet"][1]
    assert found.best.model == "resnet18" and set(found.gaps) == {"alexnet"}
    assert set(found.gaps["alexnet"]) == {size.fraction for size in found.sizes["alexnet"]}
    for kept, (first, second) in (
        (found.gaps["alexnet"][other.fraction], (other, large)),
        (found.gains["resnet18"][large.fraction], (large, small)),
    ):
        sides = [[run.tested() for run in size.runs] for size in (first, second)]
        assert kept == model_difference(*sides, metrics=analysis.METRICS, resamples=200)
        gap = kept["balanced_accuracy"]["difference"]
        assert f"{100 * gap['value']:+.1f} points ({100 * gap['low']:+.1f} points to" in words(page)
    assert small.fraction not in found.gains["resnet18"]


def test_where_the_costlier_model_is_better_follows_from_the_gaps(found):
    (said,) = dict(findings(found))["From how many images a larger model pays"]
    assert "resnet18 needs 1.6 times the computation of alexnet." in said  # 296 and 188 million FLOPs an image
    behind = {of: cells["balanced_accuracy"]["difference"]["value"] for of, cells in found.gaps["alexnet"].items()}
    assert all(value < 0 for value in behind.values())
    assert said.endswith("resnet18 is better with every number of images.")
    for ahead, low, verdict in (
        ((0.5, 1.0), 0.05, "resnet18 is better with 2,801 or more images."),
        ((0.5, 1.0), -0.01, "resnet18 is better with 2,801 or more images, but not clearly with 5,601."),
        ((0.5,), None, "resnet18 is not better with 5,601 images."),
    ):
        cells = {}
        for of in behind:
            better = (
                {"value": 0.1, "low": low, "high": 0.15} if of in ahead else {"value": -0.1, "low": -0.2, "high": 0}
            )
            turned = {
                "value": -better["value"],
                "low": -better["high"],
                "high": None if low is None else -better["low"],
            }
            cells[of] = {"balanced_accuracy": {"difference": turned}}
        (said,) = dict(findings(replace(found, gaps={"alexnet": cells})))["From how many images a larger model pays"]
        assert said.endswith(verdict)
        if low:
            assert "resnet18 minus alexnet: -10.0 points (-20.0 points to +0.0 points) with" in said
            assert f"+10.0 points ({100 * low:+.1f} points to +15.0 points) with 5,601" in said


def test_without_repeats_the_share_of_the_seed_is_said_to_hold_that_of_the_interaction(found):
    parts = found.variance["balanced_accuracy"]
    assert "the seed and different gains" not in " ".join(dict(findings(found))["What matters more, model or data"])
    nothing = {"value": None, "low": None, "high": None}
    once = {**parts, "shares": {**parts["shares"], "interaction": nothing}}
    said = dict(findings(replace(found, variance={"balanced_accuracy": once})))["What matters more, model or data"]
    assert "the seed and different gains of the models from more data together" in " ".join(said)


def test_pooled_reliability_is_the_mean_over_all_images(found):
    runs = found.sizes["alexnet"][-1].runs
    bins = analysis.reliability(runs, scaled=False)
    assert sum(b["share"] for b in bins) == pytest.approx(1.0)
    assert all(b["low"] <= b["accuracy"] + 1e-9 and b["accuracy"] <= b["high"] + 1e-9 for b in bins)
    tables = [run.result["test"]["reliability"] for run in runs]
    mean = sum(b["share"] * b["accuracy"]["value"] for table in tables for b in table if b["share"]) / len(tables)
    assert sum(b["share"] * b["accuracy"] for b in bins) == pytest.approx(mean)


def test_the_most_confident_mistakes_are_the_most_confident_and_mistakes(found):
    run = found.sizes["alexnet"][-1].runs[0]
    chosen = analysis.mistakes(run, 5)
    table = pd.read_parquet(run.folder / "predictions.parquet").set_index("image_id")
    shares = table[[f"prob_{name}" for name in HAM10000.names]]
    wrong = table.index[shares.to_numpy().argmax(axis=1) != table["label"].to_numpy()]
    top = shares.loc[wrong].max(axis=1).sort_values(ascending=False)
    assert [m["image_id"] for m in chosen] == top.index[:5].tolist()
    assert all(m["true"] == HAM10000.names[table.loc[m["image_id"], "label"]] != m["called"] for m in chosen)


def test_training_costs_three_forward_passes_an_image(found):
    run = found.study.runs[0]
    row = run.row
    whole = 3 * row["flops_per_image"] * row["steps"] * row["batch_size"]
    assert analysis.training_flops(run) == pytest.approx(whole)
    # Of 12 epochs, the first 9 at half the 64 px: a quarter of the arithmetic.
    ramp = replace(run, config=run.config | {"start_resolution": 32})
    assert analysis.training_flops(ramp) == pytest.approx(whole * (9 / 4 + 3) / 12)


def test_findings_name_the_best_model_and_what_is_not_known(found):
    text = told(found)
    assert "resnet18 reaches a mean balanced accuracy" in text
    assert "same number of epochs" in text and warnings(found.study) == ["1 cell failed: alexnet_f0.125_s2_u2."]
    assert "nan" not in text.lower().replace("nanc", "").replace("malignant", "") and "None" not in text


def test_settings_that_differ_are_shown_as_differing(found):
    values = settings(found.study)
    assert [values[name] for name in ("budget", "resolution", "version of torch")] == [["epochs"], [64], ["2.14.1"]]
    assert values["model"] == ["alexnet", "resnet18"] and "checkpoint_s" not in values


# ------------------------------------------------------------------ readable by everyone


def test_series_differ_in_shape_and_dashes_and_not_in_colour_alone():
    looks = [look(series) for series in range(9)]
    for key in ("marker", "linestyle", "color"):
        assert len({str(one[key]) for one in looks[:8]}) == 8
    assert looks[8]["linestyle"] != looks[0]["linestyle"]


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours, 1 to 21."""

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_stand_out_from_the_page(theme, page):
    assert "".join(f"--{name}:{value};" for name, value in theme.items()) in page
    for name in ("ink", "muted", *(f"c{i}" for i in range(8))):
        assert contrast(theme[name], theme["page"]) >= 4.5
    for name in ("ink", "muted", "c0"):
        assert contrast(theme[name], theme["soft"]) >= 4.5


def test_the_style_sheet_chooses_every_colour_of_a_chart(page):
    used = set()
    for chart in re.findall(r"<svg.*?</svg>", page, flags=re.S):
        used |= set(re.findall(r"(?:fill|stroke): ([^;\"]+)", chart))
    assert {"var(--c0)", "var(--c1)", "var(--ink)", "var(--line)"} < used
    assert used <= {"none", *(f"var(--{name})" for name in LIGHT)}


def test_large_counts_are_written_short():
    assert [short(v) for v in (7, 5608, 25_600, 11_180_103, 3.1e12)] == ["7", "5,608", "25.6k", "11.2M", "3.1T"]


# ------------------------------------------------------------------ in a real browser, and each picture alone


@pytest.mark.parametrize(
    ("width", "dark"),
    [(1100, False), (1100, True), (500, False), (375, False)],
    ids=["light", "dark", "narrow", "phone"],
)
def test_a_browser_draws_every_picture_without_a_complaint(drawn, page, tmp_path, width, dark):
    seen, console = browse(page.replace("<details>", "<details open>"), tmp_path, width=width, dark=dark)
    assert_drawn(seen, console, sum(len(chart.pictures) for chart in drawn))
    assert {"leakage-balanced_accuracy", "leakage-accuracy"} < {chart["id"] for chart in seen["told"]}
    assert seen["inner"] == width
    assert seen["scroll"] <= width  # no sideways scrolling of the page itself
    numbers = [int(c) for c in re.findall(r"\d+", seen["paper"])[:3]]
    assert (sum(numbers) < 200) == dark


def test_pictures_stand_alone_as_svg_pdf_and_png_with_their_legend(found, tmp_path):
    """And the same study gives the same bytes."""
    drawn = {chart.name: chart.pictures[0].files() for chart in charts(found)}
    for name, files in drawn.items():
        root = ElementTree.fromstring(files["svg"])
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        shown = {part.text for part in root.iter("{http://www.w3.org/2000/svg}text")}
        if name in ("curves-macro_auc", "cost", "recall"):
            assert set(found.study.models) <= shown, name
        assert b"prefers-color-scheme" in files["svg"] and b"var(" not in files["svg"]
        assert files["pdf"].startswith(b"%PDF") and files["png"].startswith(b"\x89PNG")
    with styled():
        again = cost(found)
    assert again is not None and again.pictures[0].files() == drawn["cost"]
    frames = "".join(files["svg"].decode() for files in drawn.values())
    seen, console = browse(f"<html><body>{frames}</body></html>", tmp_path)
    assert_drawn(seen, console, len(drawn))
