"""Synthetic folders: layout, imbalance, determinism, and that they can be learned from, less so when difficult."""

import csv
import itertools
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import synthetic
from preprocess.ham10000 import read_source
from preprocess.phantom.appearance import LOOKS, draw_lesion
from preprocess.phantom.camera import photograph
from preprocess.phantom.paint import paint_lesion
from shards.common.errors import DataError, UsageError
from shards.common.files import exclusive
from shards.format import HAM10000


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "HAM10000_metadata.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "folder"
    synthetic.write_folder(out, images=60, seed=3, difficulty=0.5, workers=2)
    return out


@given(images=st.integers(synthetic.LEAST_IMAGES, 20_000))
@settings(max_examples=60, deadline=None)
def test_counts_add_up_and_every_class_can_be_split(images):
    counts = synthetic.class_counts(images)
    assert tuple(counts) == HAM10000.names
    assert sum(count for _, count in counts.values()) == images
    assert all(3 <= lesions <= count for lesions, count in counts.values())
    if images >= 140:
        assert min(lesions for lesions, _ in counts.values()) >= 10
    assert max(counts, key=lambda dx: counts[dx][1]) == "nv"


def test_large_folders_have_the_imbalance_of_ham10000():
    counts = synthetic.class_counts(10_015)
    official = {"akiec": 327, "bcc": 514, "bkl": 1099, "df": 115, "mel": 1113, "nv": 6705, "vasc": 142}
    assert {dx: images for dx, (_, images) in counts.items()} == official
    assert sum(lesions for lesions, _ in counts.values()) == pytest.approx(7_470, abs=5)


@given(images=st.integers(synthetic.LEAST_IMAGES, 3_000), seed=st.integers(0, 2**70))
@settings(max_examples=25, deadline=None)
def test_the_plan_names_every_image_once_and_keeps_lesions_of_one_class(images, seed):
    lesions = synthetic.unpainted_lesions(images, seed)
    rows = [row for lesion in lesions for row in lesion.rows]
    assert len({row["image_id"] for row in rows}) == len(rows) == images
    assert len({lesion.rows[0]["lesion_id"] for lesion in lesions}) == len(lesions)
    for lesion in lesions:
        assert len({(row["lesion_id"], row["dx"], row["age"], row["localization"]) for row in lesion.rows}) == 1
        assert 1 <= len(lesion.rows) <= 6
    assert Counter(row["dx"] for row in rows) == {dx: n for dx, (_, n) in synthetic.class_counts(images).items()}
    assert lesions == synthetic.unpainted_lesions(images, seed)


def test_several_views_are_as_frequent_as_in_ham10000():
    views = Counter(len(lesion.rows) for lesion in synthetic.unpainted_lesions(10_015, 0))
    assert sum(n for v, n in views.items() if v > 1) == pytest.approx(1_956, rel=0.12)


def test_the_folder_is_in_the_official_layout(folder):
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["HAM10000_images_part_1", "HAM10000_images_part_2", "HAM10000_metadata.csv"]
    rows = rows_of(folder)
    official = ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization", "dataset"]
    assert list(rows[0]) == official
    assert len(rows) == 60
    parts = [sorted(p.stem for p in (folder / part).iterdir()) for part in names[:2]]
    assert len(parts[0]) == len(parts[1]) == 30
    assert sorted(parts[0] + parts[1]) == sorted(row["image_id"] for row in rows)
    for path in folder.glob("*/*.jpg"):
        content = path.read_bytes()
        assert simplejpeg.decode_jpeg_header(content)[:3] == (450, 600, "YCbCr")
        assert simplejpeg.decode_jpeg(content, strict=True).std() > 5
    source = read_source(folder)
    assert len(source.records) == 60 and not source.rejected and not source.warnings
    assert source.about["dataset"] == "synthetic"


def test_files_do_not_depend_on_the_number_of_workers_and_do_on_the_seed(folder, tmp_path):
    alone, other = tmp_path / "alone", tmp_path / "other"
    synthetic.write_folder(alone, images=60, seed=3, difficulty=0.5, workers=1)
    assert files_of(alone) == files_of(folder)
    synthetic.write_folder(other, images=60, seed=4, difficulty=0.5, workers=3)
    first, second = files_of(other), files_of(folder)
    assert all(first[name] != second[name] for name in first)


def test_opencv_keeps_its_number_of_threads(tmp_path):
    before = cv2.getNumThreads()
    synthetic.write_folder(tmp_path / "out", images=40, seed=0, difficulty=0, workers=1)
    assert cv2.getNumThreads() == before


