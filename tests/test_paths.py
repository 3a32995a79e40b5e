"""Folders whose name is not UTF-8, as old disks have: every command reads and writes them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pandas as pd
import pytest

from preprocess import shard
from shards import ShardSet
from shards.common import cli
from shards.common.files import encoded
from tests.support.rawdata import write_raw
from tests.support.train_runs import child_environment
from train import predict, report, run
from train.config import read_config
from train.study.folder import StudyFolder

Command = Callable[..., tuple[int, bytes, bytes]]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A new folder whose last name is not UTF-8."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Iterator[Command]:
    """Runs a command as `__main__` does; the exit code, standard output and standard error."""
    before = signal.getsignal(signal.SIGTERM)

    def start(main: click.Command, *arguments: object) -> tuple[int, bytes, bytes]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.run(main)
        out, errors = capfdbinary.readouterr()
        return int(stop.value.code or 0), out, errors

    yield start
    signal.signal(signal.SIGTERM, before)


def test_text_of_a_path_is_utf8_in_a_file_and_json_reads_it_back(odd: Path) -> None:
    text = json.dumps({"path": str(odd), "é": "→"}, ensure_ascii=False)
    assert encoded(text).decode().endswith('caf\\udce9", "é": "→"}')
    assert json.loads(encoded(text)) == {"path": str(odd), "é": "→"}


def test_a_terminal_gets_the_bytes_of_a_path(odd: Path, tiny_shards: Path) -> None:
    shutil.copytree(tiny_shards, odd / "shards")
    for arguments in (["verify", odd / "shards"], ["verify", odd]):
        words = [sys.executable, "-m", "shards", *map(str, arguments)]
        done = subprocess.run(words, env=child_environment(), capture_output=True, check=False)
        assert done.returncode == (arguments[1] == odd)
        assert os.fsencode(arguments[1]) in (done.stderr if done.returncode else done.stdout)


def test_a_study_keeps_its_settings_and_its_journal(odd: Path) -> None:
    settings = {"data": str(odd)}
    with StudyFolder(odd / "study", settings):
        pass
    with StudyFolder(odd / "study", settings):  # the settings are the same: nothing is refused
        pass
    assert json.loads((odd / "study" / "study.json").read_text())["settings"] == settings


@pytest.mark.slow
def test_from_images_to_a_report_and_predictions(odd: Path, command: Command) -> None:
    raw, data, out = write_raw(odd / "raw", images=70, size=(60, 80)), odd / "shards", odd / os.fsdecode(b"\xe9t\xe9")
    code, shown, errors = command(shard.main, "--source", raw, "--out", data, "--max-resolution", 64)
    assert code == 0 and os.fsencode(f"70 images packed in {data}") in shown, errors
    small = ("--model", "resnet18", "--epochs", 1, "--batch-size", 16, "--resolution", 32, "--compile", "off")
    options = ("--data", data, "--out", out, *small, "--device", "cpu")
    code, shown, errors = command(run.main, *options)
    assert code == 0 and os.fsencode(f"; {out}\n") in shown, errors
    assert read_config(out / "config.json").data == str(data)
    code, shown, errors = command(run.main, *options, "--resume")
    assert code == 0 and b"this run is finished" in shown, errors
    code, shown, errors = command(report.main, out, "--pictures", odd / "pictures", "--tiles", 1)
    assert code == 0 and shown.startswith(os.fsencode(f"{out / 'report.html'}: 1 runs")), errors
    assert "<title>Study \\udce9t\\udce9</title>" in (out / "report.html").read_text(encoding="utf-8")

    with ShardSet(data) as packed:
        name = packed.column("image_id")[0]
    [image] = raw.rglob(f"{name}.jpg")
    asked = ("--run", out, image, odd / "no.jpg", "--device", "cpu")
    code, shown, errors = command(predict.main, *asked, "--explain", "--explain-out", odd / "maps")
    assert code == 1 and shown.startswith(os.fsencode(f"{image}  "))
    assert os.fsencode(f"refused: {odd / 'no.jpg'} does not exist") in errors
    assert (odd / "maps" / f"{name}.png").is_file()
    assert command(predict.main, *asked, "--out", odd / "table.csv")[0] == 1
    assert pd.read_csv(odd / "table.csv")["file"].tolist() == [encoded(str(image)).decode()]
    assert command(predict.main, *asked, "--json", "--out", odd / "answers.json")[0] == 1
    answers = json.loads((odd / "answers.json").read_text(encoding="utf-8"))
    assert answers["images"][0]["file"] == str(image)
    assert answers["refused"][0]["file"] == str(odd / "no.jpg")
