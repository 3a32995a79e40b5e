"""The checkpoint: one file from which an interrupted run continues to the same weights. It is replaced as a whole."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
import xxhash

from shards.common.errors import DataError, one_line
from shards.common.files import whole_file
from shards.loader import ADDED
from train import device as devices
from train.weights import read_pickled

FILE = "checkpoint.pt"
VERSION = 2
"""2 has a digest at the end and the normalisation."""
_DIGEST = b"xxh3:"
"""The file ends with this and 16 hexadecimal digits: the XXH3 of all bytes before, as PyTorch checks no checksum."""
_BEGIN_ANEW = "delete it to start the run from its beginning"


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


class _Hashed:
    """A file that is written from its beginning to its end; it keeps the XXH3 of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = xxhash.xxh3_64()

    def write(self, content: bytes) -> int:
        """Write to the file."""
        self.digest.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, text, lists, dicts) to checkpoint.pt, whole or not at all."""
    with whole_file(folder / FILE) as file:
        hashed = _Hashed(file)
        try:
            torch.save({"version": VERSION, **state}, hashed)  # pyright: ignore[reportArgumentType]
        except RuntimeError as error:  # torch's own, raised while it handles that of a full disk, or Ctrl-C
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, (OSError, KeyboardInterrupt)):
                cause = cause.__context__
            raise (cause or error) from None
        file.write(_DIGEST + hashed.digest.hexdigest().encode())


def load(folder: Path) -> dict[str, Any] | None:
    """The state in a run folder, with tensors on the CPU; None if there is no checkpoint yet.

    It cannot run code. Raises DataError if it is damaged or of another version. `check` looks at its content.
    """
    path = folder / FILE
    if not path.exists():
        return None
    with path.open("rb") as file:
        digest, left = xxhash.xxh3_64(), path.stat().st_size - len(_DIGEST) - 16
        while left > 0 and (part := file.read(min(left, 2**24))):
            digest.update(part)
            left -= len(part)
        if file.read() != _DIGEST + digest.hexdigest().encode():
            raise DataError(f"{path}: damaged, or written by another release; {_BEGIN_ANEW}")
        file.seek(0)
        try:
            state = read_pickled(file)
        except ValueError as error:
            raise DataError(f"{path}: damaged ({one_line(error, 300)}); {_BEGIN_ANEW}") from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise DataError(f"{path}: written by another release; {_BEGIN_ANEW}")
    return state


# ------------------------------------------------------------------ what a state must be


def check(
    folder: Path, state: dict[str, Any], own: dict[str, Any], shapes: list[torch.Size], epoch_steps: int, total: int
) -> None:
    """Raise DataError if `state`, as `load` gave it, is not one of this run.

    own: what the run would save now, before its first step. shapes: of the optimizer's parameters, in their order.
    epoch_steps, total: steps of an epoch and of the whole run.
    """
    special = ("progress", "random", "optimizer", "scaler")
    try:
        _same_keys(state, {"version": VERSION, **own}, "it")
        if isinstance(state["loader"], dict):
            state["loader"] = ADDED | state["loader"]
        for name in own.keys() - set(special):
            _alike(state[name], own[name], name)
        if state["metrics_bytes"] < 0:
            raise ValueError(f"its metrics_bytes are {state['metrics_bytes']}")
        _check_progress(state["progress"], epoch_steps, total)
        loader = state["loader"]
        if not 0 <= loader["batch"] <= epoch_steps or (
            loader["epoch"] * epoch_steps + loader["batch"] != state["progress"]["step"]
        ):
            raise ValueError(
                f"its loader is at batch {loader['batch']} of epoch {loader['epoch']}, its step is another"
            )
        _check_random(state["random"], own["random"][0]["torch"])
        _check_optimizer(state["optimizer"], own["optimizer"], shapes)
        scaler = state["scaler"]
        known = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
        if not isinstance(scaler, dict) or (scaler and set(scaler) != set(known)):
            raise ValueError("its scaler has other keys")
        for name, value in scaler.items():
            _number(value, f"scaler.{name}")
    except ValueError as error:
        raise DataError(f"{folder / FILE}: not a state of this run ({error}); {_BEGIN_ANEW}") from None


def _same_keys(found: Any, own: dict[Any, Any], where: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where} is no dictionary")
    for kind, names in (("lacks", own.keys() - found.keys()), ("has a foreign key", found.keys() - own.keys())):
        if names:
            raise ValueError(f"{where} {kind} {one_line(str(min(map(str, names))), 60)}")


def _number(value: Any, where: str, whole: bool = False) -> None:
    """Raise ValueError unless a value is a finite number of 0 or more."""
    if type(value) not in ((int,) if whole else (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{where} is {one_line(repr(value), 60)}, expected a {'whole ' if whole else ''}number from 0")


def _alike(found: Any, own: Any, where: str) -> None:
    """Raise ValueError unless `found` has the keys, types and shapes of `own`."""
    if isinstance(own, dict):
        _same_keys(found, own, where)
        for name in own:
            _alike(found[name], own[name], f"{where}.{name}")
    elif isinstance(own, list):
        if type(found) is not list or len(found) != len(own):
            raise ValueError(f"{where} is not a list of {len(own)}")
        for number, one in enumerate(own):
            _alike(found[number], one, f"{where}[{number}]")
    elif isinstance(own, torch.Tensor):
        if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (own.shape, own.dtype):
            raise ValueError(
                f"{where} is not a {str(own.dtype).removeprefix('torch.')} tensor of shape {list(own.shape)}"
            )
    elif type(found) is not type(own):
        raise ValueError(f"{where} is {one_line(repr(found), 60)}, expected a value like {one_line(repr(own), 60)}")


def _check_progress(found: Any, epoch_steps: int, total: int) -> None:
    own = asdict(Progress())
    _same_keys(found, own, "progress")
    _same_keys(found["seconds"], own["seconds"], "progress.seconds")
    for name, value in (found | found["seconds"]).items():
        if name != "seconds" and not (name == "loss" and value is None):
            _number(value, f"progress.{name}", whole=type(own.get(name)) is int)
    epochs = math.ceil(total / epoch_steps)
    epoch, done, step = found["epoch"], found["epoch_step"], found["step"]
    if epoch > epochs:
        raise ValueError(f"its epoch is {epoch}, and the run has {epochs}")
    before = min(epoch * epoch_steps, total)
    if done > min(epoch_steps, total - before) or step != before + done:
        raise ValueError(f"its step is {step}: not that of step {done} after {epoch} epochs of {epoch_steps} steps")


def _check_random(found: Any, own: dict[str, torch.Tensor]) -> None:
    """One dictionary for each process; their number may change."""
    if type(found) is not list or not found:
        raise ValueError("random is no list")
    for number, one in enumerate(found):
        _same_keys(one, {"torch": None}, f"random[{number}]")
        states = one["torch"]
        if not isinstance(states, dict) or "cpu" not in states or not states.keys() <= {"cpu", "cuda"}:
            raise ValueError(f"random[{number}] is not the state of torch's generators")
        for name in states.keys() & own.keys():  # a run may go on on another device
            _alike(states[name], own[name], f"random[{number}].{name}")


def _check_optimizer(found: Any, own: dict[str, Any], shapes: list[torch.Size]) -> None:
    """Its settings are those of the run, its tensors those of the parameters; one without a gradient has none."""
    _same_keys(found, own, "optimizer")
    groups = own["param_groups"]
    if type(found["param_groups"]) is not list or len(found["param_groups"]) != len(groups):
        raise ValueError(f"optimizer.param_groups is not a list of {len(groups)}")
    for number, group in enumerate(groups):
        for name in ("params", "weight_decay", "momentum", "nesterov", "betas", "eps", "use_muon", "lr_scale"):
            theirs = found["param_groups"][number]
            if name in group and not (isinstance(theirs, dict) and theirs.get(name) == group[name]):
                raise ValueError(f"optimizer.param_groups[{number}].{name} is not that of the run")
    of = {number: group for group in groups for number in group["params"]}
    if not isinstance(found["state"], dict) or not found["state"].keys() <= set(range(len(shapes))):
        raise ValueError("optimizer.state is not of the run's parameters")
    for number, one in found["state"].items():
        group, where = of[number], f"optimizer.state[{number}]"
        muon = {name: group[name] for name in ("use_muon",) if name in group}  # whether a weight has Muon or NAdamW
        moments = group.get("use_muon", "momentum" in group)
        names = ("momentum_buffer",) if moments else ("step", "exp_avg", "exp_avg_sq")
        _alike(one, muon | {name: torch.empty(() if name == "step" else shapes[number]) for name in names}, where)
        if any(one[name] != value for name, value in muon.items()):
            raise ValueError(f"{where}.use_muon is not that of the run")


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