@pytest.mark.parametrize("dx", HAM10000.names)
def test_views_show_one_lesion_and_lesions_differ(dx):
    """The colours about the middle, free of pose: closer between two views of a lesion than between two lesions."""

    def colours(picture: np.ndarray) -> np.ndarray:
        centre = cv2.cvtColor(picture[145:305, 220:380], cv2.COLOR_RGB2HSV)
        hist = cv2.calcHist([centre], [0, 1, 2], None, [12, 8, 8], [0, 180, 0, 256, 0, 256])
        return cv2.GaussianBlur(hist.reshape(12, 64), (0, 0), 1).ravel() / centre[..., 0].size

    within = []
    for number in range(8):
        lesion = draw_lesion(np.random.default_rng(number), dx, 0.0)
        canvas = paint_lesion(lesion)
        within.append([colours(photograph(lesion, canvas, np.random.default_rng((number, view)))) for view in (0, 1)])
    gaps = [np.abs(a - b).sum() for a, b in within]
    between = [np.abs(a - b).sum() for (_, a), (b, _) in itertools.combinations(within, 2)]
    assert np.mean(gaps) < 0.8 * np.mean(between)


def test_every_class_looks_like_itself_when_nothing_is_difficult():
    """Bright magenta for vasc, dark and blue-grey for mel: the colour model must not wash the signs out."""

    def middle(dx: str) -> np.ndarray:
        pictures = []
        for number in range(12):
            lesion = draw_lesion(np.random.default_rng(number), dx, 0.0)
            picture = photograph(lesion, paint_lesion(lesion), np.random.default_rng((number, 1)))
            pictures.append(picture[195:255, 270:330].reshape(-1, 3).mean(0))
        return np.mean(pictures, 0)

    means = {dx: middle(dx) for dx in LOOKS}
    assert min(means, key=lambda dx: means[dx].sum()) == "mel"
    assert max(means, key=lambda dx: means[dx][0] - means[dx][1]) == "vasc"
    assert all(means["bkl"][2] < means[dx][2] for dx in ("akiec", "bcc", "df"))  # brown and dull, not pink


def balanced_accuracy(difficulty: float, lesions_per_class: int) -> float:
    """A linear classifier on colour histograms of the middle, one view a lesion, so that folds share no lesion."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def features(key: tuple[int, int]) -> np.ndarray:
        rng = np.random.default_rng(key)
        lesion = draw_lesion(rng, HAM10000.names[key[0]], difficulty)
        picture = cv2.resize(photograph(lesion, paint_lesion(lesion), rng), (75, 56), interpolation=cv2.INTER_AREA)
        lab = cv2.cvtColor(picture[8:48, 15:60], cv2.COLOR_RGB2LAB).reshape(-1, 3)
        bins = [np.histogram(lab[:, c], 12, span)[0] for c, span in enumerate(((0, 255), (110, 200), (100, 190)))]
        return np.concatenate([*bins, np.percentile(lab, [2, 10, 50, 90], axis=0).ravel()])

    keys = [(label, number) for label in range(len(HAM10000.names)) for number in range(lesions_per_class)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        table = np.stack(list(pool.map(features, keys)))
    labels = np.array([label for label, _ in keys])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return float(balanced_accuracy_score(labels, cross_val_predict(model, table, labels, cv=folds)))


@pytest.mark.slow
def test_it_can_be_learned_and_difficulty_makes_it_harder():
    easy, middle, hard = (balanced_accuracy(difficulty, 25) for difficulty in (0.0, 0.5, 1.0))
    chance = 1 / len(HAM10000.names)
    assert easy > middle + 0.05, (easy, middle, hard)
    assert middle > hard + 0.05, (easy, middle, hard)
    assert middle > chance + 0.2, (easy, middle, hard)  # well above chance
    assert easy < 0.97, (easy, middle, hard)  # and colour alone does not solve it, even when easy


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").write_text("keep")
    result = CliRunner().invoke(synthetic.main, ["--out", str(tmp_path)])
    assert isinstance(result.exception, DataError)
    assert "not empty" in str(result.exception)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_is_filled(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    result = CliRunner().invoke(synthetic.main, ["--out", str(out), "--images", "40"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "40 synthetic images" in result.output
    assert len(rows_of(out)) == 40
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_too_few_images_are_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match="at least 40"):
        synthetic.write_folder(tmp_path / "out", images=39, seed=0, difficulty=0.5, workers=1)
    assert not any(tmp_path.iterdir())


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic, "_write_lesion", full)
    with pytest.raises(OSError, match="No space"):
        synthetic.write_folder(tmp_path / "out", images=40, seed=0, difficulty=0.5, workers=2)
    assert not any(tmp_path.iterdir())


def test_what_a_killed_run_left_is_not_mixed_in(tmp_path):
    left = tmp_path / ".out.partial" / "HAM10000_images_part_1"
    left.mkdir(parents=True)
    (left / "SYN_9999999.jpg").write_bytes(b"half")
    synthetic.write_folder(tmp_path / "out", images=40, seed=0, difficulty=0.5, workers=1)
    assert len(list((tmp_path / "out").glob("*/*.jpg"))) == 40
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    with exclusive(tmp_path / ".out.partial", "writing"), pytest.raises(DataError, match="another process"):
        synthetic.write_folder(tmp_path / "out", images=40, seed=0, difficulty=0.5, workers=1)
