"""`python -m train.evaluate`: a run on its own test images and on other sets, several runs, the report's section."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sk

from shards.format import HAM10000, Classes, EncodeSpec
from shards.jpeg import encode_jpeg
from shards.writer import PackedSample, ShardSetWriter
from tests.conftest import finish_set, picture, write_set
from tests.support.parity import change_manifest
from tests.support.report_pages import assert_drawn, browse, compose_folder, told, words
from tests.support.train_runs import small
from train import evaluate, report
from train.loop import train_once
from train.study.elsewhere import read_elsewhere

PAD = Classes(("ACK", "BCC", "MEL", "NEV", "SCC", "SEK"))
"""As PAD-UFES-20."""


@pytest.fixture(scope="module")
def runs(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of a tiny network on the tiny set of HAM10000's classes."""
    folder = tmp_path_factory.mktemp("two")
    for seed in (0, 1):
        train_once(small(tiny_shards, seed=seed, epochs=1), folder / f"run{seed}")
    return [folder / "run0", folder / "run1"]


@pytest.fixture
def run(runs: list[Path], tmp_path: Path) -> Path:
    """A copy of the first run, so that results do not meet."""
    return Path(shutil.copytree(runs[0], tmp_path / "run"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set in other classes: 90 images of 45 patients, with sex and age, all in one split or another."""
    rng, out = np.random.default_rng(7), tmp_path_factory.mktemp("other") / "pad"
    with ShardSetWriter(out, EncodeSpec(), 1 << 20, classes=PAD) as writer:
        for number in range(90):
            patient, image = number // 2, picture(rng, number // 2 % 6, 50, 60)
            metadata = {
                "image_id": f"PAT_{number}",
                "lesion_id": f"L{number}",
                "group": f"P{patient}",
                "dx": PAD.names[patient % 6],
                "dx_type": None,
                "age": float(20 + patient),
                "sex": ("female", "male", None)[patient % 3],
                "localization": None,
                "dataset": None,
            }
            split = ("train", "val", "test")[patient // 15]
            writer.add(PackedSample(encode_jpeg(image), "jpg", 50, 60, split, metadata))
        finish_set(writer)
    return out


def result_of(folder: Path) -> tuple[dict, pd.DataFrame]:
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.parquet", "result.json"]
    return json.loads((folder / "result.json").read_text()), pd.read_parquet(folder / "predictions.parquet")


def test_on_its_own_test_images_a_run_gets_its_own_result(run, tiny_shards, command):
    code, out, err = command(evaluate.main, "--run", run, "--data", tiny_shards, "--device", "cpu")
    assert code == 0, err
    found, table = result_of(run / "elsewhere" / "tiny")
    own = json.loads((run / "result.json").read_text())["test"]
    for key in ("balanced_accuracy", "accuracy", "macro_f1", "per_class"):
        if key != "per_class":
            assert found["there"][key] == found["home"][key] == own[key]
    assert found["there"]["confusion_matrix"] == own["confusion_matrix"] and found["data"]["split"] == "test"
    stored = pd.read_parquet(run / "predictions.parquet").query("split == 'test'").set_index("image_id")
    columns = [f"prob_{name}" for name in HAM10000.names]
    np.testing.assert_allclose(table.set_index("image_id")[columns], stored.loc[table["image_id"], columns], atol=1e-6)
    assert out.splitlines()[-2].startswith("tiny: balanced accuracy ")
    code, _, err = command(evaluate.main, "--run", run, "--data", tiny_shards, "--split", "train", "--out", run / "x")
    assert code == 2 and "a run was trained on images of" in err and not (run / "x").exists()


def test_on_another_set_metrics_are_over_the_classes_that_both_have(run, other, command, tmp_path):
    asked = ("--run", run, "--data", other, "--map", "pad-ufes-20-ham10000", "--by", "sex,age:30:45")
    code, out, err = command(evaluate.main, *asked, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 0, err
    found, table = result_of(tmp_path / "out")
    assert out.endswith(f"{run}` shows only what is in {run / 'elsewhere'}\n")
    names = ["akiec", "bcc", "bkl", "mel", "nv"]
    assert found["classes"]["names"] == names and found["left_out"] == {
        "of_the_set": {"SCC": 14},
        "of_the_run": ["df", "vasc"],
        "seen_in_training": 0,
    }
    assert "left out, the network has no such class: SCC (14 images)" in out and "df, vasc; prob" in out
    assert len(table) == 76 and set(table["split"]) == {"train", "val", "test"}
    to = {"ACK": "akiec", "BCC": "bcc", "MEL": "mel", "NEV": "nv", "SEK": "bkl"}
    assert (table["dx"].map(to) == table["class"]).all()
    shares = table[[f"prob_{name}" for name in names]].to_numpy()
    called = np.array(names)[shares.argmax(axis=1)]
    there = found["there"]
    assert there["balanced_accuracy"]["value"] == pytest.approx(sk.balanced_accuracy_score(table["class"], called))
    sick = table["class"].isin(["akiec", "bcc", "mel"])
    danger = shares[:, [0, 1, 3]].sum(axis=1) / shares.sum(axis=1)
    assert there["malignant_auc"]["value"] == pytest.approx(sk.roc_auc_score(sick, danger))
    assert there["malignant_average_precision"]["value"] == pytest.approx(sk.average_precision_score(sick, danger))
    assert (there["lesions"], there["resampled"], there["images"]) == (38, "lesion", 76)  # patients, not lesions
    assert set(table["lesion_id"]) <= {f"P{patient}" for patient in range(45)}
    every = table[[f"prob_{name}" for name in HAM10000.names]].to_numpy()
    outside = np.isin(np.array(HAM10000.names)[every.argmax(axis=1)], ["df", "vasc"]).mean()
    assert found["called_left_out"] == pytest.approx(outside)
    sex, age = found["subgroups"]
    assert [group["value"] for group in sex["groups"]] == ["female", "male"] and sex["unknown"] > 0
    assert [group["value"] for group in age["groups"]] == ["under 30", "30 to under 45", "45 and more"]
    assert sum(group["images"] for group in age["groups"]) == 76
    home = pd.read_parquet(run / "predictions.parquet").query("split == 'test'")
    home = home[np.isin(np.array(HAM10000.names)[home["label"]], names)]
    right = np.array(names)[home[[f"prob_{n}" for n in names]].to_numpy().argmax(axis=1)]
    truth = np.array(HAM10000.names)[home["label"]]
    assert found["home"]["balanced_accuracy"]["value"] == pytest.approx(sk.balanced_accuracy_score(truth, right))


def test_a_network_of_seven_classes_is_tested_on_benign_and_malignant(run, other, command, tmp_path):
    asked = ("--run", run, "--data", other, "--map", "pad-ufes-20-malignant", "--map-run", "ham10000-malignant")
    assert command(evaluate.main, *asked, "--split", "test", "--out", tmp_path / "out", "--device", "cpu")[0] == 0
    found, table = result_of(tmp_path / "out")
    assert found["classes"]["names"] == ["benign", "malignant"] and found["left_out"]["of_the_set"] == {}
    danger = table[["prob_akiec", "prob_bcc", "prob_mel"]].sum(axis=1)
    truth = table["class"] == "malignant"
    there = found["there"]
    assert there["malignant_auc"]["value"] == pytest.approx(sk.roc_auc_score(truth, danger))
    flipped = sk.roc_auc_score(~truth, -danger, max_fpr=0.2)
    expected = 0.5 * 0.2**2 + (0.2 - 0.5 * 0.2**2) / 0.5 * (flipped - 0.5)  # as the challenge scales it
    assert there["malignant_partial_auc_above_80_sensitivity"]["value"] == pytest.approx(expected)


def test_without_a_map_equal_names_are_equal_classes(run, other, command, tmp_path):
    asked = ("--run", run, "--data", other, "--out", tmp_path / "out", "--device", "cpu")
    code, out, _ = command(evaluate.main, *asked)
    assert code == 0 and result_of(tmp_path / "out")[0]["labels"] == {"BCC": "bcc", "MEL": "mel"}
    assert "ACK (16 images), NEV (14 images), SCC (14 images), SEK (14 images); --map says what they are" in out


def test_several_runs_are_tested_as_the_mean_of_their_probabilities(runs, other, command, tmp_path):
    tables = []
    for number, chosen in enumerate(([runs[0]], [runs[1]], runs)):
        options = [part for one in chosen for part in ("--run", one)]
        asked = (*options, "--data", other, "--map", "pad-ufes-20-ham10000", "--out", tmp_path / str(number))
        assert command(evaluate.main, *asked, "--device", "cpu")[0] == 0
        tables.append(result_of(tmp_path / str(number)))
    code, _, err = command(evaluate.main, "--run", runs[0], *asked[:-1], tmp_path / "twice")
    assert code == 2 and err.endswith("one run is given twice; name each once\n")
    columns = [f"prob_{name}" for name in HAM10000.names]
    mean = (tables[0][1][columns] + tables[1][1][columns]) / 2
    np.testing.assert_allclose(tables[2][1][columns], mean, atol=1e-6)
    assert [run["seed"] for run in tables[2][0]["runs"]] == [0, 1] and tables[2][0]["home"]


def test_images_that_a_run_was_trained_on_are_left_out_with_their_lesions(run, tiny_shards, command, tmp_path):
    again = Path(shutil.copytree(tiny_shards, tmp_path / "again"))
    change_manifest(again, lambda manifest: manifest.update(licence="another set"))
    _other_index(again)
    code, out, err = command(evaluate.main, "--run", run, "--data", again, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 0, err
    found, table = result_of(tmp_path / "out")
    assert found["left_out"]["seen_in_training"] == 96 and set(table["split"]) == {"test"} and len(table) == 24
    assert "left out, the run was trained or tuned on them: 96 images" in out
    drawn = write_set(tmp_path / "drawn", size=(60, 60), shares=(0.2, 0.2, 0.6))  # the same names, other pictures
    code, out, _ = command(evaluate.main, "--run", run, "--data", drawn, "--out", tmp_path / "new", "--device", "cpu")
    assert code == 0 and result_of(tmp_path / "new")[0]["left_out"]["seen_in_training"] < 30


def _other_index(folder: Path) -> None:
    """Change a set's index so that it is another set with the same images."""
    import hashlib

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "index.parquet")
    place = table.column_names.index("localization")
    field = table.schema.field("localization")
    table = table.set_column(place, field, pa.array(["arm"] * len(table), field.type))
    pq.write_table(table, folder / "index.parquet")
    digest = hashlib.sha256((folder / "index.parquet").read_bytes()).hexdigest()
    change_manifest(folder, lambda manifest: manifest.update(index_sha256=digest))


@pytest.mark.parametrize("place", ["gone", "nostore://bucket/set"])
def test_where_the_runs_own_set_is_gone_a_warning_says_that_nothing_was_checked(run, other, command, tmp_path, place):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"data": place}))
    asked = ("--run", run, "--data", other, "--map", "pad-ufes-20-ham10000", "--out", tmp_path / "out")
    code, _, err = command(evaluate.main, *asked, "--device", "cpu")
    assert code == 0 and "was trained on images of this set cannot be checked (" in err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--map", "pad"), 2, "neither a file nor one of the maps that are here"),
        (("--map", "isic2019-ham10000"), 2, "says nothing about the label 'ACK'"),
        (
            ("--map", "pad-ufes-20-ham10000", "--by", "hair"),
            2,
            "--by hair: the set has no such column (it has image_id, ",
        ),
        (("--map", "pad-ufes-20-ham10000", "--by", "age:50:x"), 2, "--by age:50:x: name a column, and the ends"),
        (("--map", "pad-ufes-20-ham10000", "--by", "age:50:40"), 2, "the ends of bins as rising numbers"),
        (("--map", "pad-ufes-20-ham10000", "--by", "sex:40"), 2, "--by sex: no value of sex is a number"),
    ],
)
def test_what_cannot_be_tested_is_refused_in_one_line(options, code, message, run, other, command, tmp_path):
    asked = ("--run", run, "--data", other, "--out", tmp_path / "out", *options, "--device", "cpu")
    ended, _, err = command(evaluate.main, *asked)
    assert (ended, err.count("error: ")) == (code, 1) and message in err and not (tmp_path / "out").exists()


