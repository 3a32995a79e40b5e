"""The array job of examples/grid.sbatch, run by bash with Slurm's variables: which cells it trains, and its requeue."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "grid.sbatch"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of task 1 of an array job. `scontrol` writes what it is asked for into a file."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, line in (("python", f'exec "{sys.executable}" "$@"'), ("scontrol", f'echo "$@" >> "{tmp_path}/asked"')):
        (commands / name).write_text(f"#!/bin/bash\n{line}\n")
        (commands / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MODELS": "test_vit test_resnet",
        "SEEDS": "5",
        "OUT": str(tmp_path / "array"),
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_JOB_ID": "77",
    }


def start(slurm: dict[str, str], data: Path) -> subprocess.Popen[str]:
    options = ["--data", str(data), "--fractions", "1", "--epochs", "14", "--batch-size", "8", "--resolution", "32"]
    options += ["--device", "cpu", "--compile", "off", "--threads", "1", "--checkpoint-s", "0", "--eval-epochs", "7"]
    return subprocess.Popen(
        ["bash", str(SCRIPT), *options], env=slurm, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_an_array_task_that_runs_out_of_time_is_queued_again_and_goes_on(
    slurm: dict[str, str], tiny_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "array" / "test_resnet-5" / "cells" / "test_resnet_f1_s5_u5"
    asked = tmp_path / "asked"
    for number, requeued in ((signal.SIGUSR1, True), (signal.SIGTERM, False)):
        asked.unlink(missing_ok=True)
        written = (run / "checkpoint.pt").stat().st_mtime_ns if (run / "checkpoint.pt").exists() else 0
        process = start(slurm, tiny_shards)
        while process.poll() is None and not (
            (run / "checkpoint.pt").exists() and (run / "checkpoint.pt").stat().st_mtime_ns > written
        ):
            time.sleep(0.02)
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 128 + number, output + errors
        assert asked.exists() == requeued and not (run / "result.json").exists()
        if requeued:
            assert asked.read_text() == "requeue 77\n"
    output, errors = start(slurm, tiny_shards).communicate(timeout=240)
    assert "1 of 1 cells finished" in output, output + errors
    assert (run / "log.txt").read_text().count("continuing at step") == 2
    assert [path.name for path in (tmp_path / "array").iterdir()] == ["test_resnet-5"]


def test_a_grid_that_fails_at_once_is_not_taken_for_one_that_finished(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "python").write_text("#!/bin/bash\nexit 3\n")
    line = ["bash", str(SCRIPT)]
    assert {subprocess.run(line, env=slurm, check=False).returncode for _ in range(20)} == {3}


def test_a_task_without_a_cell_is_one_line(slurm: dict[str, str]) -> None:
    line = ["bash", str(SCRIPT)]
    done = subprocess.run(line, env=slurm | {"SLURM_ARRAY_TASK_ID": "2"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.endswith("2 models x 1 seeds: submit with --array=0-1\n")
    del slurm["SLURM_ARRAY_TASK_ID"]
    done = subprocess.run(line, env=slurm, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "submit this script with --array" in done.stderr


def test_slurm_signals_the_script_which_passes_it_on() -> None:
    text = SCRIPT.read_text()
    assert re.search(r"^#SBATCH --signal=B:USR1@\d+$", text, re.M) and "#SBATCH --requeue\n" in text
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
