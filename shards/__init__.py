"""dermscale's packed image format and its loader. Useful alone: `from shards import Loader, ShardSet`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.loader import Batch, Loader
    from shards.plan import Augment
    from shards.shardset import Selection, ShardSet

__all__ = ["Augment", "Batch", "Loader", "Selection", "ShardSet"]

_HOME = {
    "Augment": "shards.plan",
    "Batch": "shards.loader",
    "Loader": "shards.loader",
    "Selection": "shards.shardset",
    "ShardSet": "shards.shardset",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562), so that `--help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'shards' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
