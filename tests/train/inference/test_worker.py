"""The model process of the page: if a part of an answer is impossible, the other parts are still there."""

import io
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from shards import ShardSet
from shards.common.errors import DataError
from shards.common.machine import Load
from shards.encode import BadImageError
from tests.conftest import growth_bytes
from tests.support.train_runs import small
from train import serve
from train.crowding import Crowding
from train.inference import page, worker
from train.inference.neighbours import FILE
from train.loop import train_once


@pytest.fixture
def folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the run and its shard set, to damage; what `start` changes in this process is undone.

    Its path is not UTF-8.
    """
    copy = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(run.parent, copy)
    (copy / "run" / FILE).unlink(missing_ok=True)
    broken: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", broken.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker, "_sessions", [])
    yield copy
    worker.stop()
    assert not broken


def started(folder: Path) -> worker._Session:
    """The session of `worker.start` after its thread has ended."""
    worker._sessions.clear()
    worker.start([folder / "run"], folder / "shards", "cpu")
    for thread in threading.enumerate():
        if thread.name == "prepare":  # a loader may just be starting others
            thread.join(120)
    return worker._sessions[0]


def training_image(folder: Path) -> tuple[bytes, Callable[[], None]]:
    """A training image's file, and what damages it in the shard set."""
    with ShardSet(folder / "shards") as data:
        sample = int(data.select("train", 0.7).samples[5])  # as the run selects them
        payload = bytes(data.read(sample))
        file = folder / "shards" / data.manifest.shards[int(data.column("shard")[sample])].file
        middle = int(data.column("offset")[sample]) + len(payload) // 2

    def damage() -> None:
        content = bytearray(file.read_bytes())
        content[middle] ^= 0xFF
        file.write_bytes(content)

    return payload, damage


def test_other_programs_on_the_cores_are_named_once(folder, monkeypatch, capsys):
    monkeypatch.setattr("train.crowding.LOOK_S", 0.0)
    monkeypatch.setattr("train.crowding.LoadMeter.read", lambda self: Load(2, 1.0, 300.0))
    image, _ = training_image(folder)
    for threads in (2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        session = started(folder)
        worker.answer(image)
        assert capsys.readouterr().err.count("warning: other programs slow this one down") == threads - 1
        session.crowding = Crowding(threads)
        worker.answer(image)
        assert capsys.readouterr().err.count("Start it again with --threads 1") == threads - 1


def test_damaged_training_images_cost_only_the_similar_lesions(folder):
    image, damage = training_image(folder)
    damage()
    session = started(folder)
    assert session.neighbours is None and not (folder / "run" / FILE).exists()
    found = worker.answer(image)
    assert sum(found.probabilities.values()) == pytest.approx(1) and found.overlay
    assert not found.similar
    assert "cannot be shown" in found.similar_note and "damaged in" in found.similar_note


def test_an_image_of_one_pixel_has_a_whole_answer_and_an_empty_file_a_reason(folder):
    started(folder)
    file = io.BytesIO()
    Image.new("RGB", (1, 1), (200, 100, 50)).save(file, "PNG")
    found = worker.answer(file.getvalue())
    assert sum(found.probabilities.values()) == pytest.approx(1) and len(found.similar) == worker.NEIGHBOURS
    assert Image.open(io.BytesIO(found.image)).size == Image.open(io.BytesIO(found.overlay)).size == (1, 1)
    with pytest.raises(BadImageError, match="is empty"):
        worker.answer(b"")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_answers(folder):
    image, _ = training_image(folder)
    started(folder)

    def answers(_: int) -> None:
        for _ in range(4):
            worker.answer(image)

    assert growth_bytes(answers) < 15 * 4 * 10_000


def test_a_failure_while_features_are_computed_is_shown(folder, monkeypatch):
    def full(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("train.inference.neighbours.Neighbours.compute", full)
    started(folder)
    found = worker.answer(training_image(folder)[0])
    assert found.overlay and found.similar_note.endswith("cannot be shown: CUDA out of memory")


def test_a_similar_lesion_that_is_damaged_later_costs_only_the_similar_lesions(folder):
    image, damage = training_image(folder)
    started(folder)
    whole = worker.answer(image)
    assert len(whole.similar) == worker.NEIGHBOURS and not whole.similar_note
    damage()
    assert started(folder).neighbours is not None  # its features are kept in the run folder
    found = worker.answer(image)
    assert found.probabilities == whole.probabilities and found.overlay == whole.overlay
    assert not found.similar and "damaged in" in found.similar_note


def test_two_runs_answer_with_the_mean_of_their_probabilities(folder, tmp_path):
    """The second run is of another resolution. Similar lesions are those of the first."""
    other = tmp_path / "other"
    train_once(small(folder / "shards", epochs=1, seed=3, resolution=48), other)
    image, _ = training_image(folder)
    alone = []
    for runs in ([folder / "run"], [other], [folder / "run", other]):
        worker._sessions.clear()
        abouts, credit = worker.start(runs, folder / "shards" if runs[0] != other else None, "cpu")
        for thread in threading.enumerate():
            if thread.name == "prepare":
                thread.join(120)
        alone.append(worker.answer(image))
    one, two, both = alone
    for name, found in both.probabilities.items():
        assert found == pytest.approx((one.probabilities[name] + two.probabilities[name]) / 2, abs=1e-6)
    assert both.similar == one.similar and both.overlay and len(abouts) == 2
    assert credit.startswith("Similar for the first network, resnet18. ")
    message = page._message("x", abouts)
    assert "They are the mean of 2 networks." in message


def test_a_map_that_fails_costs_only_the_map(folder, monkeypatch):
    def fail(*_: object) -> None:
        raise IndexError("tuple index\nout of range")

    image, _ = training_image(folder)
    (about,) = started(folder).ensemble.abouts
    whole = worker.answer(image)
    assert whole.overlay and not whole.overlay_note
    monkeypatch.setattr("train.inference.explain.Explainer.maps", fail)
    found = worker.answer(image)
    assert found.probabilities == whole.probabilities and found.similar == whole.similar
    assert not found.overlay and found.overlay_note.endswith("(IndexError: tuple index out of range).")
    shown = page._pictures(found, about)
    assert shown.count("<img") == 1 and found.overlay_note in shown
    assert page._pictures(whole, about).count("<img") == 2


def test_a_network_without_features_still_gives_probabilities(folder, monkeypatch):
    def fail(*_: object) -> None:
        raise AttributeError("no forward_head")

    image, _ = training_image(folder)
    started(folder)
    whole = worker.answer(image)
    monkeypatch.setattr("train.inference.predictor.Predictor.features", fail)
    found = worker.answer(image)
    assert found.probabilities == whole.probabilities and found.overlay == whole.overlay
    assert not found.similar and found.similar_note.endswith("cannot be shown: no forward_head")
    (folder / "run" / FILE).unlink()
    started(folder)  # the same while the features of the training images are computed
    assert worker.answer(image).similar_note.endswith("cannot be shown: no forward_head")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DataError("model.safetensors: damaged"), "could not be predicted: model.safetensors: damaged"),
        (RuntimeError("CUDA out\nof memory"), "could not be predicted: CUDA out of memory"),
        (BrokenExecutor(), "could not be predicted: the model process has ended; start this program again"),
    ],
)
def test_the_page_shows_errors(error, words):
    future: Future = Future()
    future.set_exception(error)
    process = SimpleNamespace(submit=lambda *_: future)
    assert serve.ask(process, b"image") == words  # pyright: ignore[reportArgumentType]
