"""Selects the engine and gives the reason; keeps engines that outlive their loaders."""

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.common.errors import UsageError
from shards.engines import ENGINES, Engine, Request

if TYPE_CHECKING:
    import torch

    from shards.shardset import Selection, ShardSet

_log = logging.getLogger(__name__)


def make_engine(
    name: str,
    selection: "Selection",
    *,
    device: "torch.device",
    threads: int | None,
    prefetch: int,
    pool: "EnginePool | None" = None,
    interpolation: str = "bilinear",
) -> tuple[Engine, str, str]:
    """Returns the engine, its name and the reason for the choice. pool: keeps dali and resident engines.

    interpolation: one of `plan.INTERPOLATIONS`.

    `auto` is native on a CPU. On CUDA it is resident if the decoded images take at most 40 % of the free memory; else
    dali, if a check in another process shows that it works (`selfcheck.py`); else native. With a pool, resident holds
    the whole set, for all loaders of the process. Raises UsageError for an unknown name, a missing device, an engine
    that is not installed or does not work here, and images that do not fit the device's memory.
    """
    choice, variant, reason = choose(name, selection, device, pool, interpolation)
    _log.info("engine %s on %s: %s", choice, device, reason)
    if choice == "native":
        from shards.engines.native import NativeEngine
        from shards.kernels.load import in_use, outdated

        missing = [part for part, by in in_use().items() if by in ("numpy", "opencv")]
        if missing and not outdated():
            _log.warning("no compiled kernel for %s here: images load much more slowly", " and ".join(missing))

        return NativeEngine(selection.data, str(device), threads, prefetch, interpolation), choice, reason
    if choice == "resident":
        from shards.engines.resident import ResidentEngine

        def resident(samples: "Selection") -> ResidentEngine:
            return ResidentEngine(samples, str(device), threads, interpolation)

        if pool is None:
            return resident(selection), choice, reason
        engine: Any = pool.get(selection.data, _resident(device), lambda: resident(_whole(selection)))
        return _PooledEngine(engine.resizing(interpolation)), choice, reason
    from shards.engines.dali import DaliEngine
    from shards.engines.selfcheck import contents

    kinds = contents(selection.data, selection.samples)

    def make() -> DaliEngine:
        return DaliEngine(
            selection.data,
            str(device),
            threads,
            prefetch,
            contents=kinds,
            variant=variant,
            interpolation=interpolation,
        )

    if pool is None:
        return make(), choice, reason
    key = str(device), threads, prefetch, kinds, variant, interpolation
    return pool.get(selection.data, key, make), choice, reason


def choose(
    name: str,
    selection: "Selection",
    device: "torch.device",
    pool: "EnginePool | None" = None,
    interpolation: str = "bilinear",
) -> tuple[str, str, str]:
    """The engine, the variant of dali's graph, and the reason: as `make_engine`, which also says what is raised."""
    if name not in ("auto", *ENGINES):
        raise UsageError(f"engine '{name}' is unknown: use auto, {', '.join(ENGINES)}")
    _check_device(device)
    if name in ("native", "resident"):
        return name, "", "asked for"
    if name == "auto" and device.type == "cpu":
        return "native", "", "the device is a CPU"
    if name == "auto" and (reason := _fits(selection, device, pool)):
        return "resident", "", reason
    if not _dali_installed():
        if name == "dali":
            raise UsageError("engine 'dali' needs the package nvidia-dali-cuda120: install it or use --engine native")
        _log.warning("DALI is not installed: images are decoded on the CPU by the native engine")
        return "native", "", "DALI is not installed"
    if device.type == "cpu":
        return "dali", "region", "asked for"
    from shards.engines.selfcheck import best_variant

    variant, reason = best_variant(selection, device, interpolation)
    if variant is not None:
        return "dali", variant, f"{'asked for; ' if name == 'dali' else ''}{reason}"
    if name == "dali":
        raise UsageError(f"engine 'dali' does not work on {device}: {reason}; use --engine native")
    _log.warning("dali does not work on %s: images are decoded on the CPU by the native engine", device)
    return "native", "", reason


_RESIDENT_SHARE = 0.4
"""Of the free memory. The model and its activations need the rest."""


def _fits(selection: "Selection", device: "torch.device", pool: "EnginePool | None") -> str | None:
    """Why resident is chosen; None if the decoded images would take too much of the device's memory."""
    from shards.engines.resident import free_bytes, needed_bytes

    if pool is not None and pool.holds(selection.data, _resident(device)):
        return "the decoded images are in the device's memory already"
    needed, free = needed_bytes(selection if pool is None else _whole(selection)), free_bytes(str(device))
    if needed > _RESIDENT_SHARE * free:
        _log.info("resident would take %.3g GB of the %.3g GB that are free on %s", needed / 1e9, free / 1e9, device)
        return None
    share = f"at most {100 * _RESIDENT_SHARE:.0f} % of the {free / 1e9:.3g} GB that are free"
    return f"the decoded images take {needed / 1e9:.3g} GB, {share}"


def _whole(selection: "Selection") -> "Selection":
    """All samples of the set."""
    return replace(selection, samples=np.arange(len(selection.data)))


def _resident(device: "torch.device") -> Hashable:
    """The options of a resident engine, for the pool. Engines that resize differently share the images."""
    return "resident", str(device)


def _dali_installed() -> bool:
    """Whether DALI can be imported, without importing it."""
    from importlib.util import find_spec

    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def _check_device(device: "torch.device") -> None:
    """Raises UsageError if the device is not a CPU or a GPU that PyTorch sees."""
    import torch

    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device '{device}' is unknown: use cpu, cuda or cuda:N")
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise UsageError(f"device '{device}' was asked for and PyTorch sees {found} GPUs: use --device cpu")


class EnginePool:
    """Keeps engines in a process that makes many loaders of one set: for the splits of a run, or the runs of a study.

    That is for dali and resident, whose engines serve a whole set and take long to build: on an H100 the first batch of
    a new dali engine came after 1.9 s.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, Hashable], tuple[ShardSet, Engine]] = {}

    def get(self, data: "ShardSet", options: Hashable, make: Callable[[], Engine]) -> Engine:
        """The engine of this set and these options, built on first use. Its `close` does nothing."""
        key = (id(data), options)
        if key not in self._kept:
            self._kept[key] = data, make()  # the set too, so that no other one gets its id
        return _PooledEngine(self._kept[key][1])

    def holds(self, data: "ShardSet", options: Hashable) -> bool:
        """Whether the engine of this set and these options was built already."""
        return (id(data), options) in self._kept

    def close(self, data: "ShardSet | None" = None) -> None:
        """Close the engines of a set, or all of them."""
        for key, (own, engine) in list(self._kept.items()):
            if data is None or own is data:
                engine.close()
                del self._kept[key]


class _PooledEngine:
    """An engine as a loader sees it: only the pool closes it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def run(self, requests: Iterable[Request], resolution: int) -> "Iterator[torch.Tensor]":
        """See `Engine.run`."""
        return self._engine.run(requests, resolution)

    def __getattr__(self, name: str) -> Any:
        """What `resident` offers beside it."""
        return getattr(self._engine, name)

    def close(self) -> None:
        """Do nothing: the pool closes it."""
