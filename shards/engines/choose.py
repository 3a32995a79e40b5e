"""Which engine carries out the plan, and why."""

from typing import TYPE_CHECKING

from shards.engines import ENGINES, Engine
from shards.errors import UsageError

if TYPE_CHECKING:
    import torch

    from shards.shardset import Selection


def make_engine(
    name: str, selection: "Selection", *, device: "torch.device", threads: int | None, prefetch: int
) -> tuple[Engine, str, str]:
    """Returns the engine, its name and the reason for the choice. Raises UsageError for an unknown name."""
    if name not in ("auto", *ENGINES):
        raise UsageError(f"engine '{name}' is unknown: use auto, {', '.join(ENGINES)}")
    from shards.engines.native import NativeEngine

    reason = "asked for" if name == "native" else "the device is a CPU"
    return NativeEngine(selection.data, str(device), threads, prefetch), "native", reason
