"""Several processes as one: torchrun's world, sums over it, decisions that all ranks take at the same step.

Each rank loads its slice of the same global batch (`shards/order.py`) and divides its loss by the denominator of the
whole batch, so that the gradient is that of one process, however uneven the slices are.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shards.common.errors import DermscaleError, UsageError, one_line
from train import device as devices

TIMEOUT = timedelta(minutes=10)
"""A rank that answers nothing for so long counts as dead. One that exits is noticed at once."""

_T = TypeVar("_T")


@dataclass
class World:
    """This process and its peers. One process alone has rank 0 of 1, and everything below does nothing."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    restart: int = 0
    """How often torchrun has started this job again after a failure."""
    flags: dist.ProcessGroup | None = None
    _pending: tuple[Tensor, dist.Work] | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def wrap(self, model: Any) -> Any:
        """A model whose gradients are averaged over the ranks after each backward pass."""
        if self.size == 1:
            return model
        ids = devices.own_gpu(self.device)
        parallel = nn.parallel.DistributedDataParallel
        # buffers (running means) matter to evaluation only: `same_buffers` sends them once before it
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
        """Whether any rank had each wish one call ago. Every rank gets the same answer at the same call.

        The answer is one call late so that nobody waits: the flags travel on the CPU while the next step computes.
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
        """Wait for flags that are still on their way."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None

    def from_first(self, compute: Callable[[], _T]) -> _T:
        """`compute()` of the first rank, on every rank. A known error there is raised on every rank."""
        if self.size == 1:
            return compute()
        parcel: list[Any] = [None, None]
        if self.first:
            try:
                parcel[0] = compute()
            except DermscaleError as error:
                parcel[1] = error
        dist.broadcast_object_list(parcel, src=0, group=self.flags)
        if parcel[1] is not None:
            raise parcel[1]
        return parcel[0]

    def gather(self, mine: _T) -> list[_T]:
        """What every rank has, in the order of ranks; an empty list on all but the first."""
        if self.size == 1:
            return [mine]
        everything: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(mine, everything, dst=0, group=self.flags)
        return everything or []

    def gather_rows(self, mine: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays joined along their first axis over the ranks; empty on all but the first."""
        parts = self.gather(dict(mine))
        return {name: np.concatenate([part[name] for part in parts]) for name in mine} if parts else {}


@contextmanager
def world(device_name: str) -> Iterator[World]:
    """The world that torchrun describes in the environment; one process alone where it does not.

    Raises UsageError for a device that is not there. A peer that dies raises DermscaleError here, never a hang.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
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
            "Start again with --resume to go on from the last checkpoint, with any number of processes"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _store(restart: int) -> dist.Store:  # pyright: ignore[reportPrivateImportUsage]
    """Where the ranks find each other, apart for each life of the job.

    torchrun's own store (torch 2.14, `--standalone`) outlives a restart, and a rank that is faster than its peers would
    read the addresses of the dead ones there: seen in 3 of 5 restarts.
    """
    from torch.distributed.rendezvous import rendezvous

    store, _, size = next(rendezvous("env://", timeout=TIMEOUT))
    return dist.PrefixStore(  # pyright: ignore[reportPrivateImportUsage]
        f"life-{restart}-of-{size}", store
    )


def _is_lost_peer(error: RuntimeError) -> bool:
    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError)):
        return True
    text = str(error)
    signs = ("gloo", "Connection closed by peer", "Connection reset", "Broken pipe", "NCCL", "timed out", "Timed out")
    return any(sign in text for sign in signs)


# ------------------------------------------------------------------ batch norm over the global batch


class _SumOverRanks(torch.autograd.Function):
    """A sum over the ranks through which gradients flow: each rank's output depends on every rank's input."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose mean and variance are those of the global batch, on a CPU (torch's own needs a GPU)."""

    def forward(self, input: Tensor) -> Tensor:
        """input (N, C, H, W) float → the same shape, normalised over all ranks' samples."""
        if not self.training or self.running_mean is None or self.running_var is None:
            return super().forward(input)
        count = input.new_tensor([input.numel() / input.shape[1]])
        total: Any = _SumOverRanks.apply(torch.cat([input.sum(dim=(0, 2, 3)), count]))
        n, mean = total[-1], total[:-1] / total[-1]
        away = input - mean[:, None, None]
        # a second sum over the ranks, because a variance from sums of squares would lose digits
        squares: Any = _SumOverRanks.apply(away.square().sum(dim=(0, 2, 3)))
        variance = squares / n
        with torch.no_grad():
            momentum = 0.1 if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (n / (n - 1)), momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        out = away * torch.rsqrt(variance + self.eps)[:, None, None]
        return out * self.weight[:, None, None] + self.bias[:, None, None]


def sync_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with every batch norm taking its statistics over all ranks. Raises UsageError where it has none."""
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    if not kinds:
        raise UsageError("--sync-batch-norm: this model has no batch norm; leave the option out")
    on_gpu = devices.synced_batch_norm(model, device)
    if on_gpu is not None:
        return on_gpu
    if kinds != {nn.BatchNorm2d}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UsageError(f"--sync-batch-norm on a CPU: plain BatchNorm2d only, and this model has {names}")
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d  # same state, another forward pass
    return model
