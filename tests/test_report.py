"""The report: complete, true to the numbers, self-contained, readable by everyone, and drawn by a real browser."""

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shards.errors import DataError
from shards.format import CLASSES
from tests.made_study import test_set as made_test_set
from tests.made_study import write_leakage, write_run, write_study
from train import analysis, study_data, svg
from train.cells import cell_name
from train.config import Config
from train.findings import findings
from train.report import compose, draw, settings
from train.report_page import standalone, style
from train.study import model_difference

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


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


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """One run folder, as train.run leaves it."""
    out = tmp_path_factory.mktemp("one") / "run"
    write_run(out, Config(model="vit_b16", resolution=64), 500, made_test_set(np.random.default_rng(2), 80))
    return out


def compose_folder(path: Path) -> tuple[analysis.Analysis, str]:
    one = analysis.analyse(study_data.read(path), resamples=200)
    return one, compose(one, draw(one))


def words(page: str) -> str:
    """The text of a page, without tags."""
    return re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S)


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


# ------------------------------------------------------------------ true to the numbers


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
    row = found.study.runs[0].row
    assert analysis.training_flops(row) == 3 * row["flops_per_image"] * row["steps"] * row["batch_size"]


# ------------------------------------------------------------------ the words


def told(one: analysis.Analysis) -> str:
    return " ".join(sentence for _, answer in findings(one) for sentence in answer)


def test_findings_name_the_best_model_and_what_is_not_known(found):
    text = told(found)
    assert "resnet18 reaches a mean balanced accuracy" in text
    assert "same number of epochs" in text and "1 cell failed" in text
    assert "nan" not in text.lower().replace("nanc", "") and "None" not in text


def test_a_model_is_not_better_than_its_twin(tmp_path):
    out = write_study(tmp_path / "s", models=("resnet18",), fractions=(1.0,), seeds=(0, 1), lesions=120)
    for seed in (0, 1):
        twin = out / "cells" / f"alexnet_f1_s{seed}_u{seed}"
        shutil.copytree(out / "cells" / f"resnet18_f1_s{seed}_u{seed}", twin)
        for name in ("config", "result"):
            content = json.loads((twin / f"{name}.json").read_text())
            (twin / f"{name}.json").write_text(json.dumps(content | {"model": "alexnet"}))
    text = told(compose_folder(out)[0])
    assert "cannot be told apart" in text and "is better than" not in text


def test_equal_steps_are_told_and_few_runs_too(tmp_path):
    out = write_study(tmp_path / "s", fractions=(0.25, 1.0), seeds=(0,), lesions=80, budget="steps")
    one, page = compose_folder(out)
    text = told(one)
    assert "same number of optimizer steps" in text
    assert "Some cells have 1 run" in text and "trained networks" in text
    assert "No curve was fitted" in text
    assert "interaction cannot be told from the seed" in words(page)


def test_a_study_without_spread_says_that_there_is_nothing_to_share_out(tmp_path):
    out = write_study(tmp_path / "s", fractions=(0.5, 1.0), seeds=(0, 1), lesions=60)
    for path in out.glob("cells/*/result.json"):
        result = json.loads(path.read_text())
        result["test"]["balanced_accuracy"] |= {"value": 1 / 7}  # runs that call everything by one class
        path.write_text(json.dumps(result))
    one, page = compose_folder(out)
    assert "all 8 runs have the same balanced_accuracy (0.143), so there is nothing to share out" in words(page)
    assert "this grid, the" not in told(one) and "What moves macro AUC" in words(page)


def test_a_split_by_image_is_announced_before_anything_else(tmp_path):
    out = write_study(tmp_path / "s", models=("resnet18",), fractions=(1.0,), seeds=(0,), lesions=80, unit="image")
    _, page = compose_folder(out)
    header = page[page.index("<header>") : page.index("</header>")]
    assert "Split by image" in header and "too good" in header


def test_images_without_lesions_are_named_as_a_doubt(tmp_path):
    out = write_study(
        tmp_path / "s", models=("resnet18",), fractions=(1.0,), seeds=(0,), lesions=80, with_lesions=False
    )
    assert "names no lesions" in told(compose_folder(out)[0])


