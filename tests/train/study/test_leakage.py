"""The leakage experiment: two training sets that differ in nothing but views of test lesions, and what comes of it."""

import json
import subprocess
import sys
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest

from shards import ShardSet
from shards.common.errors import DataError
from shards.format import CLASSES, EncodeSpec
from shards.jpeg import encode_jpeg
from shards.writer import PackedSample, ShardSetWriter
from tests.conftest import picture
from tests.support.made_study import made_leakage, write_leakage, write_run, write_study
from train.config import Config
from train.study import analysis
from train.study import runs as study_data
from train.study.cells import Cell
from train.study.leakage import ARMS, arms, measure, sentences, write_arm
from train.study.report.charts import charts
from train.study.report.page import compose

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def by_image(tmp_path_factory) -> Path:
    """A set split by image: lesions of three views, dealt to the splits view by view."""
    out = tmp_path_factory.mktemp("sets") / "by-image"
    rng = np.random.default_rng(0)
    with ShardSetWriter(out, EncodeSpec(), 1 << 20) as writer:
        for split in ("train", "val", "test"):
            for number in range(210):
                lesion = number // 3
                if ("test", "train", "train" if lesion % 2 else "val")[number % 3] != split and lesion % 5 > 1:
                    continue
                if lesion % 5 <= 1 and split != "train":  # two of five lesions are in training alone
                    continue
                label = lesion % 7
                metadata = {
                    "image_id": f"IMG_{number:05d}",
                    "lesion_id": f"LES_{lesion:03d}",
                    "dx": CLASSES[label],
                    "dx_type": "histo",
                    "age": None if number % 9 == 0 else 50.0,
                    "sex": "unknown",
                    "localization": "back",
                    "dataset": None,
                }
                writer.add(PackedSample(encode_jpeg(picture(rng, label, 40, 48)), "jpg", 40, 48, split, metadata))
        writer.finish(
            mean=(0.7, 0.55, 0.5),
            std=(0.2, 0.2, 0.2),
            split={"ratio": [50, 15, 35], "seed": 0, "unit": "image"},
            source={"dataset": "test pictures"},
            citation="none",
            licence="none",
            versions={},
        )
    return out


def chosen(data: ShardSet) -> dict[str, np.ndarray]:
    columns = [data.column("split"), data.column("label"), data.lesion_names, data.column("image_id")]
    return arms(*columns, data.manifest.classes)


def test_the_arms_have_one_size_in_every_class_and_differ_in_views_of_test_lesions(by_image):
    with ShardSet(by_image) as data:
        rows = chosen(data)
        tested = set(data.lesion_names[data.column("split") == "test"].tolist())
        assert not tested & set(data.lesion_names[rows["apart"]].tolist())
        shared = [lesion in tested for lesion in data.lesion_names[rows["leaky"]].tolist()]
        assert any(shared)
        for arm in ARMS:
            assert set(data.column("split")[rows[arm]]) == {"train"}
            assert len(set(rows[arm].tolist())) == len(rows[arm]) and (np.diff(rows[arm]) > 0).all()
        counts = [np.bincount(data.column("label")[rows[arm]], minlength=7).tolist() for arm in ARMS]
        assert counts[0] == counts[1]
        training = data.column("split") == "train"
        for label in range(7):  # the leaky arm takes the views of test lesions before any other image
            mine = training & (data.column("label") == label)
            views = sum(lesion in tested for lesion in data.lesion_names[mine].tolist())
            taken = sum(s for s, x in zip(shared, data.column("label")[rows["leaky"]], strict=True) if x == label)
            assert taken == min(views, counts[0][label])


def test_the_arms_do_not_depend_on_the_order_of_rows(by_image):
    with ShardSet(by_image) as data:
        columns = [data.column("split"), data.column("label"), data.lesion_names, data.column("image_id")]
        there = arms(*columns, data.manifest.classes)
        turned = arms(*(c[::-1] for c in columns), data.manifest.classes)
        names = data.column("image_id")
        for arm in ARMS:
            assert set(names[there[arm]]) == set(names[::-1][turned[arm]])


def test_a_class_without_other_lesions_is_refused():
    split = np.array(["train", "test", "train"], dtype=object)
    with pytest.raises(DataError, match="class bcc"):
        arms(split, np.array([1, 1, 0]), np.array(["a", "a", "b"]), np.array(["x", "y", "z"]), CLASSES)


