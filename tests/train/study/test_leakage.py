"""The leakage experiment: two training sets that differ in nothing but views of test lesions, and what comes of it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards import ShardSet
from shards.common.errors import DataError
from shards.format import HAM10000, EncodeSpec
from shards.writer import ShardSetWriter
from tests.conftest import finish_set, picture, write_sample
from tests.support.made_study import made_leakage, write_leakage, write_run, write_study
from train.config import Config
from train.study.cells import Cell
from train.study.leakage import ARMS, arms, measure, sentences, write_arm

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
                write_sample(writer, number, f"LES_{lesion:03d}", label, split, picture(rng, label, 40, 48))
        finish_set(writer, "image")
    return out


def chosen(data: ShardSet) -> dict[str, np.ndarray]:
    columns = [data.column("split"), data.column("label"), data.lesion_names, data.column("image_id")]
    return arms(*columns, data.manifest.classes.names)


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
        there = arms(*columns, data.manifest.classes.names)
        turned = arms(*(c[::-1] for c in columns), data.manifest.classes.names)
        names = data.column("image_id")
        for arm in ARMS:
            assert set(names[there[arm]]) == set(names[::-1][turned[arm]])


def test_a_class_without_other_lesions_is_refused():
    split = np.array(["train", "test", "train"], dtype=object)
    with pytest.raises(DataError, match="class bcc"):
        arms(split, np.array([1, 1, 0]), np.array(["a", "a", "b"]), np.array(["x", "y", "z"]), HAM10000.names)


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


CANNOT = "The interval contains 0, so this experiment cannot show a gain on all test images."
NO_CONTROL = made_leakage(every=-0.06) | {"seen": None, "unseen": None}


@pytest.mark.parametrize(
    ("result", "conclusion", "control"),
    [
        (made_leakage(), "This is how much a split by image inflates the score.", "-1.0 points (-4.0 points to"),
        (made_leakage(every=0.015), CANNOT, "So the leak raises the score of the images that have views in training."),
        (made_leakage(every=0.015, seen=0.02), CANNOT, "-1.0 points"),
        (made_leakage(unseen=0.04), None, "part of the difference comes from the networks and not from the leak."),
        (NO_CONTROL, "It scores lower, so this experiment shows no gain.", "so there is no control."),
    ],
    ids=["a gain", "a gain of some", "no clear gain", "a difference where nothing leaks", "a loss, and no control"],
)
@pytest.mark.parametrize("seeds", [1, 2])
def test_what_the_split_gains_is_concluded_from_the_interval_and_its_control(result, conclusion, control, seeds):
    cell = result["all"]["balanced_accuracy"] | {"includes_seeds": seeds > 1}
    lines = sentences(result | {"all": {"balanced_accuracy": cell}, "seeds": list(range(seeds))})
    gap = cell["difference"]
    ends = f"{100 * gap['low']:+.1f} points to {100 * gap['high']:+.1f} points"
    assert f"{100 * gap['value']:+.1f} points ({ends}, p = 0.010)" in lines[0]
    concluded = [line for line in lines if "this experiment" in line or "inflates" in line]
    assert concluded == ([conclusion] if conclusion else [])
    assert any("other seeds may give another" in line for line in lines) == (seeds == 1)
    assert any("with views in training the difference is" in line for line in lines) == (result["seen"] is not None)
    assert control in lines[-1]


def test_an_undefined_gain_says_nothing():
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
