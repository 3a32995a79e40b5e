"""A folder like HAM10000's, and processes, for the tests of the benchmarks."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from benchmarks.machine import environment
from benchmarks.measure import Announce, Measurement, Sample, Series
from benchmarks.peers.system import MissingPeerError, need
from benchmarks.worker import start_server

IMAGES = 40
T = TypeVar("T")


def skip_without(packages: tuple[str, ...]) -> None:
    """Skip where a peer is not installed."""
    try:
        need(packages)
    except MissingPeerError as error:
        pytest.skip(str(error))


def measurement(rounds: int = 1, seconds: float = 0.0, announce: Announce = print, **machine: Any) -> Measurement:
    """Where and how long to time. machine: what its description says instead of the truth."""
    return Measurement(replace(environment("test"), **machine), rounds, seconds, announce)


def series(*per_s: float, wait: float = 0.0) -> Series:
    """Timed runs at these images per second, of 100 images each. wait: the share of the time without a batch."""
    return Series([Sample(100, 100 / rate, 1.0, 0.25, wait * 100 / rate) for rate in per_s])


def in_a_process_of_its_own(do: Callable[..., T], *arguments: Any) -> T:
    """What `do` returns there. A fork may hang in a process where other tests have left threads."""
    with ProcessPoolExecutor(1, mp_context=start_server()) as pool:
        return pool.submit(_as_a_worker_does, multiprocessing.get_start_method(), do, *arguments).result(timeout=120)


def _as_a_worker_does(start_method: str, do: Callable[..., T], *arguments: Any) -> T:
    """`do` with workers that start as Python starts them by default (benchmarks/worker.py)."""
    multiprocessing.set_start_method(start_method, force=True)
    return do(*arguments)
