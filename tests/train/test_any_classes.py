"""Sets whose classes are not HAM10000's: packed, trained, measured, reported and used for new images."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as sk

from shards import ShardSet
from shards.format import HAM10000, INDEX, INDEX_TYPES, Classes
from tests.conftest import write_set
from tests.support.parity import change_manifest
from tests.support.train_runs import small
from train import predict
from train.loop import train_once
from train.metrics.run_metrics import evaluate, flatten
from train.study.analysis import analyse, confusion
from train.study.report.charts import charts
from train.study.report.page import compose
from train.study.runs import read

TWO = Classes(("benign", "mole/other"), {"benign": "not cancer"}, {"suspect": ("mole/other",)})


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a set of two classes."""
    folder = tmp_path_factory.mktemp("binary")
    train_once(small(write_set(folder / "set", classes=TWO)), folder / "run")
    return folder / "run"


def test_a_set_of_version_1_has_the_classes_of_ham10000(tiny_shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "set"))
    names = list(HAM10000.names)
    change_manifest(folder, lambda m: (m.update(format_version=1, classes=names), m.pop("group")))
    pq.write_table(pq.read_table(folder / INDEX).drop_columns(["group"]), folder / INDEX)
    digest = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
    change_manifest(folder, lambda m: m.update(index_sha256=digest))
    assert np.array_equal(ShardSet(folder).column("group"), ShardSet(tiny_shards).column("group"))
    old, new = ShardSet(folder).manifest, ShardSet(tiny_shards).manifest
    assert old.classes == new.classes == HAM10000 and old.group == ("lesion_id",) and old.counts == new.counts


def test_an_index_of_up_to_256_classes_has_the_columns_of_version_1_and_more_have_wider_labels(tmp_path: Path) -> None:
    for count, kind in ((256, "uint8"), (257, "uint16")):
        classes = Classes(tuple(f"c{n}" for n in range(count)))
        data = ShardSet(write_set(tmp_path / str(count), images=600, size=(8, 8), classes=classes))
        found = {field.name: str(field.type).replace("float", "float32") for field in data.table.schema}
        assert found == INDEX_TYPES | {"label": kind}
        assert data.column("label").max() == count - 1 and "more classes" in data.manifest.table()


def test_two_classes_are_trained_measured_and_reported(binary: Path) -> None:
    result = json.loads((binary / "result.json").read_text())
    table = pd.read_parquet(binary / "predictions.parquet")
    test = table[table["split"] == "test"]
    truth, score = test["label"] == 1, test["prob_mole/other"]
    assert result["test"]["suspect_auc"]["value"] == pytest.approx(sk.roc_auc_score(truth, score), abs=1e-6)
    called = np.where(score >= 0.5, 1, 0)
    assert result["test"]["suspect_sensitivity"]["value"] == pytest.approx(sk.recall_score(test["label"], called))
    assert not [key for key in result["test"] if key.startswith(("malignant", "melanoma"))]
    assert list(result["training_images_per_class"]) == list(TWO.names)
    study = read(binary)
    assert study.runs[0].classes == TWO
    found = analyse(study, resamples=20)
    html = compose(found, charts(found))
    assert "suspect AUC" in html and "melanoma" not in html and "malignant" not in html


def test_two_classes_are_predicted(binary: Path, tmp_path: Path, command) -> None:
    import cv2

    cv2.imwrite(str(tmp_path / "one.png"), np.full((40, 50, 3), 90, np.uint8))
    options = ("--run", binary, tmp_path / "one.png", "--device", "cpu")
    code, out, err = command(predict.main, *options, "--json")
    assert code == 0, err
    assert set(json.loads(out)["images"][0]["probabilities"]) == set(TWO.names)
    code, out, _ = command(predict.main, *options, "--isic")
    assert (code, out.splitlines()[0]) == (0, "image,benign,mole/other")


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_up_to_a_thousand_classes_are_measured(count: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(count), 2)
    logits = rng.normal(size=(labels.size, count))
    logits[np.arange(labels.size), labels] += 4
    classes = Classes(tuple(f"c{n}" for n in range(count)), {}, {"first": ("c0", "c1")})
    options = {"prior": "balanced", "logits_prior": "balanced", "training_prior": np.ones(count)}
    result = evaluate(logits, labels, None, split=["test"] * labels.size, resamples=20, classes=classes, **options)
    json.dumps(result, allow_nan=False)
    called = logits.argmax(axis=1)
    assert result["balanced_accuracy"]["value"] == pytest.approx(sk.balanced_accuracy_score(labels, called))
    counts = np.zeros((count, count), int)
    for true, other, images in result["confusion_matrix"]["pairs"]:
        counts[true, other] = images
    assert np.array_equal(counts, sk.confusion_matrix(labels, called))
    assert "rates" not in result["confusion_matrix"]  # 1,000 resamples of a million cells do not fit into memory
    assert {"first_auc", "recall_c59_high", "balanced_accuracy_low"} <= flatten(result).keys()


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_set_of_many_classes_is_trained_and_its_report_can_be_read(count: int, tmp_path: Path) -> None:
    classes = Classes(tuple(f"c{n}" for n in range(count)))
    data = write_set(tmp_path / "set", images=2 * count, size=(16, 16), shares=(0.5, 0.25, 0.25), classes=classes)
    train_once(small(data, epochs=1), tmp_path / "run")
    assert (tmp_path / "run" / "result.json").stat().st_size < 6000 * count
    found = analyse(read(tmp_path / "run"), resamples=200)
    drawn = {chart.name: chart for chart in charts(found)}
    confused, recalls = drawn["confusion"], drawn["recall"]
    assert not confused.pictures and confused.more and len(recalls.pictures) == 20
    names, counts = confusion(found.study.runs)
    wrong = counts - np.diag(np.diag(counts))
    assert int(confused.table.rows[0][3]) == wrong.max() and len(confused.table.rows) == len(confused.more.rows) == 20
    assert confused.more.rows[0][3] == "0.0 %" and set(row[1] for row in confused.more.rows) <= set(names)
    page = compose(found, list(drawn.values()))
    assert page.count("<details open>") == 2 and len(page) < 2_000_000
