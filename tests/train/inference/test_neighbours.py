"""Similar lesions: the nearest by the model's own features, each once, kept with the weights that they are of."""

import json
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from shards import ShardSet
from shards.common.errors import DataError
from train.inference.neighbours import FILE, Neighbours, training_selection
from train.inference.predictor import Predictor


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor(run, "cpu")


def compute(neighbours: Neighbours, stop_after: int = 1000) -> list[int]:
    seen: list[int] = []
    neighbours.compute(threading.Lock(), seen.append, lambda: len(seen) >= stop_after)
    return seen


def test_a_training_image_is_its_own_nearest_and_lesions_come_once(run, predictor, monkeypatch):
    (run / FILE).unlink(missing_ok=True)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "sklearn.neighbors", None)  # its import takes long: the start does without
        neighbours = Neighbours(predictor, run, training_selection(run))
    assert not neighbours.ready
    with pytest.raises(ValueError, match="not computed"):
        neighbours.nearest(np.ones(4), 3)
    selection = neighbours.selection
    assert compute(neighbours)[-1] == len(selection) and neighbours.ready
    for sample in selection.samples[::7]:
        square = predictor.cut(selection.data.pixels(int(sample))).square
        found = neighbours.nearest(predictor.features(square[None])[0], 5)
        assert found[0].sample == sample and found[0].cosine == pytest.approx(1, abs=1e-5)
        assert found[0].image_id == selection.data.column("image_id")[sample]
        assert found[0].dx == selection.data.column("dx")[sample]
        assert len({one.lesion_id for one in found}) == len(found)
        cosines = [one.cosine for one in found]
        assert cosines == sorted(cosines, reverse=True)


def test_the_nearest_lesions_are_those_of_a_plain_search(run, predictor):
    selection = training_selection(run)
    neighbours = Neighbours(predictor, run, selection)
    compute(neighbours)
    squares = np.stack([predictor.cut(selection.data.pixels(int(sample))).square for sample in selection.samples])
    features = predictor.features(squares).astype(np.float64)
    query = features[3] + features[11]
    cosines = features @ query / np.linalg.norm(features, axis=1) / np.linalg.norm(query)
    best: dict[str, float] = {}
    for lesion, cosine in zip(selection.lesion_ids, cosines, strict=True):
        best[lesion] = max(best.get(lesion, -1.0), cosine)
    expected = sorted(best.values(), reverse=True)[:4]
    assert [one.cosine for one in neighbours.nearest(query, 4)] == pytest.approx(expected, abs=1e-5)


def test_only_lesions_that_the_run_was_trained_on_are_compared(run):
    selection = training_selection(run)
    assert len(selection) < len(selection.data.select("train"))
    assert set(selection.data.column("split")[selection.samples]) == {"train"}


def test_features_are_kept_and_are_not_those_of_other_weights(run, predictor, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / FILE).unlink(missing_ok=True)
    selection = training_selection(copy)
    first = Neighbours(predictor, copy, selection)
    compute(first, stop_after=1)
    assert not first.ready and not (copy / FILE).exists()  # stopped: nothing half-computed is kept
    compute(first)
    again = Neighbours(predictor, copy, selection)
    assert compute(again) == [] and again.ready  # loaded
    query = predictor.features(np.zeros((1, *[predictor.about.resolution] * 2, 3), np.uint8))[0]
    assert again.nearest(query, 3) == first.nearest(query, 3)
    other = np.frombuffer((copy / "model.safetensors").read_bytes(), np.uint8).copy()
    other[-1] ^= 1
    (copy / "model.safetensors").write_bytes(other.tobytes())
    assert compute(Neighbours(predictor, copy, selection), stop_after=1)  # computed
    (copy / FILE).write_bytes(b"damaged")
    assert compute(Neighbours(predictor, copy, selection))


def test_another_shard_set_is_refused(run, shard_sets, tmp_path):
    with pytest.raises(DataError, match="not the shard set that"):
        training_selection(run, shard_sets["raw"].path)
    with pytest.raises(DataError, match="no such folder"):
        training_selection(run, tmp_path / "nowhere")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "result.json").unlink()
    with pytest.raises(DataError, match="not finished"):
        training_selection(unfinished)
    assert (
        json.loads((run / "result.json").read_text())["shard_set_sha256"]
        == ShardSet(training_selection(run).data.path).manifest.index_sha256
    )
