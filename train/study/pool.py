"""Workers that share out the cells of a study: one a device, each staying with one model as long as it has cells."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Protocol

from train.study.cells import Cell
from train.study.folder import StudyFolder
from train.study.worker import At, Ended, Order, Warned, work

POLL_S = 0.25
GRACE_S = 30.0
"""How long a worker that was asked to stop may take to write its checkpoint before it is killed."""


class View(Protocol):
    """Who is told what happens."""

    def began(self, slot: "Slot") -> None:
        """A slot's worker was given a cell."""
        ...

    def at(self, slot: "Slot") -> None:
        """Time has passed, or a slot's cell has come further."""
        ...

    def ended(self, cell: Cell, ended: Ended, wall_s: float) -> None:
        """A cell is finished, stopped or failed."""
        ...

    def warn(self, text: str) -> None:
        """A cell gave a warning."""
        ...


@dataclass
class Slot:
    """One device's place: its worker process, the model that this has in hand, and the cell it trains."""

    number: int
    gpu: str | None
    model: str = ""
    process: SpawnProcess | None = None
    pipe: Connection | None = None
    cell: Cell | None = None
    began: float = 0.0
    news: At = field(default_factory=lambda: At("start", 0, 1))
    log: Path = Path()
    stopped_at: float | None = None


