"""The checkpoint: one file from which an interrupted run continues to the same weights. It is replaced as a whole."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shards.common.errors import DataError, one_line
from shards.common.files import whole_file
from train import device as devices

FILE = "checkpoint.pt"
VERSION = 1


@dataclass
class Progress:
    """How far a run has come. Times are in seconds, summed over restarts.

    step: optimizer steps done. epoch: epochs done, with their evaluation; epoch_…: of the current one. images: seen in
    training. train_s: time of training; wait_s: the part of it spent waiting for data. loss: mean of the last epoch.
    seconds: all other time, by what it was spent on.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    epoch_loss: float = 0.0
    epoch_train_s: float = 0.0
    epoch_wait_s: float = 0.0
    images: int = 0
    train_s: float = 0.0
    wait_s: float = 0.0
    loss: float | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("start", "compile", "eval", "save"), 0.0))

    def end_epoch(self, images: int) -> None:
        """Add the current epoch, of `images` images, to the sums."""
        self.loss = self.epoch_loss / self.epoch_step
        self.images += images
        self.train_s += self.epoch_train_s
        self.wait_s += self.epoch_wait_s
        self.epoch += 1
        self.epoch_step, self.epoch_loss, self.epoch_train_s, self.epoch_wait_s = 0, 0.0, 0.0, 0.0


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, text, lists, dicts) to checkpoint.pt, whole or not at all."""
    with whole_file(folder / FILE) as file:
        try:
            torch.save({"version": VERSION, **state}, file)
        except RuntimeError as error:  # torch's own, raised while it handles that of a disk that has become full
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def load(folder: Path) -> dict[str, Any] | None:
    """The state in a run folder, with tensors on the CPU; None if there is no checkpoint yet.

    It is read with `weights_only`, so it cannot run code. Raises DataError if it is damaged or of another version.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = one_line(error, 160)
        raise DataError(f"{path}: damaged ({reason}); delete it to start the run from its beginning") from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise DataError(f"{path}: written by another release; delete it to start the run from its beginning")
    return state


def set_random_states(device: torch.device, states: list[dict[str, Any]], rank: int, position: tuple[int, int]) -> None:
    """Restore torch's random generators on this rank. Nothing in a run draws from those of numpy or Python.

    states: `{"torch": devices.random_state(…)}` of each rank. A rank that did not exist then is seeded from the
    position, (seed, step): its numbers are new but reproducible.
    """
    if rank < len(states):
        devices.set_random_state(device, states[rank]["torch"])
    else:
        seed_torch((position[0] << 32) + position[1], rank)


def seed_torch(seed: int, rank: int = 0) -> None:
    """Seed torch on all devices. Each rank has a seed of its own for dropout; rank 0 has `seed`."""
    torch.manual_seed((seed + rank * 0x9E3779B97F4A7C15) % 2**64)