# ------------------------------------------------------------------ one cell or many; what cannot be reported


def test_one_run_folder_is_a_report_too(single):
    one, page = compose_folder(single)
    assert len(one.study.runs) == 1 and "1 run of 1 model" in words(page)
    assert "Which classes are confused" in page and "with 500 images" in words(page)


def test_many_models_get_a_learning_curve_each(tmp_path):
    models = ("alexnet", "resnet18", "resnet34", "resnet50", "vit_b16", "convnext_tiny")
    out = write_study(tmp_path / "s", models=models, fractions=(0.25, 1.0), seeds=(0,), lesions=60)
    one, page = compose_folder(out)
    assert page.count('<svg class="chart" id="curve-balanced_accuracy-') == 6
    assert one.study.models == list(models)
    assert len(one.differences) == 15
    ps = [pair["metrics"]["balanced_accuracy"] for pair in one.differences]
    assert all(p["p_holm"] >= p["p"] for p in ps)


def test_runs_of_different_sets_do_not_share_a_report(tmp_path):
    out = write_study(tmp_path / "s", models=("resnet18",), fractions=(1.0,), seeds=(0, 1), lesions=60)
    path = out / "cells" / "resnet18_f1_s1_u1" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shard_set_sha256": "cd" * 32}))
    with pytest.raises(DataError, match="2 different shard sets"):
        study_data.read(out)


