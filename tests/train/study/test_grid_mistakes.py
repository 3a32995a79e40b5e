"""Mistakes in the options of a grid: each is refused before anything is written, with the right message."""

import shutil
from pathlib import Path

import pytest

from shards.common.errors import DataError, UsageError
from shards.common.files import lock
from tests.train.study.test_grid import BASE, leave
from train import grid, leakage, run
from train.inference.predictor import read_about
from train.study import folder as study_folder
from train.study.cells import Cell
from train.study.folder import StudyFolder, read_journal, read_study


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake that gets as far as the cells is a failure of the test."""
    monkeypatch.setattr("train.study.grid.train_cells", lambda *_: pytest.fail("the cells were started"))


@pytest.mark.parametrize("command", [grid, leakage])
@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (("resnt18",), UsageError, "resnt18.*did you mean"),
        (("vit_b16", "--resolution", "100"), UsageError, "multiple of 16"),
        (("resnet18", "--device", "cuda:99"), UsageError, "GPU 99"),
        (("resnet18", "--device", "tpu"), UsageError, "'tpu' is unknown"),
        (("resnet18", "--device", "cpu", "--precision", "fp16"), UsageError, "fp16: needs a GPU"),
        (("resnet18", "--weights", "missing.pt"), DataError, "missing.pt: no such file"),
        (("resnet18", "--batch-size", "1"), UsageError, "--batch-size 1: .* choose 2 or more"),
    ],
)
def test_what_would_fail_every_cell_is_refused_before_anything_is_written(
    command, arguments, kind, words, tiny_shards, tmp_path
):
    option = "--models" if command is grid else "--model"
    options = [option, *arguments, "--data", str(tiny_shards), "--out", str(tmp_path / "study")]
    with pytest.raises(kind, match=words):
        command.main.main(options, standalone_mode=False)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("kept", ["result.json", "checkpoint.pt"])
def test_a_study_that_trained_nothing_yet_takes_other_settings_and_forgets_its_failed_cells(tmp_path, kept):
    out, cell = tmp_path / "study", Cell(BASE, 1000, 10)
    with StudyFolder(out, {"device": "cuda"}) as folder:
        leave(folder, "config.json")
        folder.ended(cell, "failed", "no GPU", 1.0)
        with pytest.raises(DataError, match="another grid is running"):
            StudyFolder(out, {"device": "cpu"})
        assert read_journal(out) and folder.cell(cell.name).exists()  # which the other grid is using
    with StudyFolder(out, {"device": "cpu"}) as folder:
        assert read_study(out)["settings"] == {"device": "cpu"}
        assert not read_journal(out) and not folder.cell(cell.name).exists()
        leave(folder, kept)
    with pytest.raises(UsageError, match="device: cpu, now cuda"):
        StudyFolder(out, {"device": "cuda"})
    with StudyFolder(out, {"device": "cpu"}):
        assert (folder.cell(cell.name) / kept).exists()


def test_a_study_of_an_older_release_goes_on_with_the_normalisation_and_interpolation_that_it_had(tmp_path):
    """Without `--normalize` a file of weights was trained with that of the training images, and always bilinearly."""
    for name, settings, had in (("random", {"weights": None}, "auto"), ("file", {"weights": "w.pt"}, "data")):
        resized = "auto" if name == "random" else "bilinear"
        with StudyFolder(tmp_path / name, settings) as folder:
            leave(folder, "result.json")
        with StudyFolder(tmp_path / name, settings | {"normalize": had, "interpolation": resized}):
            pass
        with pytest.raises(UsageError, match=f"normalize: {had}, now half"):
            StudyFolder(tmp_path / name, settings | {"normalize": "half"})


def test_a_study_of_an_older_release_goes_on_with_the_crops_that_it_had(tmp_path):
    with StudyFolder(tmp_path, {"epochs": 3}) as folder:
        leave(folder, "result.json")
    with StudyFolder(tmp_path, {"epochs": 3, "eval_crop": 0.875, "crop_scale": None}):
        pass
    with pytest.raises(UsageError, match=r"eval_crop: 0\.875, now 1\.0"):
        StudyFolder(tmp_path, {"epochs": 3, "eval_crop": 1.0})


def test_a_study_that_was_made_a_moment_ago_is_not_overwritten(tmp_path, monkeypatch):
    """Another start makes the study after this one has found the folder empty."""
    out = tmp_path / "study"

    def lock_late(*arguments):
        monkeypatch.setattr(study_folder, "lock", lock)
        with StudyFolder(out, {"device": "cpu"}) as other:
            leave(other, "result.json")
        lock(*arguments)

    monkeypatch.setattr(study_folder, "lock", lock_late)
    with pytest.raises(UsageError, match="device: cpu, now cuda"):
        StudyFolder(out, {"device": "cuda"})
    assert read_study(out)["settings"] == {"device": "cpu"}
    assert len(list(out.glob("cells/*/result.json"))) == 1


def test_batch_norm_over_processes_is_offered_only_where_there_are_several():
    offering = [c for c in (grid, leakage, run) if "sync_batch_norm" in {option.name for option in c.main.params}]
    assert offering == [run]


def test_deleted_weights_and_an_unfinished_run_give_different_messages(whole: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="not finished; continue it with --resume"):
        read_about(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(DataError, match=r"result\.json: damaged"):
        read_about(tmp_path)
    shutil.copy(whole / "result.json", tmp_path)
    with pytest.raises(
        DataError, match=r"weights of this finished run were deleted .*train again.*--keep weights"
    ) as error:
        read_about(tmp_path)
    assert "not finished" not in str(error.value) and "--resume" not in str(error.value)
