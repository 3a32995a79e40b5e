"""`python -m train.run` as users see it: what it prints, and one line for each mistake."""

import gc
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
import torch

from shards.common import cli
from tests.conftest import write_set
from tests.train.test_record import full_disk
from train.interrupts import ASKING
from train.record import RunFolder
from train.run import main

Command = Callable[..., tuple[int, str, str]]
SMALL = ["--model", "test_resnet", "--epochs", "1", "--batch-size", "16", "--resolution", "32", "--compile", "off"]


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """The command sets handlers of signals; put the old ones back."""
    before = {number: signal.getsignal(number) for number in ASKING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs the command as `__main__` does, with the last value of each option; the exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        words: dict[str, list[str]] = {}  # of each option its last value, as no option may be given twice
        for word in ("--device", "cpu", *map(str, arguments)):
            if word.startswith("--"):
                option = words[word] = []
            option.append(word)
        monkeypatch.setattr(sys, "argv", ["train.run", *(word for option in words.values() for word in option)])
        with pytest.raises(SystemExit) as stop:
            cli.run(main)
        out, errors = capsys.readouterr()
        return int(stop.value.code or 0), out, errors

    return run


def test_imports_leave_the_collector_as_it_was() -> None:
    assert gc.isenabled()
    with cli.importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), cli.importing():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with cli.importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


def test_one_line_an_epoch_and_a_default_folder(command: Command, tiny_shards: Path, tmp_path: Path) -> None:
    code, out, errors = command(*SMALL, "--data", tiny_shards, "--fraction", "0.5", "--seed", "3")
    assert (code, errors) == (0, "")
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    pattern = r"epoch +1/1  loss \d\.\d+  val balanced accuracy 0\.\d+  \d+\.\d img/s  data wait \d+\.\d %"
    assert len(lines) == 1
    assert re.fullmatch(pattern, lines[0]), lines[0]
    assert (tmp_path / "runs" / "test_resnet_f0.5_s3_u0" / "result.json").exists()


def test_images_that_are_shrunk_too_far_are_one_warning(command: Command, tmp_path: Path) -> None:
    """Evaluation cuts 128 px out of 194×146, and 130 px out of 198×148: 2 times and a little more than 64 px."""
    for size, expected in ((146, 194), False), ((148, 198), True):
        data = write_set(tmp_path / f"set-{size[0]}", images=70, size=size)
        arguments = ["--model", "test_resnet", "--resolution", "64", "--batch-size", "16", "--epochs", "1"]
        code, _, errors = command(*arguments, "--compile", "off", "--data", data, "--out", tmp_path / f"run-{size[0]}")
        assert code == 0, errors
        assert len(errors.splitlines()) == expected
    assert errors.startswith("warning: evaluation crops of 130 px shrink to 64 px, 2.03 times: ")
    assert errors.endswith("--max-resolution 194 or less, or train at --resolution 65 or more\n")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--model", "resnet19"], 2, ["resnet19", "mixer_b16", "vit_b16", "alexnet"]),
        (["--fraction", "0"], 2, ["fraction 0", "(0, 1]"]),
        (["--fraction", "1.01"], 2, ["fraction 1.01"]),
        (["--fraction", "half"], 2, ["half"]),
        (["--batch-size", "100"], 2, ["--batch-size 100", "72 images"]),
        (["--model", "alexnet", "--resolution", "62"], 2, ["alexnet", "63 px"]),
        (["--model", "mixer_b16", "--resolution", "64", "--start-resolution", "32"], 2, ["mixer_b16"]),
        (["--device", "tpu"], 2, ["tpu", "auto, cpu, cuda"]),
        (["--device", "cuda:99"], 2, ["GPU 99"]),
        (["--precision", "fp16"], 2, ["fp16", "GPU"]),
        (["--data", "nowhere"], 1, ["nowhere", "preprocess.shard"]),
        (["--weights", "nowhere.pt"], 1, ["nowhere.pt"]),
        (["--sync-batch-norm"], 2, ["--sync-batch-norm needs a GPU"]),
        (["--sync-batch-norm", "--model", "test_vit"], 2, ["test_vit has no batch norm"]),
        (["--lr", "1e30", "--precision", "fp32"], 1, ["loss", "step", "--lr"]),
        (["--out", "/dev/null/run"], 1, ["/dev/null/run: Not a directory; check the path"]),
    ],
)
def test_each_mistake_is_one_line(
    command: Command, tiny_shards: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    got, _, errors = command(*SMALL, "--data", tiny_shards, *arguments)
    assert got == code, errors
    lines = errors.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]