@dataclass
class Pool:
    """Runs cells. gpus: names of the devices for CUDA_VISIBLE_DEVICES, or [None]: one worker with what there is.

    recorded: called with the journal's entry of each cell that has ended. unwanted: files that are deleted from a
    finished cell. worker: what runs in a process of its own.
    """

    folder: StudyFolder
    view: View
    gpus: Sequence[str | None]
    recorded: Callable[[dict[str, Any]], None]
    unwanted: tuple[str, ...] = ()
    worker: Callable[[Connection, str | None, Path, float], None] = work

    def run(self, cells: Sequence[Cell], stop: Callable[[], int]) -> list[str]:
        """Train every cell; returns the names of those that failed.

        stop: how often the user has asked to stop: once, workers write a checkpoint and end; twice, they are killed.
        """
        left, failed = list(cells), []
        slots = [Slot(number, gpu) for number, gpu in enumerate(self.gpus)]
        try:
            while True:
                asked = stop()
                for slot in slots:
                    if not asked and slot.cell is None and left:
                        self._give(slot, left.pop(self._choose(slot, slots, left)), left)
                    if asked and slot.cell is not None:
                        self._ask_to_stop(slot, asked)
                busy = [slot for slot in slots if slot.cell is not None]
                if not busy:
                    return failed
                for slot in self._with_news(busy):
                    cell = slot.cell
                    ended = self._listen(slot)
                    if cell is not None and ended is not None:
                        wall_s = time.perf_counter() - slot.began
                        if ended.outcome == "stopped" and slot.stopped_at is None:
                            ended = Ended("failed", error="somebody sent the worker SIGTERM; its checkpoint is kept")
                        slot.cell = None
                        if ended.outcome == "failed":
                            failed.append(cell.name)
                            self._dismiss(slot)  # a process in which something went wrong trains nothing more
                        self.view.ended(cell, ended, wall_s)
                        self.recorded(self.folder.ended(cell, ended.outcome, ended.error, wall_s))
                for slot in busy:
                    self.view.at(slot)
        finally:
            for slot in slots:
                self._dismiss(slot)

    # ------------------------------------------------------------------ who trains what

    @staticmethod
    def _choose(slot: Slot, slots: Sequence[Slot], left: Sequence[Cell]) -> int:
        """Position of the cell that a free slot takes: of its own model, else of one that nobody has in hand, else of
        the one with the most work left."""
        mine = [i for i, cell in enumerate(left) if cell.config.model == slot.model]
        if mine:
            return mine[0]
        taken = {other.model for other in slots if other.cell is not None}
        free = [i for i, cell in enumerate(left) if cell.config.model not in taken]
        if free:
            return free[0]
        work_left: dict[str, int] = {}
        for cell in left:
            work_left[cell.config.model] = work_left.get(cell.config.model, 0) + cell.images
        most = max(work_left, key=lambda model: work_left[model])
        return next(i for i, cell in enumerate(left) if cell.config.model == most)

    def _give(self, slot: Slot, cell: Cell, left: Sequence[Cell]) -> None:
        """Hand a cell to a slot's worker, a new one where the slot has none for this model. left: what comes later."""
        ahead = sum(other.images for other in left if other.config.model == cell.config.model) // len(self.gpus)
        slot.began = time.perf_counter()
        if slot.model != cell.config.model or slot.process is None or not slot.process.is_alive():
            self._dismiss(slot)
            self._hire(slot, cell.config.model)
        slot.cell, slot.news, slot.stopped_at = cell, At("start", 0, 1), None
        assert slot.pipe is not None
        with contextlib.suppress(OSError):  # it has just died: `_listen` finds out, and how
            slot.pipe.send(Order(cell.config, self.folder.cell(cell.name), ahead, self.unwanted))
        self.view.began(slot)

    def _hire(self, slot: Slot, model: str) -> None:
        """Start a worker. Spawned, not forked: a fork of a process with threads or a CUDA context is not safe."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        slot.model = model
        slot.log = self.folder.log(f"{model.replace('/', '-')}-{slot.number}")
        slot.process = context.Process(
            target=self.worker,
            args=(theirs, slot.gpu, slot.log, time.perf_counter()),
            name=f"{model}-{slot.number}",
            daemon=True,
        )
        slot.process.start()
        theirs.close()
        slot.pipe = ours

    # ------------------------------------------------------------------ what comes back

    @staticmethod
    def _with_news(busy: Sequence[Slot]) -> list[Slot]:
        """The slots whose worker has sent something or has died, after POLL_S at the most."""
        handles: dict[object, Slot] = {}
        for slot in busy:
            assert slot.pipe is not None and slot.process is not None
            handles |= {slot.pipe: slot, slot.process.sentinel: slot}
        found = wait(list(handles), timeout=POLL_S)  # pyright: ignore[reportArgumentType]
        return [slot for slot in busy if any(handles[one] is slot for one in found)]

    def _listen(self, slot: Slot) -> Ended | None:
        """Take all that a worker has sent; how its cell ended, None where it has not."""
        assert slot.pipe is not None and slot.process is not None
        try:
            while slot.pipe.poll():
                news = slot.pipe.recv()
                if isinstance(news, Ended):
                    return news
                if isinstance(news, At):
                    slot.news = news
                elif isinstance(news, Warned):
                    self.view.warn(f"{slot.cell.name if slot.cell else slot.model}: {news.text}")
        except (EOFError, OSError):
            slot.process.join(GRACE_S)
        if slot.process.is_alive():
            return None
        if slot.stopped_at is not None:
            return Ended("stopped", error="ended before it could write a checkpoint")
        return Ended("failed", error=self._obituary(slot))

    @staticmethod
    def _obituary(slot: Slot) -> str:
        """How a worker died."""
        code = slot.process.exitcode if slot.process is not None else None
        if code is None or code >= 0:
            return f"the worker left with exit code {code}; its last words are in {slot.log}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "unknown"
        memory = "; where nobody sent it, the machine's memory was full" if -code == signal.SIGKILL else ""
        return f"the worker was killed by signal {-code} ({name}){memory}; its last words are in {slot.log}"

    # ------------------------------------------------------------------ the end

    @staticmethod
    def _ask_to_stop(slot: Slot, asked: int) -> None:
        """SIGTERM once; SIGKILL when it is asked again, or takes longer than GRACE_S."""
        assert slot.process is not None
        if slot.stopped_at is None:
            slot.stopped_at = time.monotonic()
            slot.process.terminate()
        elif asked > 1 or time.monotonic() - slot.stopped_at > GRACE_S:
            slot.process.kill()

    @staticmethod
    def _dismiss(slot: Slot) -> None:
        """End a slot's worker, if it has one, and wait until it is gone: its memory is needed."""
        if slot.process is None or slot.pipe is None:
            return
        if slot.cell is None and slot.process.is_alive():
            with contextlib.suppress(OSError):  # it has just died
                slot.pipe.send(None)
        else:
            slot.process.kill()
        slot.pipe.close()
        slot.process.join(5.0)
        if slot.process.is_alive():
            slot.process.kill()
            slot.process.join()
        slot.process, slot.pipe, slot.model = None, None, ""


def visible_gpus(device_name: str) -> list[str | None]:
    """One entry a GPU that the study may use, in the terms of CUDA_VISIBLE_DEVICES; [None] for the CPU.

    device_name: `--device`; `cpu` and `cuda:N` mean one worker. torch is asked only where there is a driver.
    """
    if device_name not in ("auto", "cuda") or not _has_driver():
        return [None]
    from train import device as devices

    count = devices.gpu_count()
    named = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    if count <= 1:
        return [None]
    return list(named[:count]) if named else [str(number) for number in range(count)]


def _has_driver() -> bool:
    """Whether NVIDIA's driver is on this machine."""
    if sys.platform != "linux":
        return False
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