def test_a_set_without_labels_is_refused_in_one_line(run, command, tmp_path):
    with ShardSetWriter(tmp_path / "set", EncodeSpec(), 1 << 20, classes=Classes(())) as writer:
        metadata = dict.fromkeys(("lesion_id", "dx", "dx_type", "age", "sex", "localization", "dataset"))
        image = encode_jpeg(picture(np.random.default_rng(0), 0, 50, 60))
        writer.add(PackedSample(image, "jpg", 50, 60, "test", {"image_id": "A", **metadata}))
        finish_set(writer)
    code, _, err = command(evaluate.main, "--run", run, "--data", tmp_path / "set", "--device", "cpu")
    assert (code, err.count("error: ")) == (2, 1) and "has no labels" in err


def test_a_folder_that_holds_something_is_not_touched_and_one_that_fails_leaves_nothing(
    run, other, command, tmp_path, monkeypatch
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    asked = ("--run", run, "--data", other, "--map", "pad-ufes-20-ham10000", "--device", "cpu", "--out")
    code, _, err = command(evaluate.main, *asked, tmp_path / "out")
    assert code == 1 and "is there already" in err

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("train.inference.elsewhere.to_json", full)
    code, _, err = command(evaluate.main, *asked, tmp_path / "new")
    assert code == 1 and "disk is full" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_the_report_says_how_far_it_carries(run, other, tiny_shards, command, tmp_path):
    assert "How far it carries: not tested on other sets" in words(compose_folder(run)[1])
    asked = ("--run", run, "--device", "cpu", "--by", "sex,age:30:45", "--data")
    assert command(evaluate.main, *asked, other, "--map", "pad-ufes-20-ham10000")[0] == 0
    assert command(evaluate.main, *asked, tiny_shards)[0] == 0
    found, _ = compose_folder(run)
    assert [one["data"]["name"] for one in found.elsewhere] == ["pad", "tiny"]
    value = found.elsewhere[0]["there"]["balanced_accuracy"]["value"]
    assert f"On pad, test_resnet reaches a balanced accuracy of {100 * value:.1f} %" in told(found)
    assert command(report.main, run, "--out", tmp_path / "page.html", "--resamples", 200)[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "How far it carries" in page and "Subgroups on pad, test_resnet" in page and "SCC (14 images)" in page
    (run / "elsewhere" / "pad" / "result.json").write_text("{}")
    code, _, err = command(report.main, run, "--out", tmp_path / "page.html", "--resamples", 200)
    assert code == 1 and "is no result of a test on another set; move it away" in err


@pytest.mark.slow
def test_a_browser_draws_the_section(run, other, command, tmp_path):
    asked = ("--run", run, "--device", "cpu", "--by", "sex,age:30:45", "--data", other)
    assert command(evaluate.main, *asked, "--map", "pad-ufes-20-ham10000")[0] == 0
    command(report.main, run, "--out", tmp_path / "report.html", "--resamples", 200)
    page = (tmp_path / "report.html").read_text()
    for width in (400, 1100):
        assert_drawn(*browse(page, tmp_path, width=width), page.count("<svg"))


def test_nothing_is_read_where_no_set_was_tested(tmp_path):
    assert read_elsewhere([tmp_path]) == []
