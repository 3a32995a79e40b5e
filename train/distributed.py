"""Several processes that train one model: the world that torchrun describes, sums and decisions over its ranks.

Each rank loads its slice of the same global batch (`shards/order.py`) and divides its loss by the denominator of the
whole batch. So the gradient equals that of one process, however uneven the slices are.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shards.common.errors import DermscaleError, UsageError, one_line
from train import device as devices

TIMEOUT = timedelta(minutes=10)
"""A rank that does not answer for this long counts as dead. One that exits is noticed at once."""

_T = TypeVar("_T")


@dataclass
class World:
    """This process and its peers. A single process has rank 0 of 1, and the methods below do nothing."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    restart: int = 0
    """How often torchrun has restarted this job after a failure."""
    flags: dist.ProcessGroup | None = None
    per_device: int = 1
    """Cells that a grid trains at the same time on this device."""
    _pending: tuple[Tensor, dist.Work] | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    def wrap(self, model: Any) -> Any:
        """A model whose gradients are averaged over the ranks after each backward pass."""
        if self.size == 1:
            return model
        ids = None if self.device.index is None else [self.device.index]
        parallel = nn.parallel.DistributedDataParallel
        # buffers (running means) are used in evaluation alone: `same_buffers` sends them once before it
        known = inspect.signature(parallel).parameters
        option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.14
        unsynced: dict[str, Any] = {option: False}
        return parallel(model, device_ids=ids, gradient_as_bucket_view=True, **unsynced)

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks, in place, on their device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def same_buffers(self, model: nn.Module) -> None:
        """Give every rank the first one's buffers."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def agree(self, *wishes: bool) -> tuple[bool, ...]:
        """For each wish: whether any rank had it at the previous call. All ranks get the same answer at the same call.

        The answer is one call late so that no rank waits: the flags travel on the CPU while the next step computes.
        """
        if self.size == 1:
            return wishes
        before = self._pending
        flags = torch.tensor(wishes, dtype=torch.uint8)
        work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.flags, async_op=True)
        if work is None:
            raise RuntimeError("torch.distributed gave no handle for an asynchronous sum")
        self._pending = (flags, work)
        if before is None:
            return tuple(False for _ in wishes)
        before[1].wait()
        return tuple(bool(flag) for flag in before[0])

    def settle(self) -> None:
        """Wait for the flags of the last `agree`, which may still be travelling."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None

    def from_first(self, compute: Callable[[], _T]) -> _T:
        """`compute()` of the first rank, on every rank. An error there is raised on every rank: no rank waits for it.

        Other ranks get a DermscaleError or OSError as it is, and any other error as a RuntimeError with its text.
        """
        if self.size == 1:
            return compute()
        parcel: list[Any] = [None, None]
        failed: Exception | None = None
        if self.first:
            try:
                parcel[0] = compute()
            except Exception as error:  # noqa: BLE001 (raised below, on every rank)
                failed = error
                known = isinstance(error, (DermscaleError, OSError))
                parcel[1] = error if known else RuntimeError(one_line(error, 200))
        dist.broadcast_object_list(parcel, src=0, group=self.flags)
        failed = failed or parcel[1]
        if failed is not None:
            raise failed
        return parcel[0]

    def gather(self, mine: _T) -> list[_T]:
        """The values of all ranks, in their order, on the first rank; an empty list on the others."""
        if self.size == 1:
            return [mine]
        everything: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(mine, everything, dst=0, group=self.flags)
        return everything or []


@contextmanager
def world(device_name: str) -> Iterator[World]:
    """The world that torchrun describes in the environment variables; a single process without torchrun.

    Raises UsageError for a device that is not there, or if the variables describe only a part of a world. If a peer
    dies, DermscaleError is raised here; nothing hangs.
    """
    rank, size, local = _described()
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    device = devices.choose(device_name, local)
    devices.prepare(device, keep_memory=True)
    if size == 1:
        yield World(device=device, restart=restart)
        return
    try:
        backend = devices.process_group_backend(device)
        dist.init_process_group(backend, store=_store(restart), rank=rank, world_size=size, timeout=TIMEOUT)
        flags = dist.new_group(backend="gloo", timeout=TIMEOUT)
        here = World(rank, size, device, restart, flags if isinstance(flags, dist.ProcessGroup) else None)
        yield here
        here.settle()
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        reason = one_line(error, 160)
        raise DermscaleError(
            f"rank {rank} of {size} lost another process of the job ({reason}); its own message says why it ended. "
            "Start again with --resume to continue from the last checkpoint, with any number of processes"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _described() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK. Some clusters set them for every job, and not where the processes meet."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    found = {name: os.environ.get(name, value) for name, value in alone.items()}
    what_to_do = f"start the processes with torchrun, or unset {', '.join(alone)} to train in one process"
    for name, value in found.items():
        if not (value.isascii() and value.isdigit()):
            raise UsageError(f"the environment variable {name} is '{value}' and not a whole number: {what_to_do}")
    rank, size, local = map(int, found.values())
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size > 1 and missing:
        raise UsageError(
            f"the environment variable WORLD_SIZE is {size}, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set, so the processes cannot find each other: {what_to_do}"
        )
    if size < 1 or rank >= size > 1:
        raise UsageError(f"the environment variable RANK is {rank} and WORLD_SIZE is {size}: {what_to_do}")
    return rank, size, local


def _store(restart: int) -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """Where the ranks find each other: a separate space for each restart of the job, if the store is torchrun's.

    torchrun's own store (torch 2.14, `--standalone`) outlives a restart. A rank that is faster than its peers would
    read the addresses of dead ones there: seen in 3 of 5 restarts. Without it, the first rank makes a store at each
    restart. A space would then do harm: torchrun on a machine that joined later counts fewer restarts.
    """
    from torch.distributed.rendezvous import rendezvous

    store, _, size = next(rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False":
        return store
    return dist.PrefixStore(  # pyright: ignore[reportPrivateImportUsage]
        f"life-{restart}-of-{size}", store
    )


def _is_lost_peer(error: RuntimeError) -> bool:
    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError)):
        return True
    text = str(error)
    signs = ("gloo", "Connection closed by peer", "Connection reset", "Broken pipe", "NCCL", "timed out", "Timed out")
    return any(sign in text for sign in signs)
