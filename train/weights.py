"""Weights in files: reading them safely, loading them into a network, downloading and writing them."""

import argparse
import hashlib
import json
import logging
import os
import pathlib
import pickle
import re
import socket
import types
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from shards.common.errors import DataError, DermscaleError, one_line
from shards.common.files import whole_file
from shards.plan import INTERPOLATIONS

Norm = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation, RGB, of pixels from 0 to 1."""

_WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "net", "network", "teacher", "student"),
    *("state_dict_ema", "model_ema", "ema"),
)
"""Keys under which training code saves tensors. The first that a file has is taken: plain weights before averages."""
_PREFIXES = (
    *("module.", "_orig_mod.", "_forward_module.", "model.", "net.", "network.", "backbone.", "encoder."),
    *("teacher.", "student."),
)
"""What training code puts before the names of a network that it wraps, in any order and number."""
_DIGEST, _NO_DIGEST = "content_xxh3", "0" * 16
"""Key of the digest in our files' metadata, and what stands there while it is computed."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAMES_SHOWN = 3
_NUMPY_SCALAR = np.float64().__reduce__()[0]
"""What makes a number of NumPy when it is unpickled."""


def _harmless() -> list[Any]:
    """What a PyTorch file may hold besides tensors and plain values: options, paths, NumPy's numbers.

    Their constructors keep values and do nothing else. timm's `train.py` saves its options as a Namespace.
    """
    paths = ((pathlib.PurePosixPath, "PosixPath"), (pathlib.PureWindowsPath, "WindowsPath"))
    numbers = [np.dtype(code) for code in "?bhilqBHILQefd"]
    return [
        argparse.Namespace,
        types.SimpleNamespace,
        *((kind, f"{module}.{name}") for kind, name in paths for module in ("pathlib", "pathlib._local")),
        np.dtype,
        *{type(number) for number in numbers},
        *((_NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    ]


@dataclass
class Weights:
    """Tensors by name as a file holds them. source: the file's name. norm: the normalisation it names, if it does.

    interpolation: how the images were resized, if it names that too.
    """

    source: str
    state: dict[str, Tensor]
    norm: Norm | None = None
    interpolation: str | None = None


@contextmanager
def safetensors_file(path: Path, framework: str) -> Iterator[Any]:
    """safetensors' `safe_open` of any path. It takes none that is not UTF-8, so it gets the path of the open file.

    Raises OSError if the file cannot be opened, SafetensorError if it is damaged.
    """
    from safetensors import safe_open

    with path.open("rb") as file, safe_open(f"/dev/fd/{file.fileno()}", framework=framework) as content:
        yield content


def read_norm(metadata: dict[str, str]) -> Norm:
    """Mean and deviation in the metadata of a file. Raises ValueError if they are not three numbers each, std > 0."""
    found: list[tuple[float, ...]] = []
    for name, least in (("mean", -100.0), ("std", 1e-6)):
        text, values = metadata[name], []
        with suppress(ValueError, RecursionError):
            values: Any = json.loads(text)
        right = isinstance(values, list) and len(values) == 3
        if not right or not all(type(x) in (int, float) and least <= x <= 100.0 for x in values):
            raise ValueError(f"its {name} is {one_line(text, 60)}, expected 3 numbers from {least:g} to 100")
        found.append(tuple(values))
    return found[0], found[1]


def read_interpolation(metadata: dict[str, str]) -> str:
    """The interpolation in the metadata of a file: bilinear in those of older releases, which name none.

    Raises ValueError if it is unknown.
    """
    text = metadata.get("interpolation", "bilinear")
    if text not in INTERPOLATIONS:
        raise ValueError(f"its interpolation is {one_line(text, 60)}, expected {' or '.join(INTERPOLATIONS)}")
    return text


def read_pickled(file: IO[bytes]) -> Any:
    """What a PyTorch file holds, with its tensors on the CPU. It makes nothing but these and `_harmless`: no code runs.

    Raises ValueError with the reason in one line. PyTorch's own texts advise to load unsafely, and have escape codes.
    """
    try:
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(file) as archive:
                if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
                    raise zipfile.BadZipFile  # PyTorch compresses nothing; a few bytes could become any number
        file.seek(0)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_harmless()):
            warnings.simplefilter("ignore")  # about kinds of tensors that `_unusable` refuses
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (a hostile file may provoke any; it is raised in other words)
        raise ValueError(_why_unreadable(error)) from None


def _why_unreadable(error: Exception) -> str:
    """Why a PyTorch file cannot be read, in words of this project."""
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if foreign:
        return (
            f"it holds an object of {foreign[1][:80]}, which is not loaded because it could run code; save its tensors "
            "alone, with torch.save(model.state_dict(), FILE)"
        )
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "it needs more memory than there is"
    if "TorchScript" in str(error):
        return "it is a TorchScript archive; save its tensors alone, with torch.save(model.state_dict(), FILE)"
    return "it is damaged, or not a file of PyTorch"


def read_weights(path: Path) -> Weights:
    """Read a .safetensors file, or a PyTorch file: neither can run code.

    Raises DataError, with the file's name, if it is missing, damaged, or holds something other than plain tensors.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file (--weights)")
    from safetensors import SafetensorError

    norm = interpolation = None
    try:
        if path.suffix == ".safetensors":
            with safetensors_file(path, "pt") as file:
                metadata = file.metadata() or {}
                if _DIGEST in metadata:  # files of older releases and of other people have none
                    _check_digest(path, metadata[_DIGEST])
                state: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if "mean" in metadata and "std" in metadata:
                norm = read_norm(metadata)
                interpolation = read_interpolation(metadata) if "interpolation" in metadata else None
        else:
            with path.open("rb") as file:
                state = read_pickled(file)
            if isinstance(state, dict) and state.keys() >= {"version", "progress", "loader", "normalisation"}:
                raise ValueError(
                    "it is the checkpoint of a run, which does not tell how images are prepared; finish the run with "
                    "--resume, and give its model.safetensors"
                )
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: no readable weights ({one_line(error, 300)})") from None
    return Weights(str(path), _state_dict(state, path), norm, interpolation)


def _state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name in what a file holds, at its top or under the usual keys. Raises DataError without any."""
    for _ in _WRAPPERS:  # they may be nested, and a hostile file nests one in itself
        inner = [found[key] for key in _WRAPPERS if key in found] if isinstance(found, dict) else []
        found = next((one for one in inner if isinstance(one, dict)), found)
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path}: holds no state dict (names and tensors)")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise DataError(
                f"{path}: holds no state dict (names and tensors): its key {_shown([name])} is no name of a tensor"
            )
        if reason := _unusable(value):
            raise DataError(f"{path}: its tensor {_shown([name])} {reason}; save it as a plain tensor of floats")
    return found


