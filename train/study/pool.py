"""The worker pool of a study: one or more workers per device, each with one model as long as that has cells left."""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.common.cluster import RETRIES
from train.study.cells import Cell
from train.study.folder import StudyFolder
from train.study.process import GRACE_S, Process, Slot
from train.study.view import Lines
from train.study.worker import Ended, Job, Status, Warned

POLL_S = 0.25


@dataclass
class Pool:
    """Trains cells.

    workers: each trains one cell at a time; all of one kind. per_device: how many of them share a device. recorded:
    called with the journal's entry of each cell that has ended. unwanted: files that the grid deletes from a finished
    cell.
    """

    folder: StudyFolder
    view: Lines
    workers: Sequence[Process]
    recorded: Callable[[dict[str, Any]], None]
    unwanted: tuple[str, ...] = ()
    per_device: int = 1
    _warned: set[str] = field(default_factory=set)
    _lost: Counter[str] = field(default_factory=Counter)

    def run(self, cells: Sequence[Cell], stop: Callable[[], int]) -> list[str]:
        """Train every cell. Returns the names of the cells that failed.

        stop: how often the user has asked to stop. After the first time, workers write a checkpoint and end. After the
        second, they are killed.
        """
        left, failed = list(cells), []
        slots = [Slot(number, worker) for number, worker in enumerate(self.workers)]
        try:
            while True:
                asked = stop()
                for slot in slots:
                    if not asked and slot.cell is None and left and slot.worker.ready:
                        self._assign(slot, left.pop(self._choose(slot, slots, left)), left)
                busy = [slot for slot in slots if slot.cell is not None]
                if not busy and (asked or not left):
                    return failed
                if busy:
                    busy[0].worker.wait([slot.worker for slot in busy], POLL_S)
                else:
                    time.sleep(POLL_S)  # until the cluster gives a device
                asked = stop()
                for slot in busy:
                    if asked:
                        self._stop(slot, asked)
                    cell = slot.cell
                    ended = self._receive(slot)
                    if cell is not None and ended is not None:
                        slot.cell = None
                        if ended.outcome == "lost":
                            self._lost[cell.name] += 1
                            self.view.warn(f"{cell.name}: {ended.error}; it is trained again")
                            left.insert(0, cell)
                            continue
                        wall_s = time.perf_counter() - slot.started
                        if ended.outcome == "failed":
                            failed.append(cell.name)
                            self._end_worker(slot, idle=False)  # after a failure the next cell gets a new process
                        self.view.ended(cell, ended, wall_s)
                        entry = self.folder.ended(cell, ended.outcome, ended.error, wall_s, self.unwanted)
                        self.recorded(entry)
        finally:
            for slot in slots:
                self._end_worker(slot, idle=slot.cell is None)

    # ------------------------------------------------------------------ assigning cells

    @staticmethod
    def _choose(slot: Slot, slots: Sequence[Slot], left: Sequence[Cell]) -> int:
        """The index of the cell for a free slot: of its own model; else of a model that no other slot trains; else of
        the model with the most images left."""
        mine = [i for i, cell in enumerate(left) if cell.config.model == slot.model]
        if mine:
            return mine[0]
        taken = {other.model for other in slots if other.cell is not None}
        free = [i for i, cell in enumerate(left) if cell.config.model not in taken]
        if free:
            return free[0]
        images_left: dict[str, int] = {}
        for cell in left:
            images_left[cell.config.model] = images_left.get(cell.config.model, 0) + cell.images
        most = max(images_left, key=lambda model: images_left[model])
        return next(i for i, cell in enumerate(left) if cell.config.model == most)

    def _assign(self, slot: Slot, cell: Cell, left: Sequence[Cell]) -> None:
        """Send a cell to the worker of a slot; start a worker if there is none for this model. left: later cells."""
        model = cell.config.model
        ahead = sum(other.images for other in left if other.config.model == model) // len(self.workers)
        slot.started = time.perf_counter()
        if slot.model != model or not slot.worker.alive:
            slot.model = model
            name = f"{model.replace('/', '-')}-{slot.number}"
            slot.worker.start(name, self.folder.log(name))
        slot.cell, slot.status, slot.stopped_at = cell, Status("start", 0, 1), None
        slot.worker.send(Job(cell.config, self.folder.cell(cell.name), ahead, self.unwanted, self.per_device))
        self.view.started(slot)

    # ------------------------------------------------------------------ messages

    def _receive(self, slot: Slot) -> Ended | None:
        """Take all messages of a worker. Returns how its cell ended, or None if it has not ended."""
        for message in slot.worker.receive():
            if isinstance(message, Ended):
                return self._outcome(slot, message)
            if isinstance(message, Status):
                slot.status = message
            else:
                self._warn(slot, message)
        return None

    def _outcome(self, slot: Slot, ended: Ended) -> Ended:
        """What the end of a cell means: whether a stop was asked for, and whether it has been lost too often."""
        if ended.outcome in ("died", "lost") and slot.stopped_at is not None:
            return Ended("stopped", error="ended before it could write a checkpoint")
        if ended.outcome == "stopped" and slot.stopped_at is None:
            return Ended("failed", error="the worker was stopped by a SIGTERM from outside; its checkpoint is kept")
        lost = slot.cell is not None and self._lost[slot.cell.name]
        if ended.outcome == "died" or (ended.outcome == "lost" and lost == RETRIES):
            return Ended("failed", error=ended.error)
        return ended

    def _warn(self, slot: Slot, warned: Warned) -> None:
        """Show a warning, unless there was one that begins alike (up to its colon): each worker warns once itself."""
        what = warned.text.partition(":")[0]
        if what not in self._warned:
            self._warned.add(what)
            self.view.warn(f"{slot.cell.name if slot.cell else slot.model}: {warned.text}")

    # ------------------------------------------------------------------ ending workers

    @staticmethod
    def _stop(slot: Slot, asked: int) -> None:
        """Ask the worker to stop the first time. Kill it if the user asks again or GRACE_S have passed."""
        if slot.stopped_at is None:
            slot.stopped_at = time.monotonic()
            slot.worker.stop(kill=False)
        elif asked > 1 or time.monotonic() - slot.stopped_at > GRACE_S:
            slot.worker.stop(kill=True)

    @staticmethod
    def _end_worker(slot: Slot, idle: bool) -> None:
        slot.worker.end(idle)
        slot.model = ""


def visible_gpus(device_name: str) -> list[str | None]:
    """One entry per GPU that the study may use, as in CUDA_VISIBLE_DEVICES; [None] for the CPU.

    device_name: `--device`; `cpu` and `cuda:N` mean one worker. torch is imported only if there is a driver.
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