@pytest.mark.parametrize("what", ["missing", "empty", "damaged", "unfinished"])
def test_what_cannot_be_reported_ends_in_one_line(tmp_path, what):
    out = tmp_path / "s"
    if what != "missing":
        out.mkdir()
    if what == "damaged":
        write_run(out / "run", Config(model="resnet18"), 500, made_test_set(np.random.default_rng(2), 60))
        (out / "run" / "result.json").write_text("{")
    if what == "unfinished":
        (out / "study.json").write_text(json.dumps({"version": 1, "settings": {}}))
    done = subprocess.run(
        [sys.executable, "-m", "train.report", str(out)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert str(out) in done.stderr and not (out / "report.html").exists()


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


# ------------------------------------------------------------------ in a real browser


PROBE = """<script>
addEventListener('load', () => {
  const told = [];
  for (const svg of document.querySelectorAll('svg.chart')) {
    const box = svg.getBoundingClientRect(), marks = [...svg.querySelectorAll('.point,.line,.bar,.box,.heat')];
    const drawn = marks.filter(m => { const b = m.getBBox(); return b.width + b.height > 0; }).length;
    const view = svg.viewBox.baseVal, out = [];
    for (const text of svg.querySelectorAll('text')) {
      const b = text.getBoundingClientRect(), slack = 1.5;
      if (text.textContent && (b.left < box.left - slack || b.right > box.right + slack || b.top < box.top - slack ||
          b.bottom > box.bottom + slack)) out.push(text.textContent);
    }
    told.push({id: svg.id, width: box.width, height: box.height, marks: marks.length, drawn, out});
  }
  const images = [...document.images].map(i => i.naturalWidth);
  const body = getComputedStyle(document.body);
  const seen = JSON.stringify({told, images, scroll: document.scrollingElement.scrollWidth, inner: innerWidth,
    paper: body.backgroundColor, ink: body.color});
  document.body.setAttribute('data-probe', seen);
  parent.postMessage(seen, '*');
});
</script>"""

FRAME = """<!doctype html><body><script>
addEventListener('message', message => document.body.setAttribute('data-probe', message.data));
</script><iframe src="page.html" style="width: {}px; height: 800px; border: 0"></iframe></body>"""
"""A page around the page, which is then as narrow as on a phone: no window of Chromium is under 500 px wide."""


def browse(page: str, folder: Path, *, width: int = 1100, dark: bool = False) -> tuple[dict, str]:
    """What a headless Chromium made of a page, and what it logged. The probe is added to the copy that it loads."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no Chromium on PATH (looked for {', '.join(BROWSERS)})")
    copy = folder / "page.html"
    allowed = page.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    copy.write_text(allowed.replace("</body>", PROBE + "</body>"))
    if width < 500:
        copy = folder / "frame.html"
        copy.write_text(FRAME.format(width))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=5000"]
    command += ["--enable-logging=stderr", "--v=0", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    done = subprocess.run([*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=180)
    probe = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert probe, f"the page did not load: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(probe.group(1).replace("&quot;", '"').replace("&amp;", "&")), "\n".join(console)


def assert_drawn(seen: dict, console: str, charts: int) -> None:
    assert not console
    assert len(seen["told"]) == charts
    for chart in seen["told"]:
        assert chart["width"] > 150 and chart["height"] > 50, chart
        assert chart["marks"] and chart["drawn"] >= 0.7 * chart["marks"] > 0, chart
        assert not chart["out"], chart
    assert all(width > 0 for width in seen["images"])


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


def test_a_browser_draws_the_report_of_a_single_run(single, tmp_path):
    one, page = compose_folder(single)
    seen, console = browse(page, tmp_path, width=500)
    assert_drawn(seen, console, sum(len(figure.charts) for figure in draw(one)))


def test_the_probe_finds_a_page_that_is_broken(page, tmp_path):
    broken = page.replace('class="point', 'style="display:none" class="point').replace(
        "<main>", "<main><img src='data:,'>"
    )
    seen, _ = browse(broken, tmp_path)
    with pytest.raises(AssertionError):
        assert_drawn(seen, "", len(seen["told"]))
    wide = page.replace("<main>", "<main><p style='width: 400px'>wide</p>")
    assert browse(wide, tmp_path, width=375)[0]["scroll"] > 375


# ------------------------------------------------------------------ tiles and pictures


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "train.report", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=180
    )


def study_of(shards: Path, out: Path) -> Path:
    """A run folder whose predictions are about the images of a real shard set."""
    from shards import ShardSet

    with ShardSet(shards) as data:
        test = data.select("test")
        names = (test.labels, test.lesion_ids.astype(str), test.image_ids.astype(str))
        sha = data.manifest.index_sha256
    write_run(out, replace(Config(model="resnet18"), data=str(shards)), 70, names)
    path = out / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shard_set_sha256": sha}))
    return out


def test_tiles_are_images_of_the_mistakes_and_only_there_when_asked_for(tiny_shards, tmp_path):
    out = study_of(tiny_shards, tmp_path / "run")
    plain = command(str(out), "--resamples", "200")
    assert plain.returncode == 0, plain.stderr
    assert "<img" not in (out / "report.html").read_text()
    asked = command(str(out), "--resamples", "200", "--tiles", "3", "--out", str(tmp_path / "tiles.html"))
    assert asked.returncode == 0, asked.stderr
    page = (tmp_path / "tiles.html").read_text()
    wrong = analysis.mistakes(study_data.read(out).runs[0], 3)
    assert wrong and page.count("<img ") == len(wrong)
    for one in wrong:
        assert f"{one['image_id']}: {one['true']} called {one['called']}" in page
    assert "CC BY-NC" in page
    seen, console = browse(page, tmp_path)
    assert not console and len(seen["images"]) == len(wrong) and min(seen["images"]) > 50


def test_tiles_of_another_set_are_refused(tiny_shards, single):
    done = command(str(single), "--resamples", "200", "--tiles", "3", "--data", str(tiny_shards))
    assert done.returncode == 2 and "not the shard set" in done.stderr


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


@pytest.mark.slow
def test_a_made_up_run_has_the_keys_of_a_real_one(tiny_shards, single, tmp_path):
    """So that the report is tested on the format that runs are really written in."""
    from train.loop import train_once

    config = Config(model="resnet18", data=str(tiny_shards), epochs=1, batch_size=32, resolution=32, compile="off")
    train_once(config, tmp_path / "real")
    for name in ("result", "environment", "config"):
        real, made = (json.loads((p / f"{name}.json").read_text()) for p in (tmp_path / "real", single))
        assert set(made) <= set(real), name
    real, made = (json.loads((p / "result.json").read_text())["test"] for p in (tmp_path / "real", single))
    assert set(real) == set(made)
    assert cell_name(config) == "resnet18_f1_s0_u0"