def _unusable(value: Tensor) -> str:
    """Why a tensor cannot be a network's weights, whatever its shape; empty if it can."""
    if type(value) not in (Tensor, nn.Parameter) or value.is_nested:
        return "is of a special class"
    if value.is_quantized:
        return "is quantized"
    if value.layout is not torch.strided:
        return "is sparse"
    if value.device.type != "cpu":
        return f"has no values (it is on the device {value.device.type})"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"claims {value.numel()} values and has fewer"
    return ""


def _shown(names: Collection[Any]) -> str:
    """The first names, and how many more there are. A file can hold any text as a name."""
    first = [name if isinstance(name, str) and name.isprintable() else repr(name) for name in list(names)]
    more = f" and {len(first) - _NAMES_SHOWN} more" if len(first) > _NAMES_SHOWN else ""
    return ", ".join(one_line(name, 60) for name in first[:_NAMES_SHOWN]) + more


def _innermost(state: dict[str, Tensor], own: Set[str], most: int = 8) -> dict[str, Tensor]:
    """`state` without the prefixes of wrappers: of all stacks of them, the one with the most names of the network.

    Names beside the chosen prefix are left out, for example a second network or the weights of a loss. most: prefixes
    in a stack. An unknown prefix that all names share is tried too.
    """
    best, firsts = state, {f"{name.partition('.')[0]}." for name in state}
    shared = firsts.difference(_PREFIXES) if len(firsts) == 1 else ()
    for prefix in (*_PREFIXES, *shared) if most else ():
        inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if inner:
            inner = _innermost(inner, own, most - 1)
            more = len(own & inner.keys()) - len(own & best.keys())
            if more > 0 or (more == 0 and len(inner) == len(state) and prefix in _PREFIXES):
                best = inner
    return best


