"""What a process keeps from one run to the next: opened shard sets, and the network with its compiled code.

A grid's worker trains many cells of one model; the second and later ones find the model compiled. Nothing of a run is
left in it: weights are drawn anew from the next run's seed and copied into the network's own memory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards import ShardSet
from shards.engines.choose import EnginePool
from train import device as devices
from train import distributed, models
from train.checkpoint import seed_everything
from train.config import Config
from train.device import Decision
from train.distributed import World
from train.models import Classifier


class Workspace:
    """Holds one network at a time: the compiler's caches grow with every other one."""

    def __init__(self) -> None:
        self._sets: dict[Path, ShardSet] = {}
        self.engines = EnginePool()
        """Of the sets that are open."""
        self._key: tuple[Any, ...] = ()
        self._net: Classifier | None = None
        self._processes = 1  # that train it together
        self._compiled: Callable[..., Tensor] | None = None
        self.images_ahead = 0
        """Images that later runs will train this network on: they share the cost of compiling it."""
        self.decision: Decision | None = None
        """What `--compile auto` came to for this network; later runs keep to it, so that they stay comparable."""
        self.tried = False
        """Whether that decision has been put to the test by timing both."""
        self.warned: set[str] = set()
        """Warnings that hold for many runs and have been given once."""
        self.warm: set[tuple[Any, ...]] = set()
        """What the compiled network has already been compiled for: (samples, px, precision)."""

    def open(self, path: str | Path) -> ShardSet:
        """The shard set in a folder, opened once, and again only where its manifest has changed."""
        folder = Path(path).absolute()
        kept = self._sets.get(folder)
        if kept is not None:
            from shards.format import MANIFEST, Manifest

            if Manifest.from_file(folder / MANIFEST) == kept.manifest:
                return kept
            self.engines.close(kept)
            kept.close()
        self._sets[folder] = ShardSet(path)
        return self._sets[folder]

    def network(self, config: Config, data: ShardSet, world: World) -> Classifier:
        """The network of a run on its device, with the weights that the run starts from."""
        seed_everything(config.seed)
        fresh = models.build(
            config.model,
            config.resolution,
            len(data.manifest.classes),
            data.manifest.mean,
            data.manifest.std,
            start_resolution=config.start_resolution,
            pretrained=config.pretrained,
            weights=Path(config.weights) if config.weights else None,
        )
        norm = (fresh.head.mean.tolist(), fresh.head.std.tolist())
        ramp = config.start_resolution not in (None, config.resolution)
        key = (config.model, config.resolution, ramp, config.sync_batch_norm, str(world.device), str(norm))
        if world.size == 1 and key == self._key and self._net is not None:
            self._net.load_state_dict(fresh.state_dict())
            for parameter in self._net.parameters():
                parameter.grad = None
            return self._net.train()
        self.forget()
        if config.sync_batch_norm and world.size > 1:
            distributed.sync_batch_norm(fresh, world.device)
        self._key, self._net, self._processes = key, fresh.to(world.device).train(), world.size
        return self._net

    def compiled(self, sizes: int) -> Callable[..., Tensor]:
        """The network in hand as `torch.compile` gives it, for so many static shapes; compiled when first called."""
        if self._net is None:
            raise ValueError("no network yet")
        # beyond its limit torch.compile would go back to eager without a word
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * (sizes + len(self.warm)))
        if self._compiled is None:
            mode = devices.compile_mode(self._net.head.mean.device, self._processes)
            self._compiled = torch.compile(self._net, dynamic=False, mode=mode)
        return self._compiled

    def close(self) -> None:
        """Let everything go."""
        self.forget()
        self.engines.close()

    def forget(self) -> None:
        """Let the network and its compiled code go."""
        self._key, self._net, self.decision, self.tried = (), None, None, False
        if self._compiled is not None:
            self._compiled = None
            torch.compiler.reset()
        self.warm.clear()
