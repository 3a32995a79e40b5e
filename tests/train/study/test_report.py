"""The report: complete, true to the numbers, self-contained, readable by everyone, and drawn by a real browser."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shards.format import CLASSES
from tests.support.made_study import write_leakage, write_study
from tests.support.report_pages import assert_drawn, browse, told, words
from train.metrics.differences import model_difference
from train.report import compose, draw, settings
from train.study import analysis
from train.study import runs as study_data
from train.study.report import svg
from train.study.report.page import standalone, style


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
def page(found) -> str:
    return compose(found, draw(found))


# ------------------------------------------------------------------ complete and self-contained


class Elements(HTMLParser):
    """Every element of a page with its attributes, and whether all that were opened are closed."""

    VOID = ("meta", "link", "img", "path", "rect", "polyline", "polygon")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_every_part_that_a_study_needs_is_there(page):
    for heading in (
        "Balanced accuracy against training images",
        "Macro AUC against training images",
        "Accuracy against cost",
        "Which classes are confused",
        "Recall of each class by fraction",
        "How far probabilities can be trusted",
        "Differences in balanced accuracy",
        "What moves the results",
        "What a split by image gains falsely",
        "Speed and waiting for data",
        "Settings and versions",
        "What was done",
        "How sure is all this",
    ):
        assert f"<h2>{heading}</h2>" in page or f"<dt>{heading}</dt>" in page, heading


def test_the_page_is_well_formed_and_loads_nothing(page):
    elements = Elements(page)
    assert not elements.open
    tags = {tag for tag, _ in elements.all}
    assert not tags & {"script", "iframe", "object", "embed", "video", "base", "form"}
    for _, attributes in elements.all:
        for name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), value
    assert "url(" not in page and "@import" not in page and "http://" not in page and "https://" not in page
    policy = next(a["content"] for t, a in elements.all if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and "default-src 'none'" in policy and "http" not in policy
    ids = [attributes["id"] for _, attributes in elements.all if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_picture_says_in_words_what_it_shows(page):
    charts = re.findall(r'<svg class="chart".*?</svg>', page, flags=re.S)
    assert len(charts) > 15
    for chart in charts:
        name = re.search(r'id="([^"]+)"', chart).group(1)
        assert f'aria-labelledby="{name}-t {name}-d"' in chart and 'role="img"' in chart
        title = re.search(rf'<title id="{name}-t">(.*?)</title>', chart).group(1)
        told = re.search(rf'<desc id="{name}-d">(.*?)</desc>', chart).group(1)
        assert len(title) > 10 and len(told) > 10, name


def test_every_run_is_a_point_of_the_learning_curve(found, page):
    chart = re.search(r'<svg class="chart" id="curve-balanced_accuracy.*?</svg>', page, flags=re.S).group(0)
    assert chart.count('class="point') == len(found.study.runs) == 23
    assert chart.count('class="band') == 2


# ------------------------------------------------------------------ true to the numbers, and in words


def test_means_in_the_table_are_those_of_the_runs(found, page):
    for model in ("resnet18", "alexnet"):
        values = [r.result["test"]["balanced_accuracy"]["value"] for r in found.study.runs if r.row["model"] == model]
        fractions = [r.row["fraction"] for r in found.study.runs if r.row["model"] == model]
        mean = np.mean([v for v, f in zip(values, fractions, strict=True) if f == 1.0])
        assert f"{100 * mean:.1f} %" in words(page)


def test_pooled_confusion_is_the_crosstab_of_the_predictions(found):
    runs = found.study.of("resnet18", 1.0)
    classes, counts = analysis.confusion(runs)
    tables = [pd.read_parquet(run.folder / "predictions.parquet") for run in runs]
    table = pd.concat(tables)
    called = table[[f"logit_{name}" for name in CLASSES]].to_numpy().argmax(axis=1)
    expected = pd.crosstab(table["label"], called).reindex(index=range(7), columns=range(7), fill_value=0)
    assert classes == list(CLASSES) and np.array_equal(counts, expected.to_numpy())


def test_differences_are_those_of_the_pairs_and_corrected_for_their_number(found):
    assert found.compared_at == 1.0 and len(found.differences) == 1
    pair = found.differences[0]
    sides = [[run.tested() for run in found.study.of(model, 1.0)] for model in (pair["first"], pair["second"])]
    expected = model_difference(*sides, metrics=("balanced_accuracy",), resamples=200)["balanced_accuracy"]
    cell = pair["metrics"]["balanced_accuracy"]
    assert {key: cell[key] for key in expected} == expected
    assert cell["p_holm"] == pytest.approx(cell["p"])  # one pair


def test_pooled_reliability_is_the_mean_over_all_images(found):
    runs = found.study.of("alexnet", 1.0)
    bins = analysis.reliability(runs, scaled=False)
    assert sum(b["share"] for b in bins) == pytest.approx(1.0)
    assert all(b["low"] <= b["accuracy"] + 1e-9 and b["accuracy"] <= b["high"] + 1e-9 for b in bins)
    tables = [run.result["test"]["reliability"] for run in runs]
    mean = sum(b["share"] * b["accuracy"]["value"] for table in tables for b in table if b["share"]) / len(tables)
    assert sum(b["share"] * b["accuracy"] for b in bins) == pytest.approx(mean)


def test_the_most_confident_mistakes_are_the_most_confident_and_mistakes(found):
    run = found.study.of("alexnet", 1.0)[0]
    chosen = analysis.mistakes(run, 5)
    table = pd.read_parquet(run.folder / "predictions.parquet").set_index("image_id")
    shares = table[[f"prob_{name}" for name in CLASSES]]
    wrong = table.index[shares.to_numpy().argmax(axis=1) != table["label"].to_numpy()]
    top = shares.loc[wrong].max(axis=1).sort_values(ascending=False)
    assert [m["image_id"] for m in chosen] == top.index[:5].tolist()
    assert all(m["true"] == CLASSES[table.loc[m["image_id"], "label"]] != m["called"] for m in chosen)


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
    assert "same number of epochs" in text and "1 cell failed" in text
    assert "nan" not in text.lower().replace("nanc", "") and "None" not in text


def test_settings_that_differ_are_shown_as_differing(found):
    shared, differing = settings(found.study)
    assert shared["budget"] == "epochs" and shared["resolution"] == 64 and shared["version of torch"] == "2.14.1"
    assert differing["model"] == ["alexnet", "resnet18"] and "resolution" not in differing


# ------------------------------------------------------------------ readable by everyone


def test_series_differ_in_shape_and_dashes_and_not_in_colour_alone():
    seen = {(svg.marker(i, 0, 0, 4), svg.DASHES[i % len(svg.DASHES)]) for i in range(8)}
    assert len(seen) == 8
    assert len({shape for shape, _ in seen}) == 8 and len({dash for _, dash in seen}) == 8


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours, 1 to 21."""

    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = "".join(2 * c for c in digits) if len(digits) == 3 else digits
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_the_page(theme):
    blocks = re.findall(r":root \{(.*?)\}", style(), flags=re.S)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--([\w]+): (#[0-9a-f]{3,6})", blocks[theme]))
    for name in ("ink", "muted", "link"):
        assert contrast(colours[name], colours["page"]) >= 4.5
        assert contrast(colours[name], colours["soft"]) >= 4.5
    for i in range(8):
        assert contrast(colours[f"c{i}"], colours["page"]) >= 4.5
    assert contrast(colours["heat"], colours["onheat"]) >= 4.5


def test_scales_hold_their_values_and_stay_within_limits():
    scale = svg.linear(0.12, 0.97, svg.Label("percent"), limits=(0.0, 1.0))
    assert scale.low <= 0.12 and 0.97 <= scale.high <= 1.0
    assert all(0.0 <= value <= 1.0 for value, _ in scale.ticks)
    assert svg.linear(1.0, 1.0, svg.Label("percent"), limits=(0.0, 1.0)).high <= 1.0
    sizes = svg.logarithmic(88, 5608, svg.Label("counts"))
    places = [sizes.share(n) for n in (88, 175, 351)]
    assert np.diff(places) == pytest.approx([np.diff(places)[0]] * 2, rel=0.02)
    assert [svg.short(v) for v in (7, 5608, 25_600, 11_180_103, 3.1e12)] == ["7", "5,608", "25.6k", "11.2M", "3.1T"]


# ------------------------------------------------------------------ in a real browser, and each picture alone


@pytest.mark.parametrize(
    ("width", "dark"),
    [(1100, False), (1100, True), (500, False), (375, False)],
    ids=["light", "dark", "narrow", "phone"],
)
def test_a_browser_draws_every_picture_without_a_complaint(found, page, tmp_path, width, dark):
    seen, console = browse(page.replace("<details>", "<details open>"), tmp_path, width=width, dark=dark)
    assert_drawn(seen, console, sum(len(figure.charts) for figure in draw(found)))
    assert {"leakage-balanced_accuracy", "leakage-accuracy"} < {chart["id"] for chart in seen["told"]}
    assert seen["inner"] == width
    assert seen["scroll"] <= width  # no sideways scrolling of the page itself
    numbers = [int(c) for c in re.findall(r"\d+", seen["paper"])[:3]]
    assert (sum(numbers) < 200) == dark


def test_the_probe_finds_a_page_that_is_broken(page, tmp_path):
    broken = page.replace('class="point', 'style="display:none" class="point').replace(
        "<main>", "<main><img src='data:,'>"
    )
    seen, _ = browse(broken, tmp_path)
    with pytest.raises(AssertionError):
        assert_drawn(seen, "", len(seen["told"]))
    wide = page.replace("<main>", "<main><p style='width: 400px'>wide</p>")
    assert browse(wide, tmp_path, width=375)[0]["scroll"] > 375


def test_pictures_can_stand_alone(found):
    for figure in draw(found):
        for chart in figure.charts:
            text = standalone(chart, figure.legend)
            root = ElementTree.fromstring(text)
            assert root.tag == "{http://www.w3.org/2000/svg}svg" and float(root.get("width")) > 100
            assert "prefers-color-scheme" in text
            shown = {part.text: part for part in root.iter("{http://www.w3.org/2000/svg}text")}
            alone = ElementTree.fromstring(standalone(chart))
            for _, name in figure.legend:  # below what is drawn without it, and inside the picture
                assert float(alone.get("height")) < float(shown[name].get("y")) < float(root.get("height"))
                assert float(shown[name].get("x")) + 7 * len(name) < float(root.get("width"))
