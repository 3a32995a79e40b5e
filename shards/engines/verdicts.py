"""Verdicts of the dali engine's check, kept from run to run.

One file a verdict, named after all that it hangs on: the GPU's model, the driver, the versions of the libraries, the
graph's variant, how the set is packed and which encodings were checked. To check again, delete the file.
"""

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from shards.shardset import ShardSet

_log = logging.getLogger(__name__)

_REVISION = 3  # of what is checked and how: another one makes old verdicts void


def key_of(data: "ShardSet", device: "torch.device", variant: str, samples: "np.ndarray") -> dict[str, Any]:
    """All that a verdict hangs on. samples: numbers of those that are checked, (n,).

    Their encodings count, not the write mode alone: with `smart` or `proportion` a set can be all raw, and what agreed
    there has not decoded one JPEG.
    """
    from importlib.metadata import distributions

    names = ("nvidia-dali", "nvidia-nvimgcodec", "nvidia-nvjpeg", "torch", "opencv-python-headless")
    found = {str(d.metadata["Name"]).lower(): d.version for d in distributions()}
    versions = {
        name: next((v for n, v in sorted(found.items()) if f"{n}-".startswith(f"{name}-")), "none") for name in names
    }
    encode = data.manifest.encode
    return {
        "revision": _REVISION,
        "variant": variant,
        "gpu": _gpu_name(device),
        "driver": _driver_version(device),
        "versions": versions,
        "packed": [encode.write_mode, encode.subsampling, encode.restart, encode.max_resolution],
        "encodings": sorted(set(data.column("encoding")[samples].tolist())),
    }


def _gpu_name(device: "torch.device") -> str:
    """The model of the GPU, `cpu` for the CPU."""
    if device.type == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(device)


def _driver_version(device: "torch.device") -> str:
    """The driver's version, `unknown` where NVML does not say."""
    if device.type == "cpu":
        return "none"
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return "unknown"


def cache_file(key: dict[str, Any]) -> Path:
    """Where the verdict is kept: in $XDG_CACHE_HOME/dermscale, by default ~/.cache/dermscale."""
    import xxhash

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "dermscale" / f"dali-{xxhash.xxh3_64_hexdigest(json.dumps(key, sort_keys=True).encode())}.json"


def read(file: Path, key: dict[str, Any]) -> tuple[bool, str] | None:
    """The kept verdict on this key and its reason, None where there is none that can be read."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return (bool(kept["passed"]), str(kept["reason"])) if kept["key"] == key else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s: not readable (%s), checking again", file, error)
        return None


def keep(file: Path, key: dict[str, Any], passed: bool, reason: str) -> None:
    """Write a verdict; where that fails, the next process checks again."""
    from shards.common.files import write_durably

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        verdict = {"key": key, "passed": passed, "reason": reason}
        write_durably(file, (json.dumps(verdict, indent=2, sort_keys=True) + "\n").encode())
    except OSError as error:
        _log.warning("%s: cannot be written (%s), so that the check runs again next time", file, error)
