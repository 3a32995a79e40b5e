"""Loader: a Selection as batches, the same from every engine, in any number of processes, after any restart."""

import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch.utils.data import IterableDataset, get_worker_info

from shards.common.errors import UsageError
from shards.engines import Draw, Request
from shards.engines.choose import make_engine
from shards.kernels.load import compiled
from shards.kernels.workers import Source
from shards.order import (
    SAMPLERS,
    SHORT,
    balanced_order,
    batch_count,
    check_seed,
    epoch_order,
    evaluation_order,
    rank_slice,
    weighted_order,
    windowed_order,
)
from shards.passage import AHEAD, BESIDES, Passage
from shards.plan import Augment, Plan, evaluation_plan, training_plan

if TYPE_CHECKING:
    from shards.engines.choose import EnginePool
    from shards.shardset import Selection


_TOGETHER = 500
"""Samples whose plan and labels are made in one go, in whole batches: a call of NumPy costs as much for one batch as
for some. With more elements NumPy releases the GIL, and the loader may wait 5 ms to get it back."""


_AHEAD = 256
"""Samples that are loaded ahead, in 2 to 4 batches: work for the 5 ms for which another thread may keep the GIL."""


class Batch(NamedTuple):
    """One rank's part of a global batch; n samples, n the same for every batch of an epoch.

    images: (n, 3, S, S) uint8, 0 to 255, RGB, channels-last. labels: (n,) int64. samples: (n,) int64, row numbers of
    the index. colour: (n, 3, 4) float32, the colour map that `train/head.py` applies (identity in evaluation). mask:
    (n,) bool, False where a sample only pads the last batch of an evaluation. All on the loader's device.
    """

    images: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor
    colour: torch.Tensor
    mask: torch.Tensor

    def to(self, device: str | torch.device, non_blocking: bool = False) -> "Batch":
        """The batch on another device."""
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from which a GPU copies while the CPU goes on."""
        return Batch(*(tensor.pin_memory() for tensor in self))


class Tables(NamedTuple):
    """All batches of a pass, in NumPy arrays (batches, n, …), with what `Loader.gather` makes their images of.

    rows: (batches, n, 7) int64, as `ResidentEngine.table`. The others are those of a Batch.
    """

    rows: np.ndarray
    labels: np.ndarray
    samples: np.ndarray
    colour: np.ndarray
    mask: np.ndarray


_ALWAYS = ("shard_set", "selection", "seed", "batch_size", "train")
"""What every loader state names. States of older releases name nothing else, and what is not named is not compared."""
ADDED: dict[str, Any] = {"sampler": "uniform", "window": 0, "augment_interpolation": "bilinear"}
"""What states of older releases lack, and what these releases had."""


@dataclass(frozen=True)
class _Block:
    """This rank's part of some consecutive batches of n samples each: arrays of (batches × n) samples."""

    n: int
    samples: np.ndarray
    labels: np.ndarray
    plan: Plan
    mask: np.ndarray

    def requests(self) -> Iterator[Request]:
        """What the engine loads, batch by batch."""
        samples, boxes, symmetry = self.samples, self.plan.boxes, self.plan.symmetry
        for start in range(0, len(samples), self.n):
            part = slice(start, start + self.n)
            yield Request(samples[part], boxes[part], symmetry[part])

    def rest(self, device: torch.device) -> "Iterator[tuple[torch.Tensor, ...]]":
        """Labels, samples, colour and mask of each batch, on the device, without waiting for it."""
        arrays = self.labels, self.samples, self.plan.colour, self.mask
        if device.type == "cpu":  # NumPy's slices, because PyTorch's release the GIL
            parts = (slice(start, start + self.n) for start in range(0, len(self.samples), self.n))
            return (tuple(torch.from_numpy(array[part]) for array in arrays) for part in parts)
        tensors = [torch.from_numpy(array).pin_memory().to(device, non_blocking=True) for array in arrays]
        return zip(*(tensor.split(self.n) for tensor in tensors), strict=True)


@dataclass
class _Stream:
    """A running engine. epoch: of the next batch. part: of the rank. batches: the fields of each Batch.

    process: the one that started it. A forked child has none of its threads.
    """

    process: int
    epoch: int
    resolution: int
    part: slice
    batches: Generator[tuple[torch.Tensor, ...], None, None]


