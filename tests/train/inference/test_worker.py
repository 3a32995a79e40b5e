"""What the page's other process answers where something is damaged or cannot be done: the rest of the opinion stays."""

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

from shards import ShardSet
from shards.common.errors import DataError, UsageError
from tests.support.train_runs import small
from train import serve
from train.inference import page
from train.inference import worker as consult
from train.inference.neighbours import FILE
from train.loop import train_once


@pytest.fixture(scope="module")
def trained(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run and its shard set."""
    folder = tmp_path_factory.mktemp("consult")
    shutil.copytree(tiny_shards, folder / "shards")
    train_once(small(folder / "shards", epochs=1), folder / "run")
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy to damage; what `start` changes in this process is undone."""
    shutil.copytree(trained, tmp_path / "copy")
    broken: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", broken.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(consult, "_sessions", [])
    yield tmp_path / "copy"
    consult.stop()
    assert not broken


def started(folder: Path) -> consult._Session:
    """The session of `consult.start`, once its thread has done all that it can."""
    consult._sessions.clear()
    consult.start(folder / "run", folder / "shards", "cpu")
    for thread in threading.enumerate():
        if thread.name == "consult":  # others may be of a loader, which is just starting them
            thread.join(120)
    return consult._sessions[0]


def training_image(folder: Path) -> tuple[bytes, Callable[[], None]]:
    """A training image's file, and what damages it in the shard set."""
    with ShardSet(folder / "shards") as data:
        sample = int(data.select("train").samples[5])
        payload = bytes(data.read(sample))
        file = folder / "shards" / data.manifest.shards[int(data.column("shard")[sample])].file
        middle = int(data.column("offset")[sample]) + len(payload) // 2

    def damage() -> None:
        content = bytearray(file.read_bytes())
        content[middle] ^= 0xFF
        file.write_bytes(content)

    return payload, damage


def test_training_images_that_cannot_be_read_cost_only_the_neighbours(folder):
    image, damage = training_image(folder)
    damage()
    session = started(folder)
    assert session.neighbours is None and not (folder / "run" / FILE).exists()
    opinion = consult.answer(image)
    assert sum(opinion.probabilities.values()) == pytest.approx(1) and opinion.overlay
    assert not opinion.alike
    assert "cannot be shown" in opinion.alike_note and "damaged in" in opinion.alike_note


def test_a_neighbour_that_is_damaged_later_costs_only_the_neighbours(folder):
    image, damage = training_image(folder)
    started(folder)
    whole = consult.answer(image)
    assert len(whole.alike) == consult.NEIGHBOURS and not whole.alike_note
    damage()
    assert started(folder).neighbours is not None  # its features are kept in the run folder
    opinion = consult.answer(image)
    assert opinion.probabilities == whole.probabilities and opinion.overlay == whole.overlay
    assert not opinion.alike and "damaged in" in opinion.alike_note


def test_a_network_without_places_is_asked_for_probabilities_all_the_same(folder, monkeypatch):
    def none(*_: object) -> None:
        raise UsageError("--explain: no layer; leave it out")

    image, _ = training_image(folder)
    started(folder)
    whole = consult.answer(image)
    assert whole.overlay and not whole.overlay_note
    consult._sessions[0].explainer = None
    monkeypatch.setattr("train.inference.explain._layer", none)
    opinion = consult.answer(image)
    assert opinion.probabilities == whole.probabilities and opinion.alike == whole.alike
    assert not opinion.overlay and "has no layer" in opinion.overlay_note and "--explain" not in opinion.overlay_note
    shown = page._pictures(opinion)
    assert shown.count("<img") == 1 and opinion.overlay_note in shown
    assert page._pictures(whole).count("<img") == 2


def test_what_the_user_can_mend_is_said_on_the_page():
    def submit(*_: object) -> Future:
        future: Future = Future()
        future.set_exception(DataError("model.safetensors: damaged"))
        return future

    worker = SimpleNamespace(submit=submit)
    told = serve.ask(worker, b"image")  # pyright: ignore[reportArgumentType]
    assert told == "could not be judged: model.safetensors: damaged"
