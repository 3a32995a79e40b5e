"""Training steps and evaluations as CUDA graphs: the host launches one graph a batch, and copies nothing for it.

With the engine `resident` the images are on the device already, so the batches of a pass are a table: which pixels,
labels and colours. It is uploaded once an epoch. A cursor on the device picks the batch, so a recorded step can be
replayed for every batch. Recording is in `train/device.py`. On a CPU nothing is recorded, and the same work gives what
`TrainingStep` gives for a loader's batches, to the bit.
"""

import functools
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import torch
from torch import Tensor

from shards import Loader
from shards.common.errors import one_line
from shards.loader import Batch, Tables
from train import device as devices
from train.console import Console, Silent
from train.device import Decision, Recorder
from train.distributed import World
from train.step import TrainingStep, leaving_no_trace


def choose(step: TrainingStep, engine: str, world: World) -> Decision:
    """Whether a run's steps are recorded, and why. engine: of its loaders."""
    if step.device.type == "cpu":
        return Decision("off", "the device is a CPU")
    if world.size > 1:
        return Decision("off", "several processes share each step")
    if engine != "resident":
        return Decision("off", f"the engine {engine} loads each batch from the host")
    if step.precision == "fp16":
        return Decision("off", "the loss scaler of fp16 has not been tried in a graph")
    if not all(group.get("fused") for group in step.optimizer.param_groups):
        return Decision("off", "the optimizer takes the learning rate from the host")
    return Decision("on", "one process, and its images are in the memory of the device")


class Pass:
    """The batches of a loader, one after the other; the device picks each of them by a cursor.

    loader: with the engine `resident`, loaded (`Loader.load`).
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._epoch: int | None = None
        self._tables: list[Tensor] = []
        self._cursor = torch.zeros(1, dtype=torch.int64, device=loader.device)
        self._coming: tuple[int, Future[Tables]] | None = None

    def upload(self, epoch: int = 0) -> None:
        """Upload the table of an epoch. In training, a thread computes that of the next one meanwhile."""
        if epoch == self._epoch:
            return
        coming = self._coming
        planned = coming[1].result() if coming is not None and coming[0] == epoch else self.loader.tables(epoch)
        host = [torch.from_numpy(array) for array in planned]
        if not self._tables:  # a graph reads the same memory in every epoch
            self._tables = [torch.empty_like(one, device=self.loader.device) for one in host]
        for mine, one in zip(self._tables, host, strict=True):
            mine.copy_(one)
        self._epoch = epoch
        if self.loader.train:
            thread = ThreadPoolExecutor(1, thread_name_prefix="train-tables")
            self._coming = epoch + 1, thread.submit(self.loader.tables, epoch + 1)
            thread.shutdown(wait=False)  # it ends with this table

    def seek(self, batch: int) -> None:
        """Make a batch of the epoch the next one."""
        self._cursor.fill_(batch)

    def take(self) -> Batch:
        """The next batch; after the last, the first. Comes after `upload`. There is no host sync."""
        rows, *rest = (table.index_select(0, self._cursor)[0] for table in self._tables)
        self._cursor.add_(1).remainder_(len(self._tables[0]))
        return Batch(self.loader.gather(rows), *rest)


class GraphedStep:
    """`loss = graphed(lr)`: a `TrainingStep` on the next batch, as one CUDA graph once `record` was called."""

    def __init__(self, step: TrainingStep, take: Callable[[], Batch]) -> None:
        """take: gives the next batch without a host sync, like `Pass.take`."""
        self.step, self._take = step, take
        self._lr = torch.zeros((), dtype=devices.rate_type(step.device), device=step.device)
        self._share = torch.zeros((), device=step.device)
        self.px = 0
        """Side of the images, for the step's `mixing`."""
        self._recorded: Callable[[], Tensor] | None = None

    def record(self, recorder: Recorder) -> None:
        """Record the step. Weights, optimizer and random state stay; `take` is called a few times.

        Comes after `TrainingStep.load_state_dict`, and again if the images change their size. Raises RuntimeError if it
        cannot be recorded; calls work without recording then.
        """
        self.forget()
        for group in self.step.optimizer.param_groups:
            if "capturable" in group:  # AdamW refuses to be recorded without it
                group["capturable"] = True
        with leaving_no_trace(self.step):
            self._recorded = recorder.record(self._run)

    def forget(self) -> None:
        """Drop the graph and free its memory."""
        self._recorded = None

    def __call__(self, lr: float) -> Tensor:
        """Update the weights once; return the loss, () on the device, which the next call overwrites. No host sync."""
        step = self.step
        self._lr.fill_(lr)
        if step.mixing is not None:
            step.mixing.seek(step.done, self.px)
        if step.average is not None:
            self._share.fill_(step.average.share(step.done))
        loss = self._run() if self._recorded is None else self._recorded()
        step.done += 1
        return loss

    def _run(self) -> Tensor:
        batch = self._take()
        loss = self.step.backward(batch.images, batch.colour, batch.labels)
        self.step.apply(self._lr, self._share)
        return loss


