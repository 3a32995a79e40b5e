"""Does the dali engine work on this GPU? A separate process finds out, because a crash in a decoder cannot be caught.

That process runs `main`: it loads real samples with both engines and prints by how much they differ. The verdict is
kept in a file, one per GPU model, driver, library versions, graph variant, interpolation, packing and set of
encodings. Delete the file to check again.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.common import kept
from shards.common.errors import last_line

if TYPE_CHECKING:
    import torch

    from shards.shardset import Selection, ShardSet

_log = logging.getLogger(__name__)

NAMES = {"whole": "whole-image decode with a slice", "region": "region decode"}
"""The variants of the dali graph, in the order in which they are tried. On an H100, 400 px JPEGs loaded faster whole
(23,900 img/s) than cut (17,600; one run each): its hardware decodes faster than Python cuts. Not measured: much larger
images, and GPUs without such hardware. Regions may be faster there."""
TIMEOUT_S = 180.0
"""A process that starts CUDA and loads four batches takes seconds; with a cold disk, a minute."""
_BATCH, _ROUNDS, _RESOLUTION = 64, 4, 224
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""Signals that a process causes itself. Others come from outside, such as SIGKILL when memory ran out."""
_REVISION = 3
"""Of what is checked and how. Another revision makes old verdicts void."""

_inconclusive: dict[Path, str] = {}
"""Failures that may have another cause than the decoder, by the file of the verdict. They hold for this process."""


