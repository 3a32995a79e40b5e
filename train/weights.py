"""Weights in files: reading them safely, loading them into a network, downloading and writing them."""

import json
import logging
import os
import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from shards.common.errors import DataError, DermscaleError, one_line
from shards.common.files import whole_file

Norm = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation, RGB, of pixels from 0 to 1."""

_WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema")
_PREFIXES = ("_orig_mod.", "module.")


@dataclass
class Weights:
    """Tensors by name as a file holds them. source: the file's name. norm: the normalisation it names, if it does."""

    source: str
    state: dict[str, Tensor]
    norm: Norm | None = None


@contextmanager
def safetensors_file(path: Path, framework: str) -> Iterator[Any]:
    """safetensors' `safe_open` of any path. It takes none that is not UTF-8, so it gets the path of the open file.

    Raises OSError if the file cannot be opened, SafetensorError if it is damaged.
    """
    from safetensors import safe_open

    with path.open("rb") as file, safe_open(f"/dev/fd/{file.fileno()}", framework=framework) as content:
        yield content


def read_weights(path: Path) -> Weights:
    """Read a .safetensors file, or a PyTorch file with `weights_only`: neither can run code.

    Raises DataError, with the file's name, if it is missing, damaged, or holds something other than tensors.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file (--weights)")
    from safetensors import SafetensorError

    norm = None
    try:
        if path.suffix == ".safetensors":
            with safetensors_file(path, "pt") as file:
                metadata = file.metadata() or {}
                state: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if "mean" in metadata and "std" in metadata:
                norm = (tuple(json.loads(metadata["mean"])), tuple(json.loads(metadata["std"])))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise DataError(f"{path}: no readable weights ({one_line(error, 160)})") from None
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"{path}: holds no state dict (names and tensors)")
    for prefix in _PREFIXES:
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return Weights(str(path), state, norm)


def load_fitting(body: nn.Module, weights: Weights, classifier: str = "", assign: bool = False) -> None:
    """Load weights into a network. A classifier for another number of classes keeps its random weights.

    classifier: the name of the last layer. assign: as for `load_state_dict`. Raises DataError, with the first tensors
    that do not fit.
    """
    own, state = body.state_dict(), dict(weights.state)
    for name in (f"{classifier}.weight", f"{classifier}.bias"):
        if name in state and name in own and state[name].shape != own[name].shape:
            state[name] = own[name]
    try:
        body.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        reason = one_line(str(error).partition(":")[2], 200)
        raise DataError(f"{weights.source}: weights of another model or size ({reason})") from None


def write_weights(path: Path, body: nn.Module, metadata: dict[str, str]) -> None:
    """Write a network's tensors as safetensors, under their plain names. The file is replaced as a whole."""
    from safetensors.torch import save

    plain = {name: value.detach().cpu().contiguous() for name, value in body.state_dict().items()}
    content = save(plain, metadata=metadata)
    header, tensors_at = _in_order(content)
    with whole_file(path) as file:
        file.write(header)
        file.write(memoryview(content)[tensors_at:])  # no copy of hundreds of MB: it would take longer than writing


def _in_order(content: bytes) -> tuple[bytes, int]:
    """A safetensors file's header with its metadata sorted by name, and the offset of its tensors.

    The library writes the metadata in a different order each time.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + size


@contextmanager
def downloading(name: str) -> Iterator[None]:
    """Turn a failed download of a model's weights into one line (DataError). Without a network it fails at once."""
    from huggingface_hub import constants

    quiet, offline = logging.getLogger("huggingface_hub"), constants.HF_HUB_OFFLINE
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    if not _network():
        constants.HF_HUB_OFFLINE = True  # use the cache alone: without this the hub's client retries for 47 s
    try:
        yield
    except DermscaleError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"--pretrained: the weights of {name} could not be downloaded ({one_line(error, 160)}); download them on "
            "a machine with a network and give the file with --weights"
        ) from None
    finally:
        constants.HF_HUB_OFFLINE = offline
        quiet.setLevel(level)


def _network() -> bool:
    """Whether the host of the weights has an address, or a proxy is set that looks it up."""
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