class Graphs:
    """All that one run records: its step, for one image size at a time, and the forward passes of its evaluations.

    decision: `on` or `off`, and why. If something cannot be recorded, it becomes `off`, after a warning on `console`.
    """

    def __init__(self, step: TrainingStep, loader: Loader, decision: Decision) -> None:
        """loader: of the training split."""
        self.decision = decision
        self.console: Console = Silent()
        self._recorder = Recorder(step.device)
        self._size = 0  # of the images that the step was recorded for, px
        self._training = Pass(loader)
        self._plain, self._graphed = step, GraphedStep(step, self._training.take)
        self._evaluations: dict[tuple[Loader, str], tuple[Pass, Callable[[], tuple[Tensor, ...]]]] = {}

    @property
    def on(self) -> bool:
        """Whether steps and evaluations are taken from here."""
        return self.decision.value == "on"

    def ready(self, epoch: int, px: int) -> float:
        """Plan an epoch and record its step, unless that was done; return the seconds that this took."""
        if not self.on:
            return 0.0
        began = time.perf_counter()
        self._training.loader.set_resolution(px)
        self._training.upload(epoch)
        if px != self._size:
            try:
                self._graphed.record(self._recorder)
            except RuntimeError as error:
                self._failed(error)
            self._size = self._graphed.px = px
        return time.perf_counter() - began

    def steps(self, batch: int = 0) -> Generator[Callable[[float], Tensor], None, None]:
        """For each batch left in the loader's epoch: what takes a step on it, given the learning rate.

        Comes after `ready`. batch: the first of them; the loader is there. Without graphs, the loader loads each.
        """
        loader, step = self._training.loader, self._plain
        if not self.on:
            with closing(iter(loader)) as batches:
                for one in batches:
                    yield functools.partial(step, one.images, one.colour, one.labels)
            return
        self._training.seek(batch)
        for number in range(batch, len(loader)):
            loader.seek(number + 1)
            yield self._graphed

    def outputs(
        self, loader: Loader, forward: Callable[[Batch], tuple[Tensor, ...]], what: str
    ) -> Generator[tuple[Tensor, ...], None, None]:
        """`forward(batch)` of each batch of an evaluation. It is recorded once for a loader and `what` it does."""
        if (loader, what) not in self._evaluations:
            batches = Pass(loader)
            batches.upload()

            def run() -> tuple[Tensor, ...]:
                return forward(batches.take())

            recorded = run
            try:
                recorded = self._recorder.record(run)
            except RuntimeError as error:
                self._failed(error)
            self._evaluations[loader, what] = batches, recorded
        batches, recorded = self._evaluations[loader, what]
        batches.seek(0)
        for _ in range(len(loader)):
            yield tuple(tensor.clone() for tensor in recorded())

    def _failed(self, error: RuntimeError) -> None:
        why = "the memory is too small for it" if devices.is_out_of_memory(error) else one_line(error, 200)
        self.decision = Decision("off", f"recording failed: {why}")
        self._graphed.forget()
        self._evaluations.clear()
        self.console.warn(f"without CUDA graphs: {self.decision.reason}")