def best_variant(
    selection: "Selection",
    device: "torch.device",
    interpolation: str = "bilinear",
    *,
    child: Sequence[str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> tuple[str | None, str]:
    """The first of NAMES that agrees with the native engine, and the reason.

    None if neither does. interpolation: one of `plan.INTERPOLATIONS`. child: the command of the checking process; tests
    give another one.
    """
    reasons = []
    for variant, name in NAMES.items():
        passed, reason = check(selection, device, variant, interpolation, child=child, timeout_s=timeout_s)
        reasons.append(f"{name} {reason}")
        if passed:
            return variant, "; ".join(reasons)
        _log.warning("dali on %s: %s %s", device, name, reason)
    return None, "; ".join(reasons)


def check(
    selection: "Selection",
    device: "torch.device",
    variant: str,
    interpolation: str = "bilinear",
    *,
    child: Sequence[str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> tuple[bool, str]:
    """Whether the variant agrees with the native engine on this device, and how that was found out.

    A verdict on the decoder is kept on disk. A failure that may have another cause is not: a GPU without free memory,
    a signal from outside, no answer in time from a slow disk. Such a failure holds for this process, and the next
    process checks again: all that one process loads, such as the runs of a study, should come from one engine, and a
    check can take minutes.
    """
    key = key_of(selection.data, device, variant, selection.samples, interpolation)
    file = kept.file_of("dali", key)
    if file in _inconclusive:
        return False, f"{_inconclusive[file]} (found earlier in this process; the next process checks again)"
    verdict = kept.recall("dali", key, {"passed": bool, "reason": str})
    if verdict is not None:
        return verdict["passed"], f"{verdict['reason']} (kept in {file})"
    passed, reason, conclusive = _ask_child(selection, device, variant, interpolation, child, timeout_s)
    reason = f"{reason} on {key['gpu']}, driver {key['driver']}, DALI {key['versions']['nvidia-dali']}"
    if conclusive:
        kept.keep("dali", key, {"passed": passed, "reason": reason})
    else:
        _inconclusive[file] = reason
    return passed, reason


def _ask_child(
    selection: "Selection",
    device: "torch.device",
    variant: str,
    interpolation: str,
    child: Sequence[str] | None,
    timeout_s: float,
) -> tuple[bool, str, bool]:
    """Run the checking process. Returns whether the engines agree, the reason, and whether to keep the verdict."""
    question = {
        "set": selection.data.opened_with,
        "samples": _some_of_each(selection).tolist(),
        "device": str(device),
        "variant": variant,
        "interpolation": interpolation,
    }
    package_home = str(Path(__file__).resolve().parents[2])
    search = [package_home, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        child or [sys.executable, "-c", "from shards.engines.selfcheck import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(search)},
        start_new_session=True,  # so that its own children can be ended with it
    )
    try:
        output, errors = process.communicate(json.dumps(question), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return False, f"hung: no answer in {timeout_s:.0f} s", False
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    if process.returncode < 0:
        ended_by = signal.Signals(-process.returncode)
        crashed = ended_by in _CRASHES
        return False, f"{'crashed' if crashed else 'ended from outside'}: {ended_by.name}", crashed
    if process.returncode > 0:
        return False, f"could not be checked: {last_line(errors)}", False
    return judge(json.loads(output.splitlines()[-1]), str(device))


def _some_of_each(selection: "Selection") -> np.ndarray:
    """About `_BATCH` samples spread over the selection, equally many of each encoding."""
    encodings = selection.data.column("encoding")[selection.samples].astype(str)
    kinds = np.unique(encodings)
    rows = [selection.samples[encodings == kind] for kind in kinds]
    counts = [min(_BATCH // len(kinds), len(some)) for some in rows]
    places = [np.linspace(0, len(some) - 1, count).astype(np.int64) for some, count in zip(rows, counts, strict=True)]
    return np.concatenate([some[place] for some, place in zip(rows, places, strict=True)])


def judge(found: dict[str, dict[str, float]], device: str) -> tuple[bool, str, bool]:
    """Whether the differences are tolerated, the same in words, and True: such a verdict is kept.

    found: the result of `differences`. A GPU's JPEG decoder rounds in other places than libjpeg: a mean difference
    below 1 is tolerated, and at most 4 in 99.9 % of the values. Everything else may differ by 1.
    """
    passed, words = True, []
    for encoding, numbers in sorted(found.items()):
        if encoding == "jpg" and device != "cpu":
            passed &= numbers["mean"] < 1 and numbers["within_4"] >= 0.999
        else:
            passed &= numbers["max"] <= 1
        words.append(
            f"{encoding} mean {numbers['mean']:.3f}, max {numbers['max']:.0f}, "
            f"{100 * numbers['within_4']:.2f} % within 4"
        )
    return passed, f"{'agreed' if passed else 'disagreed'} with native ({'; '.join(words)})", True


def differences(
    data: "ShardSet", samples: np.ndarray, device: str, variant: str, interpolation: str
) -> dict[str, dict[str, float]]:
    """By how much dali's images differ from native's, per encoding: mean and max of 255, and the share within 4.

    One batch of training crops is loaded several times, so that buffers are reused.
    """
    from shards.engines import Request
    from shards.engines.dali import DaliEngine
    from shards.engines.native import NativeEngine
    from shards.plan import Augment, training_plan

    plan = training_plan(0, 0, samples, data.column("height")[samples], data.column("width")[samples], Augment())
    request = Request(samples, plan.boxes, plan.symmetry)
    kinds, native = contents(data, samples), NativeEngine(data, interpolation=interpolation)
    dali = DaliEngine(data, device, contents=kinds, variant=variant, interpolation=interpolation)
    (expected,) = native.run([request], _RESOLUTION)
    raw = data.column("encoding")[samples] == "raw"
    parts: dict[str, list[np.ndarray]] = {"jpg": [], "raw": []}
    for images in dali.run([request] * _ROUNDS, _RESOLUTION):
        difference = np.abs(images.cpu().numpy().astype(np.int16) - expected.numpy())
        parts["jpg"].append(difference[~raw])
        parts["raw"].append(difference[raw])
    native.close()
    dali.close()
    joined = {encoding: np.concatenate(some) for encoding, some in parts.items()}
    return {
        encoding: {"mean": float(a.mean()), "max": float(a.max()), "within_4": float((a <= 4).mean())}
        for encoding, a in joined.items()
        if a.size
    }


def contents(data: "ShardSet", samples: np.ndarray) -> str:
    """What the samples are: `jpg`, `raw` or `mixed`."""
    kinds = np.unique(data.column("encoding")[samples].astype(str))
    return str(kinds[0]) if len(kinds) == 1 else "mixed"


def main() -> None:
    """Read the question as JSON from standard input; write the answer as JSON, the last line of standard output."""
    from shards.shardset import ShardSet

    question = json.load(sys.stdin)
    with ShardSet(**question["set"]) as data:
        samples = np.array(question["samples"], np.int64)
        answer = differences(data, samples, *(question[name] for name in ("device", "variant", "interpolation")))
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


def key_of(
    data: "ShardSet", device: "torch.device", variant: str, samples: np.ndarray, interpolation: str = "bilinear"
) -> dict[str, Any]:
    """Everything that a verdict depends on. samples: (n,), the numbers of those that are checked.

    The encodings of the samples count, not the write mode alone: with `smart` or `proportion` a set can be all raw,
    and a check of raw samples has decoded no JPEG.
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
        "interpolation": interpolation,
        "gpu": _gpu_name(device),
        "driver": _driver_version(device),
        "versions": versions,
        "packed": [encode.write_mode, encode.subsampling, encode.restart, encode.max_resolution],
        "encodings": sorted(set(data.column("encoding")[samples].tolist())),
    }


def _gpu_name(device: "torch.device") -> str:
    """The model of the GPU, or `cpu`."""
    if device.type == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(device)


def _driver_version(device: "torch.device") -> str:
    """The driver's version, or `unknown` if NVML does not report it."""
    if device.type == "cpu":
        return "none"
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return "unknown"
