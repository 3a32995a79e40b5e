"""The order of samples: a pure function of (seed, epoch, rank, world size). It has no state: resuming is a position.

Permutations come from sorted keys of a counter-based generator's raw stream (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", SC 2011). NumPy promises the same stream in every version; it does not promise that for shuffles.
"""

import numpy as np

from shards.common.errors import UsageError
from shards.kernels.load import compiled, holding_the_lock

# The last word of Philox's counter; plan.py has 2, train/mixing.py 3: no number is shared.
_STREAM, _BALANCED, _SHARDS, _SHIFTS, _WEIGHTED = 1, 4, 5, 6, 7

SAMPLERS = ("uniform", "balanced", "weighted:COLUMN")

SHORT = 1 << 16
"""Samples that are sorted in about two milliseconds."""


def check_seed(seed: int, epoch: int) -> None:
    """Raise UsageError for a seed or an epoch that is not in 0 … 2**63 - 1."""
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not 0 <= value < 1 << 63:
            raise UsageError(f"{name} {value} is outside 0 to 2**63 - 1")


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 … count - 1, int64, that depends on (count, seed, epoch) alone."""
    check_seed(seed, epoch)
    order = np.empty(count, np.int64)
    # A short sort keeps the GIL, a long one releases it.
    library = holding_the_lock() if count < SHORT else compiled()
    if library is not None and library.dermscale_order(seed, epoch, count, order.ctypes.data):
        return order
    return numpy_order(count, seed, epoch)


def numpy_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """`epoch_order` in NumPy, the same permutation: used if there is no compiled library, and as its test."""
    keys = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, _STREAM]).random_raw(count)
    return np.argsort(keys, kind="stable")


def balanced_order(labels: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) int64 positions, in which each class comes equally often, within one; and how often each came before.

    labels: (N,) classes of the samples. A class's samples are taken in turn, each time round in another order. Of a
    large class each epoch has other samples. It depends on (labels, seed, epoch) alone.
    """
    check_seed(seed, epoch)
    classes, sizes = np.unique(labels, return_counts=True)
    number = len(classes)
    shares = len(labels) // number + ((np.arange(number) + epoch) % number < len(labels) % number)
    rounds = -(-shares // sizes)
    keys = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, _BALANCED]).random_raw(int(rounds @ sizes))
    positions, before = [], []
    parts = np.split(keys, np.cumsum(rounds * sizes)[:-1])
    for one, share, times, own in zip(classes, shares, rounds, parts, strict=True):
        turns = np.argsort(own.reshape(times, -1), axis=1, kind="stable") if times else np.empty((0, 1), np.int64)
        positions.append(np.flatnonzero(labels == one)[turns].ravel()[:share])
        before.append(np.repeat(np.arange(times), turns.shape[1])[:share])
    order = epoch_order(len(labels), seed, epoch)
    return np.concatenate(positions)[order], np.concatenate(before)[order]


def weighted_order(weights: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) int64 positions, in which each sample comes in proportion to its weight; and how often each came before.

    weights: (N,) float64, 0 or more and not all 0. A sample comes N · weight / sum times, or once more or less by
    systematic sampling (Madow 1949) along a new random order in each epoch: the mean over epochs is exact. It depends
    on (weights, seed, epoch) alone.
    """
    check_seed(seed, epoch)
    count = len(weights)
    keys = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, _WEIGHTED]).random_raw(count + 1)
    along = np.argsort(keys[:-1], kind="stable")
    ends = np.cumsum(weights[along])
    ends = np.floor(ends / ends[-1] * count + int(keys[-1] >> np.uint64(11)) * 2.0**-53).astype(np.int64)
    ends[-1] = count  # whatever was rounded
    times = np.diff(ends, prepend=0)
    order = epoch_order(count, seed, epoch)
    before = np.arange(count) - np.repeat(ends - times, times)
    return np.repeat(along, times)[order], before[order]


def windowed_order(shards: np.ndarray, window: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0 … N - 1, int64, in which at any time at most `window` shards are in use.

    shards: (N,) the shard of each sample. The shards are drawn in random order, and each sample moves on from its
    shard's place by a uniform part of `window` places. A new shard begins when an old one ends, so a cache of a little
    more than `window` shards reads each shard once in an epoch. MosaicML Streaming has a similar order, `py1e`. It
    depends on (shards, window, seed, epoch) alone. Raises UsageError for a window outside its range.
    """
    check_seed(seed, epoch)
    if not 1 <= window < 1 << 20:
        raise UsageError(f"window {window} is outside 1 to 1048575 shards")
    _, of_sample = np.unique(shards, return_inverse=True)
    keys = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, _SHARDS]).random_raw(int(of_sample.max(initial=0)) + 1)
    place = np.argsort(np.argsort(keys, kind="stable"), kind="stable").astype(np.uint64)[of_sample]
    part = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, _SHIFTS]).random_raw(len(shards)) >> np.uint64(32)
    return np.argsort((place << np.uint64(32)) + part * np.uint64(window), kind="stable")


def batch_count(count: int, batch_size: int, train: bool) -> int:
    """Global batches in an epoch: whole ones only in training, all samples in evaluation."""
    return count // batch_size if train else -(-count // batch_size)


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """This rank's part of every global batch. The parts cover the batch and differ by at most one sample in size.

    Raises UsageError if a rank would get nothing or does not exist.
    """
    if not 0 <= rank < world_size:
        raise UsageError(f"rank {rank} is outside 0 to {world_size - 1}")
    if batch_size < world_size:
        raise UsageError(f"batch size {batch_size} is smaller than the {world_size} processes that share it")
    return slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


def evaluation_order(count: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The global batches of an evaluation, one after the other: positions int64 and mask, both (batches × batch_size,).

    Samples keep their order. The last batch is padded with position 0 where the mask is False, so that every batch
    has one shape and each sample counts once.
    """
    positions = np.arange(batch_count(count, batch_size, train=False) * batch_size)
    mask = positions < count
    return np.where(mask, positions, 0), mask
