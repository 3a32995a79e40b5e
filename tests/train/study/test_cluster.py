"""A grid on a Ray cluster of two nodes: the results of one machine, also if a node is lost or the grid is stopped."""

import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from shards.common.cluster import runner
from shards.common.errors import UsageError
from tests.conftest import free_port
from tests.support.ray_nodes import TwoNodes, ended, own_folder, ray_processes, start_python, two_nodes
from train.study import cluster
from train.study.cluster import Devices, Remote

_MEASURED = ("_s", "img_per_s", "data_wait_fraction", "peak_memory_bytes", "gpu_busy")
"""Ends of the names of columns that are times, speeds and sizes of the process."""
CELLS = [f"test_resnet_f1_s{seed}_u{seed}" for seed in range(3)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with two_nodes() as made:
        yield made


BLIND = """
import sys
from shards.common import cli
from train.grid import main
from train.study import cluster
cluster.Path.touch = lambda *_: None  # so no node finds the sign of a folder that it sees
sys.argv[0] = "grid"
cli.run(main)
"""


def start(data: Path, out: Path, *more: str, blind: bool = False) -> subprocess.Popen[str]:
    """Start a grid. blind: the nodes of a cluster take the folder for one that they do not see."""
    line = [*(["-c", BLIND] if blind else ["-m", "train.grid"]), "--data", str(data), "--out", str(out)]
    line += ["--models", "test_resnet", "--fractions", "1", "--seeds", "0,1,2", "--epochs", "8", "--batch-size", "8"]
    line += ["--resolution", "32", "--device", "cpu", "--compile", "off", "--threads", "1", "--per-device", "1"]
    return start_python(*line, "--checkpoint-s", "0", "--eval-epochs", "4", *more)


def wait_until(process: subprocess.Popen[str], done: Callable[[], bool]) -> None:
    while process.poll() is None and not done():
        time.sleep(0.02)


def assert_equal_studies(one: Path, other: Path) -> None:
    """All that is no measurement of time and memory is the same text in results.csv; weights are the same bytes."""
    rows = [list(csv.DictReader((out / "results.csv").open())) for out in (one, other)]
    assert len(rows[0]) == len(rows[1]) > 0
    for a, b in zip(*(sorted(found, key=lambda row: row["cell"]) for found in rows), strict=True):
        for name in a:
            if not name.endswith(_MEASURED):
                assert a[name] == b[name], (a["cell"], name)
        for file in ("model.safetensors", "predictions.parquet"):
            first, second = (out / "cells" / a["cell"] / file for out in (one, other))
            assert first.read_bytes() == second.read_bytes()


@pytest.fixture(scope="module")
def local(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("grid") / "local"
    ended(start(tiny_shards, out))
    return out


@pytest.mark.slow
def test_a_grid_that_loses_a_node_gives_the_table_of_one_machine(
    nodes: TwoNodes, local: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ray"
    process = start(tiny_shards, out, "--runner", "ray", "--address", nodes.address)
    cells = [out / "cells" / name for name in CELLS]
    # One may be finished before the other has begun. Its node trains the third cell then.
    both = [[cell / "checkpoint.pt", cell / "result.json"] for cell in cells[:2]]
    wait_until(process, lambda: all(any(file.exists() for file in files) for files in both))
    begun = [cell.name for cell in cells if (cell / "checkpoint.pt").exists()]
    nodes.kill_second()
    output, errors = ended(process)
    nodes.start_second()
    assert f"writes into {out}" in output and "3 of 3 cells finished" in output
    lost = [name for name in CELLS if f"warning: {name}: its node or its worker was lost" in errors]
    assert len(lost) == 1, errors
    assert all("continuing at step" in (out / "cells" / name / "log.txt").read_text() for name in lost if name in begun)
    assert_equal_studies(local, out)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".seen")]


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_no_process_and_the_grid_goes_on(
    nodes: TwoNodes, local: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ray"
    with own_folder():
        process = start(tiny_shards, out, "--runner", "ray")  # a cluster of its own, for one cell at a time
        wait_until(process, (out / "cells" / CELLS[0] / "checkpoint.pt").exists)
        started = [*psutil.Process(process.pid).children(recursive=True), *ray_processes()]
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes that it started get it too
        output, errors = ended(process, 128 + signal.SIGINT)
        assert "started a Ray cluster on this machine" in output
        assert "run the same command to continue" in errors
        assert len(started) > 3 and not psutil.wait_procs(started, timeout=10)[1]
        assert not ray_processes()
    assert (out / "cells" / CELLS[0] / "checkpoint.pt").exists()
    assert not (out / "cells" / CELLS[0] / "result.json").exists()
    output, _ = ended(start(tiny_shards, out, "--runner", "ray", "--address", nodes.address))
    assert "3 of 3 cells finished" in output
    assert "continuing at step" in (out / "cells" / CELLS[0] / "log.txt").read_text()
    assert_equal_studies(local, out)


@pytest.mark.slow
def test_files_come_back_from_nodes_that_do_not_see_the_study_also_after_sigterm(
    nodes: TwoNodes, local: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ray"
    more = ("--runner", "ray", "--address", nodes.address)
    process = start(tiny_shards, out, *more, blind=True)
    there = Path(os.environ["RAY_TMPDIR"])
    wait_until(process, lambda: any(there.glob("dermscale-*/*/checkpoint.pt")))
    assert not (out / "cells").exists()
    process.send_signal(signal.SIGTERM)
    output, _ = ended(process, 128 + signal.SIGTERM)
    assert f"does not see {out}: the files of a cell come back when it ends" in output
    # The two nodes do not keep pace: one cell may have ended, and another may not have begun.
    cells = [file.parent for file in out.glob("cells/*/checkpoint.pt") if not (file.parent / "result.json").exists()]
    assert cells
    output, _ = ended(start(tiny_shards, out, *more, blind=True))
    assert "3 of 3 cells finished" in output
    assert all("continuing at step" in (cell / "log.txt").read_text() for cell in cells)
    assert_equal_studies(local, out)
    assert not list(there.glob("dermscale-*/*/checkpoint.pt"))


def test_a_node_that_does_not_see_the_study_keeps_its_log_and_no_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    there = Remote(tmp_path / "sign", tmp_path / "elsewhere")
    (scratch,) = tmp_path.iterdir()
    (scratch / "cell").mkdir()
    (scratch / "worker.log").touch()
    for name in ("result.json", "config.json", ".lock"):
        (scratch / "cell" / name).write_text(name)
    found = there.files(tmp_path / "study" / "cells" / "cell")
    assert list(found.items()) == [("config.json", b"config.json"), ("result.json", b"result.json")]
    assert [path.name for path in scratch.iterdir()] == ["worker.log"]


def test_what_the_nodes_of_a_cluster_are_divided_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "nodes", lambda: [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 12.0, "GPU": 2.0}, {"CPU": 8.0}])
    assert cluster.devices("auto") == cluster.devices("cuda") == Devices(6, 4, True)
    assert cluster.devices("cpu") == Devices(3, 8, False)
    assert Devices(6, 4, True).resources(3) == {"num_cpus": 1, "num_gpus": 0.3333}
    assert Devices(3, 8, False).resources(2) == {"num_cpus": 4}
    with pytest.raises(UsageError, match="Ray chooses the GPU"):
        cluster.devices("cuda:1")
    monkeypatch.setattr(cluster, "nodes", lambda: [{"memory": 1.0}])
    for name in ("cuda", "auto"):
        with pytest.raises(UsageError, match=f"--device {name}: no node"):
            cluster.devices(name)


def test_addresses_that_name_no_cluster_are_one_line() -> None:
    def refusal(name: str, address: str) -> str:
        with pytest.raises(UsageError) as found, runner(name, address):
            pytest.fail("connected")
        return str(found.value)

    assert refusal("local", "auto") == "--address auto names a Ray cluster: add --runner ray"
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    for address in ("nonsense", ":6379", "ray://head:10001", "head:port"):
        assert refusal("ray", address) == f"--address {address} is neither auto nor HOST:PORT"
    assert "no Ray cluster answers (" in refusal("ray", f"localhost:{free_port()}")


def test_without_ray_the_user_reads_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"not installed: pip install 'dermscale\[ray\]'"), runner("ray", None):
        pytest.fail("connected")
