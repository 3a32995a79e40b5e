"""A pass over a set that is in a store: which shards it needs next, and which it has left behind.

So a set that is larger than the cache can be read: what was left behind may leave the cache.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from shards.shardset import ShardSet

AHEAD = 3
"""Shards that are fetched before they are needed, in a pass that does not hold all of them."""
BESIDES = 4
"""Shards that may be there besides: those of batches that are under way, of this pass or already of the next."""


class Passage:
    """One pass through samples in their order."""

    def __init__(self, data: "ShardSet", samples: np.ndarray, following: np.ndarray) -> None:
        """samples: (N,) of the pass, in order. following: the first of the next pass."""
        self._data, self._samples = data, np.concatenate([samples, following])
        shards = data.column("shard")[samples]
        known, last = np.unique(shards[::-1], return_index=True)
        ends = len(samples) - 1 - last
        order = np.argsort(ends)
        self._ends, self._shards = ends[order], known[order]
        self._of_shard = -(-len(samples) // max(len(known), 1))
        self._left = self._fetched = 0

    def at(self, position: int) -> None:
        """`position` samples of the pass have been given to the caller."""
        done = int(np.searchsorted(self._ends, position))
        if done > self._left:
            self._data.release(self._shards[self._left : done].tolist())
            self._left = done
        if position + (AHEAD - 1) * self._of_shard >= self._fetched:
            self._fetched = position + AHEAD * self._of_shard
            self._data.fetch_ahead(self._samples[position : self._fetched])
