"""A folder like HAM10000's, and processes, for the tests of the benchmarks."""

import csv
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import pytest

from benchmarks.machine import environment
from benchmarks.measure import Announce, Measurement, Sample, Series
from benchmarks.peers.system import MissingPeerError, need
from benchmarks.worker import start_server
from shards.format import CLASSES

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


def write_source(source: Path) -> Path:
    """Write `IMAGES` smooth pictures in the colours of skin, 600×450 like the originals, with their metadata."""
    images = source / "HAM10000_images_part_1"
    images.mkdir(parents=True)
    random = np.random.default_rng(0)
    rows = []
    for i in range(IMAGES):
        noise = random.normal(0, 25, (6, 8, 3)).astype(np.float32)
        picture = cv2.resize(noise, (600, 450), interpolation=cv2.INTER_CUBIC) + np.array([190, 140, 120], np.float32)
        name = f"ISIC_{i:07d}"
        pixels = cv2.cvtColor(picture.clip(0, 255).astype(np.uint8), cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(images / f"{name}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])
        rows.append([f"HAM_{i:07d}", name, CLASSES[i % 7], "histo", "50", "male", "back"])
    with (source / "HAM10000_metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"])
        writer.writerows(rows)
    return source
