"""Not a test: a Ray cluster of two nodes on this machine, commands that use it, and what is left of Ray."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

SMALL = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}


class TwoNodes:
    """`address`: of the cluster. The second node can be killed, and started again."""

    def __init__(self, cluster: Any) -> None:
        self._cluster, self._second = cluster, cluster.add_node(**SMALL)
        self.address: str = cluster.address

    def kill_second(self) -> None:
        """Kill all processes of the second node at once."""
        self._cluster.remove_node(self._second, allow_graceful=False)

    def start_second(self) -> None:
        """Start the second node again."""
        self._second = self._cluster.add_node(**SMALL)


def ray_processes() -> list[psutil.Process]:
    """The processes of Ray that run on this machine for the folder of its files that RAY_TMPDIR names."""
    folder = os.environ["RAY_TMPDIR"]
    return [one for one in psutil.process_iter(["cmdline"]) if folder in " ".join(one.info["cmdline"] or [])]


def start_python(*words: str) -> subprocess.Popen[str]:
    """Start Python with these arguments, in a process group of its own."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], cwd=Path(__file__).parents[2], start_new_session=True, **pipes)


def ended(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """Wait for a command that ends with this exit code; what it wrote to standard output and standard error."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == code, output + errors
    assert "Traceback" not in errors
    return output, errors


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Start the cluster, each node with one core; at the end, see that no process of Ray is left."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.cluster_utils import Cluster

    with own_folder():
        cluster = Cluster(initialize_head=True, head_node_args=SMALL)
        try:
            yield TwoNodes(cluster)
        finally:
            cluster.shutdown()
        assert not psutil.wait_procs(ray_processes(), timeout=10)[1]


@contextmanager
def own_folder() -> Iterator[None]:
    """A folder for temporary files and for Ray's logs and sockets, whose paths must be short; no usage reports."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)
