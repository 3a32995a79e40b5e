"""How long `train.predict` and `train.serve` take to start, each as a user starts it: a process of its own."""

import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.machine import Meter, tree_cpu_s
from benchmarks.measure import Sample
from shards.common.errors import last_line

_START_LIMIT_S = 120.0
"""A start that takes longer is a hang."""


class StartFailedError(Exception):
    """A command ended with an error, or never got ready; the text is its last line."""


def start_predict(run: Path, image: Path, device: str) -> Sample:
    """`train.predict` on one image, from its start to its end. Raises StartFailedError."""
    command = [sys.executable, "-m", "train.predict", "--run", str(run), str(image), "--device", device]
    meter, cpu_s, begin = Meter(), _children_cpu_s(), time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_START_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise StartFailedError(f"not done after {_START_LIMIT_S:.0f} s") from None
    seconds, cpu_s = time.perf_counter() - begin, _children_cpu_s() - cpu_s
    if done.returncode:
        raise StartFailedError(last_line(done.stderr))
    return Sample(1, seconds, cpu_s, meter.other_cpu(cpu_s))


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start_serve(run: Path, device: str) -> Sample:
    """`train.serve` from its start to its ready line; then it is ended. Raises StartFailedError."""
    from train.inference.neighbours import FILE

    (run / FILE).unlink(missing_ok=True)  # every start is a first one
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "train.serve", "--run", str(run), "--port", str(port), "--device", device]
    meter, begin = Meter(), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        limit = threading.Timer(_START_LIMIT_S, process.kill)
        limit.start()
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said = line.strip() or said
                if "is ready" in line:
                    seconds, cpu_s = time.perf_counter() - begin, tree_cpu_s(process.pid)
                    return Sample(1, seconds, cpu_s, meter.other_cpu(cpu_s))
            raise StartFailedError(said or f"ended, or not ready after {_START_LIMIT_S:.0f} s")
        finally:
            process.send_signal(signal.SIGTERM)  # nothing where it has ended
            process.communicate()
            limit.cancel()
