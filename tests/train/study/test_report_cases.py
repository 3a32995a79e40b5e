"""Reports of other folders: what their words doubt, one run or many models, what is refused, and tiles."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.common.errors import DataError
from tests.support.made_study import edit_results, write_run, write_study
from tests.support.made_study import test_set as made_test_set
from tests.support.report_pages import analysed, assert_drawn, browse, compose_folder, told, words
from train.config import Config
from train.study import analysis
from train.study import runs as study_data
from train.study.cells import EIGHT, cell_name
from train.study.report.charts import charts, results_table
from train.study.report.findings import curve as predicted

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """One run folder, as train.run leaves it."""
    out = tmp_path_factory.mktemp("one") / "run"
    write_run(out, Config(model="vit_b16", resolution=64), 500, made_test_set(np.random.default_rng(2), 80))
    return out


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "train.report", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=180
    )


# ------------------------------------------------------------------ the words


CURVE = {
    "curve": {"identifiable": True, "reasons": [], "a": {"value": 0.62, "low": 0.6, "high": 0.65}},
    "hold_out": {"inside": True, "predicted": 0.5, "low": 0.48, "high": 0.52, "observed": 0.513},
    "doubts": [],
    "band": [
        {"n": 5600, "value": 0.478, "low": 0.46, "high": 0.49},
        {"n": 11200, "value": 0.515, "low": 0.5, "high": 0.53},
    ],
    "notes": ["a note"],
}


@pytest.mark.parametrize("doubts", [[], ["fitted without the largest size, it misses that", "and another"]])
def test_a_curve_predicts_beyond_the_data_unless_it_is_in_doubt(doubts):
    fitted = CURVE | {"hold_out": CURVE["hold_out"] | {"inside": not doubts}, "doubts": doubts}
    text = " ".join(predicted(fitted, "balanced_accuracy"))
    assert f"The measured mean is 51.3 %, {'OUTSIDE' if doubts else 'inside'} the interval." in text
    assert all(doubt in text for doubt in doubts)
    for beyond in ("twice as many images", "51.5 % (50.0 % to 53.0 %)", "62.0 % (60.0 % to 65.0 %)"):
        assert (beyond in text) == (not doubts)
    assert "points" not in text and text.endswith("Note: a note.")


def test_a_curve_in_doubt_is_drawn_and_tabled_to_the_largest_size_only(tmp_path):
    out = write_study(
        tmp_path / "s", models=("resnet18",), fractions=(0.0625, 0.125, 0.25, 0.5, 1.0), lesions=60, resamples=20
    )
    edit_results(out, "resnet18_f1_*", lambda result: result["test"]["balanced_accuracy"].update(value=0.2))
    one, page = compose_folder(out)
    fitted = one.curves["balanced_accuracy"]["resnet18"]
    assert fitted["doubts"] and fitted["band"][-1]["n"] == pytest.approx(fitted["curve"]["n_max"])
    chart = next(c for c in charts(one) if c.name == "curves-balanced_accuracy")
    assert 'class="beyond"' not in chart.pictures[0].svg()
    assert "A curve in doubt ends at the largest measured size." in chart.caption and chart.more is not None
    (row,) = chart.more.rows
    assert (row[1], row[3]) == ("–", "–") and "in doubt: " in row[-1]
    assert "nothing is predicted beyond the data" in words(page)


def test_a_model_is_not_better_than_its_twin(tmp_path):
    out = write_study(tmp_path / "s", models=("resnet18",), fractions=(1.0,), seeds=(0, 1), lesions=120)
    for seed in (0, 1):
        twin = out / "cells" / f"alexnet_f1_s{seed}_u{seed}"
        shutil.copytree(out / "cells" / f"resnet18_f1_s{seed}_u{seed}", twin)
        for name in ("config", "result"):
            content = json.loads((twin / f"{name}.json").read_text())
            (twin / f"{name}.json").write_text(json.dumps(content | {"model": "alexnet"}))
    text = told(analysed(out))
    assert "There is no clear difference from" in text and "is better than" not in text


def test_equal_steps_and_few_runs_are_named(tmp_path):
    out = write_study(tmp_path / "s", fractions=(0.25, 1.0), seeds=(0,), lesions=80, budget="steps")
    one, page = compose_folder(out)
    for words_of_doubt in ("same number of optimizer steps", "Some cells have 1 run", "trained networks"):
        assert words_of_doubt in told(one)
    assert "No curve was fitted" in told(one) and "interaction cannot be separated from the seed" in words(page)


def test_seeds_that_meet_several_subsets_are_counted_as_such(tmp_path):
    out = write_study(tmp_path / "s", fractions=(0.5,), seeds=(0, 1), subset_seeds=(0, 1), lesions=60, resamples=20)
    one, page = compose_folder(out)
    text = told(one)
    assert "8 runs of 2 models" in text and "with 2 seeds and 2 subset seeds" in text
    assert "(2 seeds and 2 subset seeds: " in text and "4 seeds" not in text
    assert "4 pairs of runs share 2 subset seeds and 2 seeds" in words(page)


def test_a_study_without_spread_says_that_there_is_nothing_to_share_out(tmp_path):
    out = write_study(tmp_path / "s", fractions=(0.5, 1.0), seeds=(0, 1), lesions=60)
    # runs that call everything by one class
    edit_results(out, "*", lambda result: result["test"]["balanced_accuracy"].update(value=1 / 7))
    one, page = compose_folder(out)
    assert "all 8 runs have the same balanced_accuracy (0.143), so there is nothing to share out" in words(page)
    assert "in this grid" not in told(one) and "What macro AUC depends on" in words(page)


def test_a_split_by_image_is_announced_first_and_images_without_lesions_are_a_doubt(tmp_path):
    more = {"models": ("resnet18",), "fractions": (1.0,), "seeds": (0,), "unit": "image", "with_lesions": False}
    one, page = compose_folder(write_study(tmp_path / "s", lesions=80, **more))
    header = page[page.index("<header>") : page.index("</header>")]
    assert "Split by image" in header and "too high" in header
    assert "names no lesions" in told(one)


# ------------------------------------------------------------------ one cell or many; what cannot be reported


def test_one_run_folder_is_a_report_too(single, tmp_path):
    one, page = compose_folder(single)
    assert len(one.study.runs) == 1 and "1 run of 1 model" in words(page)
    assert "Which classes are confused" in page and "with 500 images" in words(page)
    assert "predictions for the balanced prior" in results_table(one).head[0]
    seen, console = browse(page, tmp_path, width=500)
    assert_drawn(seen, console, sum(len(chart.pictures) for chart in charts(one)))


def test_a_metric_that_no_run_has_is_left_out(tmp_path):
    out = write_study(tmp_path / "s", fractions=(0.5, 1.0), seeds=(0, 1), lesions=60)
    unknown = {"value": None, "low": None, "high": None}
    edit_results(out, "*", lambda result: result["test"].update(balanced_accuracy=unknown))
    one, page = compose_folder(out)
    drawn = {chart.name: chart for chart in charts(one)}
    assert {"curves-macro_auc", "forest-macro_auc", "recall"} < set(drawn)
    assert not {"curves-balanced_accuracy", "cost"} & set(drawn)
    assert all(chart.table.rows for chart in drawn.values()) and "None" not in told(one)
    assert "Results at the largest fraction" in page


@pytest.mark.slow
def test_a_study_of_hundreds_of_cells_is_a_page_with_a_learning_curve_of_each_model(tmp_path):
    models, fractions = (*EIGHT, "convnext_tiny"), tuple(0.5**i for i in range(7))
    out = write_study(tmp_path / "s", models=models, fractions=fractions, lesions=30, resamples=10)
    one, page = compose_folder(out)
    assert "189 runs of 9 models" in words(page) and one.study.models == list(models)
    assert page.count('<svg class="chart" id="curve-balanced_accuracy-') == 9
    assert page.count('<svg class="chart wide" id="curve-balanced_accuracy"') == 1
    assert all(len(by_fraction) == 7 for by_fraction in one.sizes.values())
    assert {len(size.runs) for by_fraction in one.sizes.values() for size in by_fraction} == {3}
    assert "speed" in page and len(page) < 1_700_000
    ps = [pair["metrics"]["balanced_accuracy"] for pair in one.differences]
    assert len(ps) == 36 and all(p["p_holm"] >= p["p"] for p in ps)


def test_runs_of_different_sets_do_not_share_a_report(tmp_path):
    out = write_study(tmp_path / "s", models=("resnet18",), fractions=(1.0,), seeds=(0, 1), lesions=60)
    edit_results(out, "resnet18_f1_s1_u1", lambda result: result.update(shard_set_sha256="cd" * 32))
    with pytest.raises(DataError, match="2 different shard sets"):
        study_data.read(out)


def run_folders(out: Path, **runs: Config) -> Path:
    """A folder of run folders without a grid."""
    test = made_test_set(np.random.default_rng(2), 60)
    for name, config in runs.items():
        write_run(out / name, config, round(2000 * config.fraction), test, resamples=20)
    return out


PLAIN = Config(model="resnet18", resolution=64, epochs=12)


def test_run_folders_that_differ_in_model_fraction_seed_and_batch_share_a_report(tmp_path):
    small = replace(PLAIN, fraction=0.25, batch_size=32)
    alex = replace(PLAIN, model="alexnet", lr=0.01)
    out = run_folders(tmp_path, a=PLAIN, b=replace(PLAIN, seed=1), c=small, d=alex)
    assert len(study_data.read(out).runs) == 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"epochs": 30}, "epochs: 12, and 30"),
        ({"start_resolution": 32}, "start_resolution: None, and 32"),
        ({"loss": "plain"}, "loss: logit-adjusted, and plain"),
        ({"normalize": "half"}, "normalize: auto, and half"),
        ({"sampler": "balanced"}, "sampler: None, and balanced"),
        ({"mixup": 0.2, "symmetries": False}, "symmetries: True, and False; mixup: None, and 0.2"),
    ],
    ids=["epochs", "ramp", "loss", "normalisation", "sampler", "recipe"],
)
def test_run_folders_with_different_settings_are_no_seeds_of_each_other(tmp_path, change, told):
    out = run_folders(tmp_path, one=PLAIN, two=replace(PLAIN, seed=1, **change))
    with pytest.raises(
        DataError, match=rf"one and .*two were trained with different settings \({told}\), so they cannot be compared"
    ):
        study_data.read(out)


def test_the_same_cell_twice_is_refused_and_models_may_have_weights_of_their_own(tmp_path):
    tuned = replace(PLAIN, weights="a.safetensors")
    out = run_folders(tmp_path, a=tuned, b=replace(tuned, model="alexnet", weights="b.safetensors"))
    assert study_data.read(out).models == ["alexnet", "resnet18"]  # all start alike
    run_folders(tmp_path, c=tuned)
    with pytest.raises(DataError, match=r"a and .*c are both resnet18 on fraction 1 with seed 0 and subset seed 0"):
        study_data.read(out)


@pytest.mark.parametrize("what", ["missing", "empty", "{", "{}", "unfinished"])
def test_what_cannot_be_reported_ends_in_one_line(tmp_path, what):
    out = tmp_path / "s"
    if what != "missing":
        out.mkdir()
    if what.startswith("{"):  # a damaged result
        write_run(out / "run", Config(model="resnet18"), 500, made_test_set(np.random.default_rng(2), 60))
        (out / "run" / "result.json").write_text(what)
    if what == "unfinished":
        (out / "study.json").write_text(json.dumps({"version": 1, "settings": {}}))
    done = command(str(out))
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert str(out) in done.stderr and not (out / "report.html").exists()


# ------------------------------------------------------------------ tiles


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
        assert f"{one['image_id']}: {one['true']} classified as {one['called']}" in page
    assert "CC BY-NC" in page
    seen, console = browse(page, tmp_path)
    assert not console and len(seen["images"]) == len(wrong) and min(seen["images"]) > 50


def test_tiles_of_another_set_are_refused(tiny_shards, single):
    done = command(str(single), "--resamples", "200", "--tiles", "3", "--data", str(tiny_shards))
    assert done.returncode == 2 and "not the shard set" in done.stderr


# ------------------------------------------------------------------ as real runs are


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


def test_several_folders_are_one_study_and_a_model_has_a_curve_for_each_start(tmp_path):
    tuned = replace(PLAIN, weights="a.safetensors")
    sizes = {"a": 0.25, "b": 0.5, "c": 1.0}
    folders = [
        run_folders(tmp_path / name, **{cell: replace(config, fraction=size) for cell, size in sizes.items()})
        for name, config in {"scratch": PLAIN, "tuned": tuned, "frozen": replace(tuned, freeze=True)}.items()
    ]
    study = study_data.read(*folders)
    assert study.models == ["resnet18", "resnet18, fine-tuned", "resnet18, frozen"] and len(study.runs) == 9
    assert len({study.series(model) for model in study.models}) == 3
    one = analysis.analyse(study, resamples=200)
    assert len(one.differences) == 3 and all(model in told(one) for model in study.models)
    assert "times the computation" not in told(one)  # of one network
    with pytest.raises(DataError, match="nothing: no such folder"):
        study_data.read(folders[0], tmp_path / "nothing")
    with pytest.raises(DataError, match=r"a and .*a are both resnet18 on fraction 0\.25"):
        study_data.read(folders[0], folders[0])
