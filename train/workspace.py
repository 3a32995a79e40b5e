"""What a process keeps from one run to the next: opened shard sets, and the network with its compiled code.

A grid's worker trains many cells of one model and compiles it once. The next run does not see the last one: its own
weights, drawn from its own seed, are copied into the memory of the network.
"""

from pathlib import Path
from typing import Any

from shards import ShardSet
from shards.engines.choose import EnginePool
from shards.store import folder_of, is_address, read_manifest
from train import device as devices
from train import models
from train.checkpoint import seed_torch
from train.compiling import Compilation
from train.config import Config
from train.device import Decision
from train.distributed import World
from train.models import Classifier


class Workspace:
    """Holds one network at a time, because the compiler's caches grow with every further one."""

    def __init__(self) -> None:
        self._sets: dict[str, ShardSet] = {}
        self.engines = EnginePool()
        """Engines of the open sets."""
        self._key: tuple[Any, ...] = ()
        self._net: Classifier | None = None
        self.memory_format = Decision("channels-last", "nothing is trained yet")
        self.compilation = Compilation()
        """Compiled code of the network."""
        self.warned: set[str] = set()
        """Warnings that were shown already: one that is true for many runs is shown once."""

    def open(self, path: str | Path) -> ShardSet:
        """The shard set in a folder or a store. It is opened once, and again if its manifest has changed."""
        place = path if is_address(path) else str(folder_of(path).absolute())
        kept = self._sets.get(place)
        if kept is not None:
            if read_manifest(place) == kept.manifest:
                return kept
            self.engines.close(kept)
            kept.close()
        self._sets[place] = ShardSet(place)
        return self._sets[place]

    def network(self, config: Config, data: ShardSet, world: World) -> Classifier:
        """The network of a run, on its device, with the weights that the run starts from."""
        seed_torch(config.seed)
        fresh = models.build(
            config.model,
            config.resolution,
            len(data.manifest.classes),
            data.manifest.mean,
            data.manifest.std,
            start_resolution=config.start_resolution,
            pretrained=config.pretrained,
            weights=Path(config.weights) if config.weights else None,
            freeze=config.freeze,
            normalize=config.normalize,
            interpolation=config.interpolation,
            drop_path=config.drop_path or 0.0,
        )
        norm = (fresh.head.mean.tolist(), fresh.head.std.tolist())
        ramp = config.start_resolution not in (None, config.resolution)
        built = (config.model, config.resolution, ramp, config.drop_path, config.sync_batch_norm, config.memory_format)
        key = (*built, config.freeze, len(data.manifest.classes), str(world.device), str(norm))
        if world.size == 1 and key == self._key and self._net is not None:
            self._net.load_state_dict(fresh.state_dict())
            self._net.decisions = fresh.decisions
            for parameter in self._net.parameters():
                parameter.grad = None
            return self._net.train()
        self.forget()
        if config.sync_batch_norm and world.size > 1:
            devices.sync_batch_norm(fresh)
        self._key, self._net = key, fresh.to(world.device).train()
        self.memory_format = models.lay_out(self._net, config.memory_format, world.device)
        return self._net

    def close(self) -> None:
        """Close the engines and drop the network."""
        self.forget()
        self.engines.close()

    def forget(self) -> None:
        """Drop the network and its compiled code."""
        self._key, self._net = (), None
        self.compilation.forget()
