"""Where a run prints: what `train.loop` needs of a display. `shards.common.progress.Progress` is one."""

from typing import Protocol


class Console(Protocol):
    """A display. `train.run` gives a Progress; a worker of a grid sends everything to the grid."""

    def say(self, text: str) -> None:
        """Print one line."""

    def warn(self, text: str) -> None:
        """Print one warning."""

    def at(self, what: str, done: int, total: int) -> None:
        """Show how much of a phase (`epoch 3/12`, `test`) is done. Called at every step."""


class Silent(Console):
    """Prints nothing: for all ranks but the first, and for library use."""
