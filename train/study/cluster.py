"""The worker pool's workers on a Ray cluster: each is an actor with a GPU or cores, and holds a worker process.

The actor is the same `Process` as on one machine, on another one: the pool's calls travel to it. A worker that sees
the folder of the study writes into it. Otherwise the files of a cell go to it and come back when the cell ends.
"""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import click

from shards.common.cluster import RETRIES, nodes
from shards.common.errors import DataError, DermscaleError, UsageError, one_line
from shards.common.files import lock, write_durably
from train.study.cells import Cell
from train.study.folder import StudyFolder
from train.study.process import GRACE_S, Process
from train.study.sharing import Sharing, decide
from train.study.worker import Ended, Job, Message

_POLL_S, _END_S = 0.25, 10.0


@dataclass(frozen=True)
class Devices:
    """The devices of a cluster: GPUs, or the cores of a node. cores: those that each has at least."""

    number: int
    cores: int
    gpu: bool

    def resources(self, per_device: int = 1) -> dict[str, Any]:
        """What Ray reserves for each of several workers of a device."""
        share: dict[str, Any] = {"num_cpus": max(1, self.cores // per_device)}
        return share | ({"num_gpus": int(1e4 / per_device) / 1e4} if self.gpu else {})


def devices(name: str) -> Devices:
    """The devices that `--device` names. Raises UsageError if the cluster has none, or Ray cannot choose this one."""
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {name} with --runner ray: Ray chooses the GPU; use auto, cpu or cuda")
    found = nodes()
    with_gpus = [node for node in found if node.get("GPU", 0) >= 1] if name != "cpu" else []
    if with_gpus:
        cores = min(node.get("CPU", 0) // node["GPU"] for node in with_gpus)
        return Devices(int(sum(node["GPU"] for node in with_gpus)), max(1, int(cores)), True)
    cores = [int(node["CPU"]) for node in found if node.get("CPU", 0) >= 1]
    if name == "cuda" or not cores:
        raise UsageError(f"--device {name}: no node of the Ray cluster has {'a GPU' if name == 'cuda' else 'a core'}")
    return Devices(len(cores), min(cores), False)


def share(
    found: Devices,
    wanted: int | None,
    cells: Sequence[Cell],
    earlier: Sharing | None,
    log: Path,
    stop: Callable[[], int],
) -> Sharing:
    """`sharing.decide` for devices of the cluster: its trial runs on one of them. Threads are always a number.

    Without one, a worker would take as many as Ray thinks right, and the bits on a CPU depend on it.
    """
    import ray
    from ray.exceptions import RayError

    arguments = (wanted, cells, [None] * found.number, earlier, log)
    if wanted is not None or earlier is not None or found.cores < 2:
        sharing = decide(*arguments, stop, found.cores)
    else:
        click.echo("a short trial on a node of the cluster decides how many cells share a device")
        there: Any = ray.remote(**found.resources(), max_retries=0)(decide)
        trial = there.remote(*arguments, _never, found.cores)
        while not stop() and not ray.wait([trial], timeout=_POLL_S)[0]:
            pass
        try:
            sharing: Any = Sharing() if stop() else ray.get(trial)
        except RayError as error:
            sharing = Sharing(reason=f"the trial failed: {one_line(error, 200)}")
        ray.cancel(trial, force=True)
    return replace(sharing, threads=sharing.threads or max(1, found.cores // sharing.per_device))


def _never() -> int:
    return 0


@contextmanager
def workers(
    found: Devices, per_device: int, folder: StudyFolder, say: Callable[[str], None]
) -> Iterator[list["RayProcess"]]:
    """As many workers as the devices have room for. say: hears where run folders are written, once a node."""
    import ray

    sign = folder.path.absolute() / f".seen-{uuid4().hex}"
    sign.touch()
    actor, said = ray.remote(**found.resources(per_device))(Remote), set[str]()

    def say_once(text: str) -> None:
        if text not in said:
            said.add(text)
            say(text)

    def make() -> Any:
        return actor.remote(sign, Path.cwd())

    made = [RayProcess(make, folder.path, say_once) for _ in range(found.number * per_device)]
    try:
        yield made
    finally:
        ending = [one.actor.end.remote(True) for one in made if one.shared is not None]
        if ending:
            ray.wait(ending, num_returns=len(ending), timeout=_END_S)
        for one in made:
            ray.kill(one.actor)
        sign.unlink(missing_ok=True)


class Remote(Process):
    """The worker process on its node. Ray makes an actor of it."""

    def __init__(self, sign: Path, working: Path) -> None:
        """sign: a file in the folder of the study. working: the folder that relative paths start from."""
        super().__init__()
        self._scratch = None if sign.exists() else tempfile.TemporaryDirectory(prefix="dermscale-")
        if working.is_dir():
            os.chdir(working)

    def seen(self) -> tuple[str, bool]:
        """The name of this machine, and whether it sees the folder of the study."""
        return socket.gethostname(), self._scratch is None

    def _place(self, path: Path) -> Path:
        return path if self._scratch is None else Path(self._scratch.name) / path.name

    def train(self, job: Job, files: dict[str, bytes], new: tuple[str, Path] | None) -> list[Message]:
        """Give it a cell, and return its first messages.

        files: of the run folder, if this machine does not see it. new: name and log of a process to start first.
        """
        out = self._place(job.out)
        for name, content in files.items():
            out.mkdir(exist_ok=True)
            (out / name).write_bytes(content)
        _wait_for_lock(out)
        if new is not None:
            self.start(new[0], self._place(new[1]))
        self.send(replace(job, out=out))
        return self.listen()

    def listen(self) -> list[Message]:
        """Its messages; waits for the first a moment."""
        self.wait([self], _POLL_S)
        return self.receive()

    def files(self, out: Path) -> dict[str, bytes]:
        """The files of a run folder that is not seen where the grid runs. They are removed here."""
        found = files_of(self._place(out))
        shutil.rmtree(self._place(out), ignore_errors=True)
        return found


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a run folder by name, the result last; without hidden ones, such as its lock."""
    names = sorted(one for one in folder.iterdir() if not one.name.startswith(".")) if folder.is_dir() else []
    return {one.name: one.read_bytes() for one in sorted(names, key=lambda one: one.name == "result.json")}


def _wait_for_lock(out: Path) -> None:
    """Wait, at most GRACE_S, until a process that a lost actor has left behind has written its checkpoint."""
    end = time.monotonic() + GRACE_S
    while (out / ".lock").exists() and time.monotonic() < end:
        with (out / ".lock").open("rb") as file:
            try:
                return lock(file, out, "in use")
            except DataError:
                time.sleep(_POLL_S)


class RayProcess(Process):
    """The grid's end of an actor. If that is lost, the next one is asked for, which comes when there is room."""

    def __init__(self, make: Callable[[], Any], study: Path, say: Callable[[str], None]) -> None:
        """make: asks Ray for an actor. study: its folder. say: hears where run folders are written."""
        super().__init__()
        self._make, self._study, self._say, self._refused = make, study, say, 0
        self._begin()

    def _begin(self) -> None:
        self.actor, self.shared, self._started = self._make(), None, False
        self._new: tuple[str, Path] | None = None
        self._out = Path()
        self.news: Any = self.actor.seen.remote()

    @property
    def ready(self) -> bool:
        """Whether the cluster has given it a device. Raises DermscaleError if workers end as soon as they start."""
        import ray
        from ray.exceptions import RayError

        if self.shared is None and ray.wait([self.news], timeout=0)[0]:
            try:
                host, self.shared = ray.get(self.news)
            except RayError as error:
                self._refused += 1
                if self._refused > RETRIES:
                    raise DermscaleError(f"the cluster cannot start a worker: {one_line(error, 300)}") from None
                self._begin()
            else:
                self._refused = 0
                self._say(
                    f"node {host} writes into {self._study}"
                    if self.shared
                    else f"node {host} does not see {self._study}: the files of a cell come back when it ends"
                )
        return self.shared is not None

    @property
    def alive(self) -> bool:
        """Whether a process was started and has not been reported as ended."""
        return self._started

    def start(self, name: str, log: Path) -> None:
        """Start a process on the node, when the next cell goes there."""
        self._new, self._started = (name, log.absolute()), True

    def send(self, job: Job) -> None:
        """Give it a cell, with the files of the run folder if the node does not see them."""
        self._out = job.out.absolute()
        files = {} if self.shared else files_of(self._out)
        self.news = self.actor.train.remote(replace(job, out=self._out), files, self._new)
        self._new = None

    def receive(self) -> list[Message]:
        """The messages since the last call; one Ended `lost`, if the actor is lost."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        if not ray.wait([self.news], timeout=0)[0]:
            return []
        try:
            found = ray.get(self.news)
            if not (found and isinstance(found[-1], Ended)):
                self.news = self.actor.listen.remote()
            elif not self.shared:
                files: dict[str, bytes] = ray.get(self.actor.files.remote(self._out))
                for name, content in files.items():
                    self._out.mkdir(parents=True, exist_ok=True)
                    write_durably(self._out / name, content)
        except RayTaskError as error:  # such as a full disk of the node
            return [Ended("failed", error=one_line(error.cause, 300))]
        except RayError as error:
            self._begin()
            return [Ended("lost", error=f"its node or its worker was lost ({one_line(error, 160)})")]
        return found

    @staticmethod
    def wait(processes: Sequence[Process], timeout_s: float) -> None:
        """Wait until one of them has news."""
        import ray

        ray.wait([one.news for one in processes if isinstance(one, RayProcess)], timeout=timeout_s)

    def stop(self, kill: bool) -> None:
        """Stop the process on the node."""
        self.actor.stop.remote(kill)

    def end(self, idle: bool) -> None:
        """End the process on the node, and keep the device."""
        self._started = False
        self.actor.end.remote(idle)