def test_the_sets_of_the_arms_hold_the_same_tests_and_the_same_bytes(by_image, tmp_path):
    with ShardSet(by_image) as data:
        rows = chosen(data)
        bytes_of = {str(name): bytes(data.read(i)) for i, name in enumerate(data.column("image_id"))}
        for arm in ARMS:
            write_arm(data, rows[arm], arm, tmp_path / arm)
            with ShardSet(tmp_path / arm) as found:
                train, test = found.select("train"), found.select("test")
                assert set(train.image_ids) == set(data.column("image_id")[rows[arm]])
                assert set(test.image_ids) == set(data.select("test").image_ids)
                for i in [*train.samples[:5], *test.samples[:5]]:
                    assert bytes(found.read(i)) == bytes_of[str(found.column("image_id")[i])]
                assert found.manifest.split["unit"] == "image" and found.manifest.split["arm"] == arm
                assert all(not wrong for _, wrong in found.verify())
        stamp = (tmp_path / "leaky" / "manifest.json").stat().st_mtime_ns
        write_arm(data, rows["leaky"], "leaky", tmp_path / "leaky")
        assert (tmp_path / "leaky" / "manifest.json").stat().st_mtime_ns == stamp


def test_the_gain_is_measured_in_pairs_and_shown_in_the_report(by_image, tmp_path):
    class Folder:
        def cell(self, name: str) -> Path:
            return tmp_path / "runs" / name

    with ShardSet(by_image) as data:
        rows = chosen(data)
        test = data.select("test")
        names = (test.labels, test.lesion_ids.astype(str), test.image_ids.astype(str))
        cells = []
        for arm, images in (("leaky", 5000), ("apart", 60)):  # skill grows with the size, so the gain is above 0
            for seed in (0, 1):
                cell = Cell(replace(Config(model="resnet18"), seed=seed), images, 10, prefix=f"{arm}_")
                write_run(Folder().cell(cell.name), cell.config, images, names)
                cells.append(cell)
        result = measure(data, rows, cells, Folder())
    assert result["all"]["balanced_accuracy"]["difference"]["value"] > 0
    assert result["test_images"]["all"] == result["test_images"]["seen"] + result["test_images"]["unseen"]
    assert result["all"]["accuracy"]["runs"] == 2
    study = write_study(tmp_path / "study", models=("resnet18",), fractions=(1.0,), seeds=(0,), lesions=60)
    made = write_leakage(study)  # which the report is tested on elsewhere
    assert set(made) == set(result) and set(made["all"]["accuracy"]) == set(result["all"]["accuracy"])
    (study / "leakage" / "leakage.json").write_text(json.dumps(result))
    found = analysis.analyse(study_data.read(study), resamples=200)
    page = compose(found, charts(found))
    assert "What a split by image gains falsely" in page and 'id="leakage-balanced_accuracy"' in page
    for sentence in sentences(result):
        assert escape(sentence) in page


FIRST = (
    "Trained on as many images, but with views of the test lesions among them, resnet18 scores {} points ({} points to "
    "{} points, p = 0.010) in balanced accuracy on the same 2,000 test images ({} seed{})."
)
SEEN = (
    "On the 800 test images with views in training the difference is +12.0 points (+9.0 points to +16.0 points, "
    "p = 0.010)."
)
UNSEEN = (
    "On the 1,200 without any, where nothing can leak, it is {} points ({} points to {} points, p = 0.010)"
).format


def test_a_clear_gain_with_a_control_of_none_is_what_the_split_gains():
    assert sentences(made_leakage()) == [
        FIRST.format("+5.0", "+2.0", "+9.0", 2, "s"),
        "This is how much a split by image inflates the score.",
        SEEN,
        UNSEEN("-1.0", "-4.0", "+3.0") + ".",
    ]


def test_a_gain_whose_interval_contains_0_is_not_called_one():
    assert sentences(made_leakage(every=0.015, seeds=1)) == [
        FIRST.format("+1.5", "-1.5", "+5.5", 1, ""),
        "The interval contains 0, so this experiment cannot show a gain.",
        "This compares two trained networks; other seeds may give another difference.",
        SEEN,
        UNSEEN("-1.0", "-4.0", "+3.0") + ".",
    ]


def test_networks_that_differ_where_nothing_leaks_are_not_the_leak():
    lines = sentences(made_leakage(unseen=0.04))
    assert (
        lines[-1]
        == UNSEEN("+4.0", "+1.0", "+8.0") + ": part of the difference comes from the networks and not from the leak."
    )
    assert not any("inflates" in line for line in lines)


def test_a_loss_is_no_gain_and_groups_without_images_are_named_or_left_out():
    lines = sentences(made_leakage(every=-0.06) | {"seen": None, "unseen": None})
    assert lines[1:] == [
        "It scores lower, so this experiment shows no gain.",
        "Every test image has views in training, so there is no control.",
    ]
    nothing = made_leakage()
    nothing["all"]["balanced_accuracy"]["difference"] = {"value": None, "low": None, "high": None}
    assert sentences(nothing) == []


def test_a_set_that_was_split_by_lesion_is_refused(tiny_shards, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "train.leakage", "--data", str(tiny_shards), "--out", str(tmp_path / "x")],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and "--split-unit image" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "x").exists()