class Loader(IterableDataset[Batch]):
    """Batches of a Selection, epoch by epoch. An iterable with `set_epoch`, `state_dict` and `load_state_dict`.

    Training code that takes an iterable takes it as it is. `DataLoader(loader, batch_size=None)` passes its batches on.

    Training shuffles, augments, and drops the last, incomplete batch. Evaluation keeps the selection's order and pads
    the last batch. Batches depend only on selection, batch_size, resolution, seed, epoch, sampler, window and augment:
    not on the engine, on the number of processes or threads, or on restarts. A state holds a position, so resuming
    costs nothing.
    """

    def __init__(
        self,
        selection: "Selection",
        *,
        batch_size: int,
        resolution: int = 224,
        train: bool = True,
        seed: int = 0,
        engine: str = "auto",
        device: str | torch.device = "cpu",
        rank: int | None = None,
        world_size: int | None = None,
        threads: int | None = None,
        prefetch: int | None = None,
        augment: Augment | None = None,
        sampler: str = "uniform",
        window: int | None = None,
        pool: "EnginePool | None" = None,
    ) -> None:
        """Set up. Nothing is read before the first batch.

        batch_size: of the global batch, which `world_size` ranks share. resolution: side of the images in px. engine:
        `auto`, `native`, `dali` or `resident`. rank, world_size: default, those of torch.distributed when a pass
        begins, or 0 and 1 if it is not initialised. threads: at most the cores this process may
        use, which is the default. sampler: `uniform`, each sample once in an epoch, or `balanced`, each class equally
        often: samples of small classes come again, with another crop, turn and colour each time. `weighted:COLUMN`:
        each sample in proportion to a column of the index. window: draw the
        shards in random order and the samples from about so many of them at a time (`order.windowed_order`), for sets
        that are read from a store and do not fit into its cache; default: from all shards. prefetch: batches
        loaded ahead; default, 256 samples in 2 to 4 batches. pool: keeps engines that take long to build for later
        loaders. Raises UsageError for a value outside its range, naming the limit.
        """
        kind, _, column = sampler.partition(":")
        if sampler not in SAMPLERS[:2] and (kind != "weighted" or not column):
            raise UsageError(f"sampler '{sampler}' is unknown: use one of {', '.join(SAMPLERS)}")
        if window is not None and (window < 1 or sampler != "uniform"):
            raise UsageError(
                f"window {window}: give 1 shard or more, and the sampler uniform (the others repeat samples of all "
                "shards)"
            )
        if batch_size < 1:
            raise UsageError(f"batch size {batch_size} is below 1")
        if train and batch_size > len(selection):
            raise UsageError(
                f"batch size {batch_size} is larger than the training set of {len(selection)} images: "
                "choose a smaller batch or a larger fraction"
            )
        if not 1 <= resolution <= 4096:
            raise UsageError(f"resolution {resolution} px is outside 1 to 4096")
        if prefetch is None:
            prefetch = min(max(_AHEAD // batch_size, 2), 4)
        if prefetch < 1 or (threads is not None and threads < 1):
            raise UsageError(f"prefetch {prefetch} and threads {threads}: both must be at least 1")
        if (rank is None) != (world_size is None):
            raise UsageError(f"rank {rank} and world_size {world_size}: give both, or neither for torch.distributed's")
        check_seed(seed, 0)
        # An evaluation goes through one shard after the other; a batch may have samples of several.
        at_once = None if engine == "resident" or (train and window is None) else (window or 1) + AHEAD + BESIDES
        selection.data.refuse_larger(selection.samples, at_once)
        self._passes = selection.data.stored and at_once is not None
        self._options = {"engine": engine, "threads": threads, "prefetch": prefetch, "resolution": resolution}
        self.selection, self.batch_size, self.resolution, self.train = selection, batch_size, resolution, train
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.augment = augment or Augment()
        self._sampler = sampler  # Lightning takes what has a `sampler` for a DataLoader
        self._weights = selection.weights(column) if train and column else None
        self._window = window
        self.device = torch.device(device)
        self.epoch = 0
        self._part()  # checks them
        self.waited_s = 0.0
        """Seconds for which the caller has waited for batches so far, without those for a GPU that is behind."""
        self._position = 0  # global batches of this epoch that were yielded
        self._loaded: dict[str, Any] | None = None  # a state, until a pass that starts there ends
        self._stream: _Stream | None = None  # loads the first batches of the next epoch
        self._engine, self.engine_name, self.engine_reason = make_engine(
            engine,
            selection,
            device=self.device,
            threads=threads,
            prefetch=prefetch,
            pool=pool,
            interpolation=self.augment.interpolation,
        )
        self._coming: tuple[tuple[int, int], Future[np.ndarray]] | None = None  # (process, epoch) and its order
        self._whole: tuple[int, Plan] | None = None  # an epoch and its plan
        data, rows = selection.data, selection.samples
        self._heights, self._widths = data.column("height")[rows], data.column("width")[rows]

    def __len__(self) -> int:
        """Global batches in an epoch."""
        return batch_count(len(self.selection), self.batch_size, self.train)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. With the epoch of a loaded state, the loaded position stays."""
        check_seed(self.seed, epoch)
        if epoch != self.epoch:
            self.epoch, self._loaded, self._position = epoch, None, 0

    def set_resolution(self, resolution: int) -> None:
        """Choose the side of the images, in px, from the next iteration on."""
        if not 1 <= resolution <= 4096:
            raise UsageError(f"resolution {resolution} px is outside 1 to 4096")
        self.resolution = resolution

    def plan(self, epoch: int | None = None) -> tuple[np.ndarray, Plan]:
        """The order of an epoch (default: the current one) as (N,) int64 positions in the selection, and their plan.

        With another sampler than `uniform`, the plan is that of each sample's first time in the epoch.
        """
        if not self.train:
            return np.arange(len(self.selection)), evaluation_plan(self._heights, self._widths, self.augment)
        number = self.epoch if epoch is None else epoch
        samples = self.selection.samples
        plan = training_plan(self.seed, number, samples, self._heights, self._widths, self.augment)
        return self._training_order(number)[0], plan

    def _part(self) -> slice:
        """This rank's part of every global batch."""
        rank, world_size, group = self.rank, self.world_size, torch.distributed
        if rank is None or world_size is None:
            grouped = group.is_available() and group.is_initialized()
            rank, world_size = (group.get_rank(), group.get_world_size()) if grouped else (0, 1)
        return rank_slice(self.batch_size, rank, world_size)

    def __iter__(self) -> Generator[Batch, None, None]:
        """The epoch's batches from its start, or from the position of a loaded state.

        The pass begins with its first batch: it is of the epoch, resolution and position that are set then. After the
        last batch the loader is at the start of the next pass. In training that is the next epoch, whose first batches
        are loading already: small fractions have short epochs, so waiting for the first batch of each would slow
        training noticeably. Passes may run side by side, each through its own epoch. Raises UsageError in a worker
        process of a DataLoader.
        """
        if (worker := get_worker_info()) is not None:
            raise UsageError(
                f"a Loader in a DataLoader with num_workers={worker.num_workers}: use num_workers=0; "
                "the Loader has threads of its own, and its epoch and position do not come back from a worker process"
            )
        epoch, loaded, count = self.epoch, self._loaded, len(self)
        if self.device.type == "cpu":
            ahead = None
        else:
            from shards.engines.transfer import Ahead

            ahead = Ahead(self.device)
        self._position = start = number = 0 if loaded is None else loaded["batch"]
        stream, self._stream = self._stream, None
        passage = self._passage() if self._passes else None
        if passage is not None:
            passage.at(start * self.batch_size)
        wanted = os.getpid(), self.epoch, self.resolution, self._part()
        if stream is None or start or (stream.process, stream.epoch, stream.resolution, stream.part) != wanted:
            if stream is not None:
                stream.batches.close()
            stream = self._open(start)
        try:
            while number < count:
                began = time.perf_counter()
                tensors = next(stream.batches)
                self.waited_s += time.perf_counter() - began
                number += 1
                last = number == count
                if self.epoch == epoch:  # else `set_epoch`, or a pass beside this one, has left this epoch
                    self.epoch, self._position = (epoch + self.train, 0) if last else (epoch, number)
                if last and self._loaded is loaded:
                    self._loaded = None
                if passage is not None:
                    passage.at((number - 1) * self.batch_size)
                yield Batch(*tensors)
                del tensors  # so that its memory is free as soon as the caller has dropped it
                if ahead is not None:
                    ahead.wait()
        finally:
            if self._loaded is loaded:
                self._loaded = None
            if self.train and number == count and start < count and self._stream is None:
                stream.epoch = epoch + 1
                self._stream = stream
            else:
                stream.batches.close()

    # ------------------------------------------------------------------ a pass whose batches the caller picks

    def tables(self, epoch: int) -> Tables:
        """All of this rank's batches of an epoch, for a caller that picks them itself. Needs the engine `resident`."""
        engine: Any = self._engine
        blocks, batches, part = [], 0, self._part()
        for block in self._blocks(epoch, 0, part):
            request = Request(block.samples, block.plan.boxes, block.plan.symmetry)
            blocks.append((engine.table(request), block.labels, block.samples, block.plan.colour, block.mask))
            batches += len(block.samples) // block.n
            if batches == len(self):  # in training, the next block would be of the next epoch
                break
        whole = (np.concatenate(column) for column in zip(*blocks, strict=True))
        return Tables(*(column.reshape(batches, -1, *column.shape[1:]) for column in whole))

    def load(self) -> None:
        """Decode the images, if they were not yet. Needs the engine `resident`."""
        engine: Any = self._engine
        self.selection.data.fetch_ahead(self.selection.samples)
        engine.load()

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The images of a Batch at the current resolution. rows: (n, 7), one batch of `tables`, on the device.

        Comes after `load`. There is no host sync, so a CUDA graph can record it.
        """
        engine: Any = self._engine
        return engine.gather(rows, self.resolution)

    def seek(self, batch: int) -> None:
        """Go on, in this epoch, as if its first `batch` batches had been yielded."""
        if self.train and batch == len(self):
            self.set_epoch(self.epoch + 1)
        else:
            self._loaded, self._position = {"batch": batch}, batch

    # ------------------------------------------------------------------ inside

    def _passage(self) -> Passage:
        """The shards of this epoch, and the first ones of the next."""
        samples, epoch = self.selection.samples, self.epoch
        following = samples[self._order(epoch + 1)[0][: self.batch_size]] if self.train else samples[:0]
        return Passage(self.selection.data, samples[self._order(epoch)[0]], following)

    def _open(self, start: int) -> "_Stream":
        """Start the engine at batch `start` of the current epoch; in training it continues with the next epochs."""
        epoch, part = self.epoch, self._part()
        native: Any = self._engine
        if self.selection.data.stored and not self._passes:
            positions = self._order(epoch)[0]
            self.selection.data.fetch_ahead(self.selection.samples[positions[start * self.batch_size :]])
        if self.engine_name == "native" and native.draws and not self._repeats:
            data = self.selection
            source = Source(data.samples, data.labels, self.augment, self.seed, self.train)
            batches = native.draw(source, self._draws(epoch, start, part), part.stop - part.start, self.resolution)
        else:
            # A thread of DALI's draws from this, and must not keep a loader alive that nobody else has any more.
            batches = self._planned(Loader._blocks(weakref.proxy(self), epoch, start, part))
        return _Stream(os.getpid(), epoch, self.resolution, part, batches)

    def _draws(self, epoch: int, start: int, part: slice) -> Iterator[Draw]:
        """A rank's parts of the global batches from `start` on, to be planned; in training they never end."""
        for number in itertools.count(epoch):
            order, counts, _ = self._order(number)
            address = order.ctypes.data
            for first in range(start * self.batch_size, len(order), self.batch_size):
                begin, end = first + part.start, first + part.stop
                yield Draw(number, order, address + begin * order.itemsize, counts[begin:end])
            if not self.train:
                return
            start = 0

    def _planned(self, blocks: "Iterator[_Block]") -> Generator[tuple[torch.Tensor, ...], None, None]:
        """The batches of some blocks, from an engine that is given their plan."""
        made: deque[_Block] = deque()

        def requests() -> Iterator[Request]:
            for block in blocks:
                made.append(block)
                yield from block.requests()

        def rest() -> Iterator[tuple[torch.Tensor, ...]]:
            while True:  # a batch was requested before its images arrived, so its block is there
                yield from made.popleft().rest(self.device)

        with closing(self._engine.run(requests(), self.resolution)) as images:  # type: ignore[type-var]
            for one, (labels, samples, colour, mask) in zip(images, rest(), strict=False):
                yield one, labels, samples, colour, mask
                del one

    def _blocks(self, epoch: int, start: int, part: slice) -> Iterator["_Block"]:
        """A rank's parts of the global batches from `start` on; in training they never end."""
        samples, labels, n = self.selection.samples, self.selection.labels, part.stop - part.start
        together = max(1, _TOGETHER // n) * self.batch_size
        for number in itertools.count(epoch):
            order = self._order(number)
            for first in range(start * self.batch_size, len(order[0]), together):
                block = slice(first, first + together)
                positions, mask, before = (
                    values[block].reshape(-1, self.batch_size)[:, part].ravel() for values in order
                )
                yield _Block(n, samples[positions], labels[positions], self._plan(number, positions, before), mask)
            if not self.train:
                return
            start = 0

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The positions of an epoch's global batches, one after the other; which of them count; how often each came.

        A long order is computed on a thread while the epoch before it is loaded.
        """
        length = len(self.selection)
        before = np.zeros(len(self) * self.batch_size, np.int64)
        if not self.train:
            return *evaluation_order(length, self.batch_size), before
        if self._repeats or self._window is not None or length < SHORT:
            order, times = self._training_order(epoch)
            before = before if times is None else times
        else:
            coming, this = self._coming, (os.getpid(), epoch)
            if coming is not None and coming[0] == this:
                order = coming[1].result()
            else:
                order = epoch_order(length, self.seed, epoch)
            thread = ThreadPoolExecutor(1, thread_name_prefix="shards-order")
            self._coming = (os.getpid(), epoch + 1), thread.submit(_order_ahead, length, self.seed, epoch + 1)
            thread.shutdown(wait=False)  # it ends with this order
        whole = len(self) * self.batch_size
        return order[:whole], np.ones(whole, bool), before[:whole]

    def _training_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The positions of an epoch; how often each came before, or None if each comes once."""
        if self._weights is not None:
            return weighted_order(self._weights, self.seed, epoch)
        if self._repeats:
            return balanced_order(self.selection.labels, self.seed, epoch)
        if self._window is not None:
            shards = self.selection.data.column("shard")[self.selection.samples]
            return windowed_order(shards, self._window, self.seed, epoch), None
        return epoch_order(len(self.selection), self.seed, epoch), None

    @property
    def _repeats(self) -> bool:
        return self.train and self._sampler != "uniform"

    def _plan(self, epoch: int, positions: np.ndarray, before: np.ndarray) -> Plan:
        """What is done to the samples at some positions. before: how often each came in the epoch until then."""
        heights, widths = self._heights[positions], self._widths[positions]
        if not self.train:
            return evaluation_plan(heights, widths, self.augment)
        samples = self.selection.samples[positions]
        if self._repeats:
            samples = samples + before * len(self.selection.data)  # a sample has a plan for each time that it comes
        elif compiled() is None:  # NumPy takes as long for a batch as for thousands of samples
            if self._whole is None or self._whole[0] != epoch:
                self._whole = epoch, self.plan(epoch)[1]
            return self._whole[1][positions]
        return training_plan(self.seed, epoch, samples, heights, widths, self.augment)

    def _identity(self) -> dict[str, Any]:
        """The settings that a saved position depends on, or what is computed from the batches after it.

        The resolution is the first one: `set_resolution` may be part of a schedule, which the caller resumes.
        """
        return {
            **self.selection.data.manifest.identity,
            "selection": f"{xxhash.xxh3_64_hexdigest(self.selection.samples.tobytes())}",
            "seed": self.seed,
            "batch_size": self.batch_size,
            "train": self.train,
            "sampler": self._sampler,
            "window": self._window or 0,
            "resolution": self._options["resolution"],
            **{f"augment_{name}": str(value) for name, value in asdict(self.augment).items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """The loader's position, as a small dictionary of plain values (torchdata's Stateful protocol).

        The number of processes is not in it: a state saved by four ranks can be loaded by one.
        """
        return {"version": 1, "epoch": self.epoch, "batch": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch that was yielded when `state` was taken.

        Raises UsageError, naming the difference, if the state is of another set, selection, seed or batch size, or of
        another normalisation, encoding, resolution or augmentation.
        """
        if state.get("version") != 1:
            raise UsageError(f"loader state version {state.get('version')}, and this release reads version 1")
        state = ADDED | state
        named = {k: v for k, v in self._identity().items() if k in state or k in _ALWAYS}
        different = [f"{k} {state.get(k)} → {v}" for k, v in named.items() if state.get(k) != v]
        if different:
            raise UsageError(
                f"this state was taken with another shard set or other settings: {', '.join(different)}; go on with "
                "the old ones, or start anew"
            )
        self._loaded = dict(state)
        self.epoch, self._position = state["epoch"], state["batch"]

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds the settings and the position. Loading it opens the set and an engine again."""
        settings = self._options | {
            "selection": self.selection,
            "batch_size": self.batch_size,
            "train": self.train,
            "seed": self.seed,
            "device": self.device,
            "rank": self.rank,
            "world_size": self.world_size,
            "augment": self.augment,
            "sampler": self._sampler,
            "window": self._window,
        }
        return _reopened, (settings, self.state_dict(), self.resolution)

    def close(self) -> None:
        """Release the engine's threads and memory; a pool keeps its own engine. Yielded batches stay valid."""
        if self._stream is not None:
            self._stream.batches.close()
            self._stream = None
        self._engine.close()


def _order_ahead(count: int, seed: int, epoch: int) -> np.ndarray:
    """`epoch_order` on a thread of low priority: there is a whole epoch's time for it, and cores are needed to load."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)  # on Linux: of this thread alone
    return epoch_order(count, seed, epoch)


def _reopened(settings: dict[str, Any], state: dict[str, Any], resolution: int) -> Loader:
    """A loader that was pickled, with an engine of its own."""
    loader = Loader(**settings)
    loader.set_resolution(resolution)
    loader.load_state_dict(state)
    return loader
