"""Engines that outlive their loaders: on a GPU, what DALI decodes with takes longer to build than a small epoch."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING

from shards.engines import Engine, Work

if TYPE_CHECKING:
    import torch

    from shards.shardset import ShardSet


class EnginePool:
    """For a process that makes many loaders of one set, such as those of a run's splits, or of a study's runs.

    It keeps the engines that are for a set as a whole and dear to build: dali's. On an H100 the first batch of a new
    one came after 1.9 s.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, Hashable], tuple[ShardSet, Engine]] = {}

    def lend(self, data: "ShardSet", options: Hashable, make: Callable[[], Engine]) -> Engine:
        """The engine of this set and these options, made when first asked for. Its `close` leaves it as it is."""
        key = (id(data), options)
        if key not in self._kept:
            self._kept[key] = data, make()  # the set too, so that no other one gets its id
        return _Lent(self._kept[key][1])

    def close(self, data: "ShardSet | None" = None) -> None:
        """Close the engines of a set, or all of them."""
        for key, (own, engine) in list(self._kept.items()):
            if data is None or own is data:
                engine.close()
                del self._kept[key]


class _Lent:
    """An engine as its borrowers see it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, work: Iterable[Work], resolution: int) -> "Iterator[torch.Tensor]":
        """See `Engine.run`."""
        return self._engine.run(work, resolution)

    def close(self) -> None:
        """Nothing: the pool closes it."""
