"""The worker pool of a study: one or more workers per device, each with one model as long as that has cells left."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from train.study.cells import Cell
from train.study.folder import StudyFolder
from train.study.view import Lines
from train.study.worker import Ended, Job, Slot, Status, Warned, work

POLL_S = 0.25
GRACE_S = 30.0
"""Seconds that a worker may take to write its checkpoint when it is stopped. Then it is killed."""


@dataclass
class Pool:
    """Trains cells.

    gpus: one name per worker, for CUDA_VISIBLE_DEVICES; workers with the same name share a GPU. None: no restriction.
    recorded: called with the journal's entry of each cell that has ended. unwanted: files that the grid deletes from a
    finished cell. worker: the function that each worker process runs.
    """

    folder: StudyFolder
    view: Lines
    gpus: Sequence[str | None]
    recorded: Callable[[dict[str, Any]], None]
    unwanted: tuple[str, ...] = ()
    worker: Callable[[Connection, str | None, Path, float], None] = work
    _warned: set[str] = field(default_factory=set)

    def run(self, cells: Sequence[Cell], stop: Callable[[], int]) -> list[str]:
        """Train every cell. Returns the names of the cells that failed.

        stop: how often the user has asked to stop. After the first time, workers write a checkpoint and end. After the
        second, they are killed.
        """
        left, failed = list(cells), []
        slots = [Slot(number, gpu) for number, gpu in enumerate(self.gpus)]
        try:
            while True:
                asked = stop()
                for slot in slots:
                    if not asked and slot.cell is None and left:
                        self._assign(slot, left.pop(self._choose(slot, slots, left)), left)
                    if asked and slot.cell is not None:
                        self._stop(slot, asked)
                busy = [slot for slot in slots if slot.cell is not None]
                if not busy:
                    return failed
                for slot in self._wait(busy):
                    cell = slot.cell
                    ended = self._receive(slot)
                    if cell is not None and ended is not None:
                        wall_s = time.perf_counter() - slot.started
                        if ended.outcome == "stopped" and slot.stopped_at is None:
                            ended = Ended(
                                "failed",
                                error="the worker was stopped by a SIGTERM from outside; its checkpoint is kept",
                            )
                        slot.cell = None
                        if ended.outcome == "failed":
                            failed.append(cell.name)
                            self._end_worker(slot)  # after a failure the next cell gets a new process
                        self.view.ended(cell, ended, wall_s)
                        entry = self.folder.ended(cell, ended.outcome, ended.error, wall_s, self.unwanted)
                        self.recorded(entry)
        finally:
            for slot in slots:
                self._end_worker(slot)

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
        ahead = sum(other.images for other in left if other.config.model == cell.config.model) // len(self.gpus)
        slot.started = time.perf_counter()
        if slot.model != cell.config.model or slot.process is None or not slot.process.is_alive():
            self._end_worker(slot)
            self._start_worker(slot, cell.config.model)
        slot.cell, slot.status, slot.stopped_at = cell, Status("start", 0, 1), None
        assert slot.pipe is not None
        with contextlib.suppress(OSError):  # it has just died: `_receive` reports it
            sharing = self.gpus.count(slot.gpu)
            slot.pipe.send(Job(cell.config, self.folder.cell(cell.name), ahead, self.unwanted, sharing))
        self.view.started(slot)

    def _start_worker(self, slot: Slot, model: str) -> None:
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

    # ------------------------------------------------------------------ messages

    @staticmethod
    def _wait(busy: Sequence[Slot]) -> list[Slot]:
        """Wait, at most POLL_S. Returns the slots whose worker has sent a message or has died."""
        handles: dict[object, Slot] = {}
        for slot in busy:
            assert slot.pipe is not None and slot.process is not None
            handles |= {slot.pipe: slot, slot.process.sentinel: slot}
        found = wait(list(handles), timeout=POLL_S)  # pyright: ignore[reportArgumentType]
        return [slot for slot in busy if any(handles[one] is slot for one in found)]

    def _receive(self, slot: Slot) -> Ended | None:
        """Take all messages of a worker. Returns how its cell ended, or None if it has not ended."""
        assert slot.pipe is not None and slot.process is not None
        try:
            while slot.pipe.poll():
                message = slot.pipe.recv()
                if isinstance(message, Ended):
                    return message
                if isinstance(message, Status):
                    slot.status = message
                elif isinstance(message, Warned):
                    self._warn(slot, message.text)
        except (EOFError, OSError):
            slot.process.join(GRACE_S)
        if slot.process.is_alive():
            return None
        if slot.stopped_at is not None:
            return Ended("stopped", error="ended before it could write a checkpoint")
        return Ended("failed", error=self._exit_reason(slot))

    def _warn(self, slot: Slot, text: str) -> None:
        """Show a warning, unless there was one that begins alike (up to its colon): each worker warns once itself."""
        what = text.partition(":")[0]
        if what not in self._warned:
            self._warned.add(what)
            self.view.warn(f"{slot.cell.name if slot.cell else slot.model}: {text}")

    @staticmethod
    def _exit_reason(slot: Slot) -> str:
        """Why a worker process ended, in one line."""
        code = slot.process.exitcode if slot.process is not None else None
        if code is None or code >= 0:
            return f"the worker ended with exit code {code}; see {slot.log}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "unknown"
        memory = " (the system does so if memory is full)" if -code == signal.SIGKILL else ""
        return f"the worker was killed by signal {-code} ({name}){memory}; see {slot.log}"

    # ------------------------------------------------------------------ ending workers

    @staticmethod
    def _stop(slot: Slot, asked: int) -> None:
        """Send SIGTERM the first time. Send SIGKILL if the user asks again or GRACE_S have passed."""
        assert slot.process is not None
        if slot.stopped_at is None:
            slot.stopped_at = time.monotonic()
            slot.process.terminate()
        elif asked > 1 or time.monotonic() - slot.stopped_at > GRACE_S:
            slot.process.kill()

    @staticmethod
    def _end_worker(slot: Slot) -> None:
        """End the worker of a slot, if there is one, and wait for its end: the next one needs its memory."""
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