def load_fitting(
    body: nn.Module,
    weights: Weights,
    heads: Collection[str] = (),
    adapt: "Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None" = None,
    assign: bool = False,
) -> str:
    """Load weights into a network. A layer in `heads` that the file lacks or has in another shape stays as it is.

    heads: names of the classifier's tensors; if it is empty, everything must fit. adapt: converts the file's names and
    tensors to the network's. assign: as for `load_state_dict`. Returns what was left out or is new, in words. Raises
    DataError, with the first tensors that differ, if the rest does not fit.
    """
    own = body.state_dict()
    state, notes = _innermost(weights.state, own.keys()), []
    if left := len(weights.state) - len(state):
        notes.append(f"{left} tensor{'s' * (left > 1)} beside the network left out")
    failed = ""
    if adapt is not None:
        try:
            state = dict(adapt(dict(state), body))
        except Exception as error:  # noqa: BLE001 (it meets whatever the file holds; the error is raised below)
            failed = f"timm's conversion of its tensors fails: {type(error).__name__} {one_line(error, 100)}"
    for layer in sorted({name.rpartition(".")[0] for name in heads}):
        names = {name for name in heads if name.rpartition(".")[0] == layer}
        given = {name for name in state if name.startswith(f"{layer}.")}
        if given != names or any(state[name].shape != own[name].shape for name in names):
            has = ", ".join(f"{_shown([name])} of {_size(state[name])}" for name in sorted(given)[:2]) or "none"
            notes.append(f"the layer {layer} is new, the file has {has}")
            state = {name: value for name, value in state.items() if name not in given}
            state |= {name: own[name] for name in names}
    for name in own:
        if name.endswith(".num_batches_tracked") and name not in state:  # PyTorch before 0.4.1, and exports, lack them
            state[name] = torch.zeros((), dtype=torch.int64)
    reason = _differences(own, state) or failed
    if reason:
        raise DataError(f"{weights.source}: weights of another model or size ({reason})")
    for name, value in state.items():
        if own[name].is_floating_point():
            if value.dtype not in _FLOATS:
                raise DataError(
                    f"{weights.source}: {_shown([name])} holds {str(value.dtype).removeprefix('torch.')}, not floats"
                )
            if not torch.isfinite(value).all():
                raise DataError(f"{weights.source}: {_shown([name])} holds NaN or infinite values; use another file")
        state[name] = value.to(own[name].dtype)
    body.load_state_dict(state, assign=assign)
    return "; ".join(notes) or "all tensors fit"


def _size(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"


def _differences(own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """In which names and shapes a file's tensors differ from a network's; empty if in none."""

    lacking = [name for name in own if name not in state]
    beside = [name for name in state if name not in own]
    other = [
        f"{_shown([name])} is {_size(state[name])} in the file and {_size(own[name])} in the network"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    parts = (
        f"only the network has {_shown(lacking)}" if lacking else "",
        f"only the file has {_shown(beside)}" if beside else "",
        "; ".join(other[:_NAMES_SHOWN])
        + (f" and {len(other) - _NAMES_SHOWN} more" if len(other) > _NAMES_SHOWN else ""),
    )
    return "; ".join(filter(None, parts))


def write_weights(path: Path, body: nn.Module, metadata: dict[str, str]) -> None:
    """Write a network's tensors as safetensors, under their plain names. The file is replaced as a whole.

    Its metadata get the XXH3 of all its bytes, which `read_weights` checks.
    """
    from safetensors.torch import save

    plain = {name: value.detach().cpu().contiguous() for name, value in body.state_dict().items()}
    content = save(plain, metadata=metadata | {_DIGEST: _NO_DIGEST})
    header, tensors_at = _in_order(content)
    tensors = memoryview(content)[tensors_at:]  # no copy of hundreds of MB: it would take longer than writing
    digest = xxhash.xxh3_64(header)
    digest.update(tensors)
    with whole_file(path) as file:
        file.write(header.replace(_digest_field(_NO_DIGEST), _digest_field(digest.hexdigest()), 1))
        file.write(tensors)


def _digest_field(digest: str) -> bytes:
    return f'"{_DIGEST}":"{digest}"'.encode()


def _check_digest(path: Path, digest: str) -> None:
    """Raise ValueError if a safetensors file's bytes are not those that `write_weights` gave this digest."""
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        found = xxhash.xxh3_64(size + header.replace(_digest_field(digest), _digest_field(_NO_DIGEST), 1))
        hashlib.file_digest(file, lambda: found)  # pyright: ignore[reportArgumentType]
    if found.hexdigest() != digest:
        raise ValueError(f"its bytes are not those of its {_DIGEST}: it was damaged or changed after it was written")


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
    except (OSError, RuntimeError, ValueError, ImportError) as error:  # ImportError: for a SOCKS proxy
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
