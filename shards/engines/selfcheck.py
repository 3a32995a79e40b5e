"""Does the dali engine work on this GPU? Found out in a process of its own: a crash in a decoder cannot be caught.

That process runs `main`: it loads real samples with both engines and prints how far they are apart. `verdicts.py` keeps
what came out.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shards.common.errors import last_line
from shards.engines import verdicts

if TYPE_CHECKING:
    import torch

    from shards.shardset import Selection, ShardSet

_log = logging.getLogger(__name__)

NAMES = {"whole": "whole-image decode with a slice", "region": "region decode"}
"""The variants of dali in the order in which they are taken. On an H100 400 px JPEGs came faster whole (23,900 img/s)
than cut (17,600; one run each), for it decodes in hardware faster than Python cuts. Not measured: much larger images,
and GPUs without such hardware, which may be faster with regions."""
TIMEOUT_S = 180.0  # a process that starts CUDA and loads four batches takes seconds; a cold disk a minute
_BATCH, _ROUNDS, _RESOLUTION = 64, 4, 224
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""Signals that a process brings on itself. Others come from outside, such as SIGKILL where memory ran out."""

_unsettled: dict[Path, str] = {}
"""Failures that are no verdict on the decoder, by the file that would keep one: for this process they stand."""


def best_variant(
    selection: "Selection",
    device: "torch.device",
    *,
    child: Sequence[str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> tuple[str | None, str]:
    """The first of NAMES that agrees with the native engine, and the reason.

    None where neither does. child: the command of the checking process, another one in tests.
    """
    reasons = []
    for variant, name in NAMES.items():
        passed, reason = check(selection, device, variant, child=child, timeout_s=timeout_s)
        reasons.append(f"{name} {reason}")
        if passed:
            return variant, "; ".join(reasons)
        _log.warning("dali on %s: %s %s", device, name, reason)
    return None, "; ".join(reasons)


def check(
    selection: "Selection",
    device: "torch.device",
    variant: str,
    *,
    child: Sequence[str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> tuple[bool, str]:
    """Whether the variant agrees with the native engine on this device, and how that was found out.

    A verdict on the decoder is kept; a failure that may have another cause is not: a GPU without free memory, a signal
    from outside, no answer in time from a slow disk. Only another process checks again after one: it may have taken
    minutes, and what this process loads, such as the runs of a study, should all come from one engine.
    """
    key = verdicts.key_of(selection.data, device, variant, selection.samples)
    file = verdicts.cache_file(key)
    if file in _unsettled:
        return False, f"{_unsettled[file]} (found before in this process; another one checks again)"
    kept = verdicts.read(file, key)
    if kept is not None:
        return kept[0], f"{kept[1]} (kept in {file})"
    passed, reason, final = _ask_child(selection, device, variant, child, timeout_s)
    reason = f"{reason} on {key['gpu']}, driver {key['driver']}, DALI {key['versions']['nvidia-dali']}"
    if final:
        verdicts.keep(file, key, passed, reason)
    else:
        _unsettled[file] = reason
    return passed, reason


def _ask_child(
    selection: "Selection", device: "torch.device", variant: str, child: Sequence[str] | None, timeout_s: float
) -> tuple[bool, str, bool]:
    """Run the checking process: whether the engines agree, the reason, and whether the answer is worth keeping."""
    question = {
        "path": str(selection.data.path.resolve()),
        "samples": _some_of_each(selection).tolist(),
        "device": str(device),
        "variant": variant,
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
        start_new_session=True,  # so that what it starts can be ended with it
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
        last = last_line(errors)
        return False, f"could not be checked: {last}", False
    return judge(json.loads(output.splitlines()[-1]), str(device))


def _some_of_each(selection: "Selection") -> np.ndarray:
    """About `_BATCH` samples, as many of each encoding, from all over the selection."""
    encodings = selection.data.column("encoding")[selection.samples].astype(str)
    kinds = np.unique(encodings)
    rows = [selection.samples[encodings == kind] for kind in kinds]
    counts = [min(_BATCH // len(kinds), len(some)) for some in rows]
    places = [np.linspace(0, len(some) - 1, count).astype(np.int64) for some, count in zip(rows, counts, strict=True)]
    return np.concatenate([some[place] for some, place in zip(rows, places, strict=True)])


def judge(apart: dict[str, dict[str, float]], device: str) -> tuple[bool, str, bool]:
    """Whether the differences are within what is tolerated, in words, and True: such a verdict is worth keeping.

    apart: of `differences`. A GPU's JPEG decoder may be a mean below 1 apart and 4 in all but 0.1 % of the values,
    since it rounds elsewhere; everything else 1.
    """
    passed, words = True, []
    for encoding, found in sorted(apart.items()):
        if encoding == "jpg" and device != "cpu":
            passed &= found["mean"] < 1 and found["within_4"] >= 0.999
        else:
            passed &= found["max"] <= 1
        words.append(
            f"{encoding} mean {found['mean']:.3f}, max {found['max']:.0f}, {100 * found['within_4']:.2f} % within 4"
        )
    return passed, f"{'agreed' if passed else 'disagreed'} with native ({'; '.join(words)})", True


def differences(data: "ShardSet", samples: np.ndarray, device: str, variant: str) -> dict[str, dict[str, float]]:
    """How far dali's images are from native's, by encoding: mean and max of 255, and the share within 4.

    One batch of training crops, loaded several times, so that buffers are used again.
    """
    from shards.engines import Request
    from shards.engines.dali import DaliEngine
    from shards.engines.native import NativeEngine
    from shards.plan import Augment, training_plan

    plan = training_plan(0, 0, samples, data.column("height")[samples], data.column("width")[samples], Augment())
    request = Request(samples, plan.boxes, plan.symmetry)
    native, dali = NativeEngine(data), DaliEngine(data, device, contents=contents(data, samples), variant=variant)
    (expected,) = native.run([request], _RESOLUTION)
    raw = data.column("encoding")[samples] == "raw"
    parts: dict[str, list[np.ndarray]] = {"jpg": [], "raw": []}
    for images in dali.run([request] * _ROUNDS, _RESOLUTION):
        apart = np.abs(images.cpu().numpy().astype(np.int16) - expected.numpy())
        parts["jpg"].append(apart[~raw])
        parts["raw"].append(apart[raw])
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
    """Answer the question on standard input, as JSON, in the last line of standard output."""
    from shards.shardset import ShardSet

    question = json.load(sys.stdin)
    with ShardSet(question["path"]) as data:
        samples = np.array(question["samples"], np.int64)
        answer = differences(data, samples, question["device"], question["variant"])
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
