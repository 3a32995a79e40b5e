"""Several processes against one: the same losses, metrics and resume; and no hang when one of them dies."""

import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shards.common.errors import DataError, UsageError
from tests.conftest import free_port
from tests.support.train_runs import WORKER, child_environment, losses, small, start_worker, weights
from train.compiling import Compilation
from train.config import resolved
from train.console import Silent
from train.device import Decision
from train.distributed import World, world
from train.loop import train_once
from train.prepare import choose_data, prepare
from train.workspace import Workspace

NORM_FREE = {"model": "test_vit", "batch_size": 8, "epochs": 3, "steps": 20}
"""Layer norm only and no dropout: nothing in it depends on which process holds which sample."""


def run_ranks(
    order: dict[str, Any], ranks: int, *, restarts: int = 0, timeout_s: int = 240
) -> subprocess.CompletedProcess[str]:
    """`torchrun` with so many processes of tests/support/train_worker.py."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [sys.executable, *launch, "--max-restarts", str(restarts), str(WORKER), json.dumps(order)],
        env=child_environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def assert_equal_within_float_error(one: Path, several: Path) -> None:
    """Loss curve within 1e-4, relative; metrics of the same images; the same number of them."""
    torch.testing.assert_close(torch.tensor(losses(several)), torch.tensor(losses(one)), rtol=1e-4, atol=0)
    results = [json.loads((run / "result.json").read_text()) for run in (one, several)]
    for part in ("images", "steps", "training_images_per_class"):
        assert results[0][part] == results[1][part]
    for name in ("balanced_accuracy", "macro_auc", "macro_f1"):
        assert results[1]["test"][name]["value"] == pytest.approx(results[0]["test"][name]["value"], abs=1e-3)
    assert results[0]["test"]["images"] == results[1]["test"]["images"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {}),
        (2, {"mixup": 0.4, "cutmix": 1.0, "erasing": 0.5, "loss": "class-weighted"}),
        (3, {"loss": "class-weighted"}),
    ],
)
def test_torchrun_gives_the_loss_curve_of_one_process(
    tiny_shards: Path, tmp_path: Path, ranks: int, changes: dict
) -> None:
    config = small(tiny_shards, **changes, **NORM_FREE)  # 8 images over 3 processes: 2, 3 and 3
    train_once(config, tmp_path / "alone")
    done = run_ranks({"config": config.to_dict(), "out": str(tmp_path / "run")}, ranks)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["world_size"] == ranks
    assert_equal_within_float_error(tmp_path / "alone", tmp_path / "run")


def test_a_job_goes_on_after_a_death_with_another_number_of_ranks(tiny_shards: Path, tmp_path: Path) -> None:
    config = small(tiny_shards, **NORM_FREE)
    train_once(config, tmp_path / "alone")
    order = {"config": config.to_dict(), "out": str(tmp_path / "run"), "kill_at": 6, "kill_rank": 1}
    broken = run_ranks(order, 3)
    assert broken.returncode != 0
    assert "exitcode" in broken.stderr or "lost another process" in broken.stderr
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 3 <= len(written) < 20
    train_once(config, tmp_path / "run", resume=True)  # one process where there were three
    assert_equal_within_float_error(tmp_path / "alone", tmp_path / "run")


@pytest.mark.slow
def test_torchrun_restarts_a_job_that_goes_on_by_itself(tiny_shards: Path, tmp_path: Path) -> None:
    config = small(tiny_shards, **NORM_FREE)
    train_once(config, tmp_path / "alone")
    order = {"config": config.to_dict(), "out": str(tmp_path / "run"), "kill_at": 5, "kill_rank": 1}
    done = run_ranks(order, 2, restarts=1)
    assert done.returncode == 0, done.stderr
    assert "continuing at step" in (tmp_path / "run" / "log.txt").read_text()
    assert_equal_within_float_error(tmp_path / "alone", tmp_path / "run")


def start_agent(order: dict[str, Any], port: int) -> subprocess.Popen[bytes]:
    """`torchrun` as on one of two machines, with one process of tests/support/train_worker.py."""
    launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "7"]
    return subprocess.Popen(
        [sys.executable, *launch, str(WORKER), json.dumps(order)],
        env=child_environment() | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


def kill_all(agent: subprocess.Popen[bytes]) -> None:
    """Kill an agent with its processes, as if its machine had lost power."""
    for process in [*psutil.Process(agent.pid).children(recursive=True), psutil.Process(agent.pid)]:
        process.kill()
    agent.wait()


@pytest.mark.slow
def test_a_machine_that_is_lost_and_comes_back_changes_no_weight(tiny_shards: Path, tmp_path: Path) -> None:
    config = small(tiny_shards, **NORM_FREE | {"epochs": 6, "steps": 50})
    whole = run_ranks({"config": config.to_dict(), "out": str(tmp_path / "whole")}, 2)
    assert whole.returncode == 0, whole.stderr
    out, port = tmp_path / "run", free_port()
    order = {"config": config.to_dict(), "out": str(out), "resume": True}
    first, second = start_agent(order, port), start_agent(order, port)
    agents = [first, second]
    try:
        while first.poll() is None and not (out / "checkpoint.pt").exists():
            time.sleep(0.02)
        # the rendezvous is where the first agent listens: whoever of the two it is, the other one is lost
        opened = psutil.Process(first.pid).net_connections("tcp")
        lost = second if any(one.status == "LISTEN" and one.laddr.port == port for one in opened) else first
        kill_all(lost)
        assert not (out / "result.json").exists()
        agents.append(start_agent(order, port))
        assert [agent.wait(timeout=180) for agent in agents if agent is not lost] == [0, 0]
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill_all(agent)
    assert "continuing at step" in (out / "log.txt").read_text()
    assert losses(out) == losses(tmp_path / "whole")
    one, other = weights(out), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one) and list(one) == list(other)


def test_a_dead_rank_ends_the_others_with_a_message(tiny_shards: Path, tmp_path: Path) -> None:
    # without torchrun, which would end the survivor itself
    order = {"config": small(tiny_shards, **NORM_FREE).to_dict(), "out": str(tmp_path / "run"), "kill_at": 4}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [start_worker(order | {"kill_rank": 1}, rendezvous | {"RANK": str(rank)}) for rank in range(2)]
    try:
        _, errors = ranks[0].communicate(timeout=120)
        assert ranks[1].wait(10) == -signal.SIGKILL
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == 1
    lines = [line for line in errors.splitlines() if "lost another process" in line]
    assert len(lines) == 1, errors
    assert "rank 0 of 2" in lines[0]
    assert "--resume" in lines[0]
    assert "Traceback" not in errors


def check_parts(rank: int, ranks: int, port: int, data: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    group = dist.new_group(backend="gloo")
    world = World(rank, ranks, torch.device("cpu"), flags=group)  # type: ignore[arg-type]
    # flags: all ranks learn of one rank's wish at the same call, one later
    seen = [world.agree(rank == 1 and call == 2, rank == 0 and call == 3) for call in range(6)]
    world.settle()
    assert seen == [(call == 3, call == 4) for call in range(6)], seen

    # known errors of the first rank are raised everywhere
    def fail() -> None:
        raise DataError("of the first rank")

    with pytest.raises(DataError, match="of the first rank"):
        world.from_first(fail)
    assert world.from_first(lambda: rank) == 0

    # so are others, and a compiler that fails in one process is given up in all
    with pytest.raises(ZeroDivisionError if rank == 0 else RuntimeError, match="by zero"):
        world.from_first(lambda: 1 // 0)

    def broken(*_: object) -> None:
        raise RuntimeError("it broke")

    for broken_in, timing in ((None, broken), (1, None)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Compilation, "_make_code", broken if rank == broken_in else lambda *_: None)
            patch.setattr("train.compiling.tried", timing)
            compilation, step = Compilation(), SimpleNamespace(device=torch.device("cpu"), net="eager", model="code")
            compilation.decision = Decision("on", "it pays")
            compilation.compile(step, small(Path("data"), compile="auto"), [32], world, Silent())  # type: ignore[arg-type]
        assert (compilation.decision.value, step.model) == ("off", "eager")
        mine = timing is not None or rank == broken_in
        assert compilation.decision.reason.endswith(": it broke" if mine else ": it failed in another process")
    assert world.gather(rank) == (list(range(ranks)) if rank == 0 else [])

    # `auto` may choose another engine in each process, for a GPU with less free memory: the first one's counts
    config, workspace = resolved(small(data, batch_size=8), "batchnorm"), Workspace()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr("train.prepare.choose", lambda *_: ("resident" if rank == 0 else "native", "", f"of {rank}"))
        selections = choose_data(config, workspace.open(data), "batchnorm", world)
        run = prepare(config, "batchnorm", world, workspace, selections, {}, stack)
        assert {loader.engine_name for loader in run.loaders.values()} == {"resident"}
        assert run.decisions["engine"] == Decision("resident", "of 0")
    dist.destroy_process_group()


def test_flags_errors_decisions_and_gathering_across_ranks(tiny_shards: Path) -> None:
    mp.spawn(check_parts, (3, free_port(), tiny_shards), nprocs=3)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but MASTER_ADDR and MASTER_PORT are not set"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "one"}, "RANK is 'one' and not a whole number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is '' and not a whole number"),
        ({"WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE is 0"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK is 2 and WORLD_SIZE is 2"),
    ],
)
def test_variables_of_a_cluster_that_describe_no_world_are_one_line(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as stop, world("cpu"):
        pass
    assert f"environment variable {said}" in str(stop.value)
    assert str(stop.value).endswith(
        ": start the processes with torchrun, or unset RANK, WORLD_SIZE, LOCAL_RANK to train in one process"
    )


def test_a_rank_alone_trains_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with world("cpu") as here:
        assert (here.rank, here.size) == (0, 1)