def test_a_run_without_a_model_is_one_line(command: Command) -> None:
    assert command() == (2, "", "error: Missing option '--model'.\n")


@pytest.mark.parametrize("damage", ["manifest", "index", "shard", "payload"])
def test_a_damaged_shard_set_is_one_line(command: Command, tiny_shards: Path, tmp_path: Path, damage: str) -> None:
    data = tmp_path / "damaged"
    shutil.copytree(tiny_shards, data)
    file = {"manifest": "manifest.json", "index": "index.parquet"}.get(damage, "shard-00000.tar")
    content = bytearray((data / file).read_bytes())
    if damage == "payload":
        content[1500:1510] = bytes(byte ^ 255 for byte in content[1500:1510])  # inside the first image
    else:
        del content[len(content) // 2 :]
    (data / file).write_bytes(content)
    code, _, errors = command(*SMALL, "--data", data)
    assert code == 1, errors
    assert len(errors.splitlines()) == 1
    assert file in errors


def test_a_full_disk_is_one_line(command: Command, tiny_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".checkpoint.pt.partial").symlink_to("/dev/full")  # every write to it fails as on a full disk
    code, _, errors = command(*SMALL, "--data", tiny_shards, "--out", out)
    assert code == 1, errors
    assert len(errors.splitlines()) == 1
    assert "disk is full" in errors
    assert "checkpoint.pt" in errors


def test_ctrl_c_within_the_write_of_a_checkpoint_is_one_line(
    command: Command, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def interrupted(state: object, file: IO[bytes]) -> None:
        monkeypatch.setattr(torch, "save", save)
        signal.raise_signal(signal.SIGINT)
        save(state, file)

    monkeypatch.setattr(torch, "save", interrupted)
    arguments = ["--data", tiny_shards, "--out", tmp_path / "run", "--checkpoint-s", "0"]
    code, out, errors = command(*SMALL, *arguments)
    assert (code, errors) == (130, "")
    assert out.splitlines()[-1].endswith("stopped at step 2 of 4; go on with --resume")
    assert command(*SMALL, *arguments, "--resume")[0] == 0


@pytest.mark.parametrize("moment", ["log", "steps", "epoch"])
def test_a_disk_that_fills_up_while_recording_is_one_line(
    command: Command, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folders: list[RunFolder] = []
    raised: list[threading.ExceptHookArgs] = []
    real = getattr(RunFolder, moment)

    def after_the_disk_is_full(folder: RunFolder, *arguments: object) -> None:
        full_disk(folder.path)
        folders.append(folder)
        real(folder, *arguments)

    monkeypatch.setattr(RunFolder, moment, after_the_disk_is_full)
    monkeypatch.setattr(threading, "excepthook", raised.append)
    out = tmp_path / "run"
    code, _, errors = command(*SMALL, "--data", tiny_shards, "--out", out)
    assert code == 1 and len(errors.splitlines()) == 1, errors
    assert errors.startswith(f"error: the disk is full while writing {out}"), errors
    assert not raised  # what a thread fails with would be printed as a traceback
    assert folders[0]._metrics.closed
    assert folders[0]._log.closed
    assert folders[0]._lock.closed
