"""Shared fixtures: a tiny shard set made on the spot, a run on it, and the folder of real images where there is one."""

import gc
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click
import numpy as np
import pytest

from shards.common import cli
from shards.format import HAM10000, Classes, EncodeSpec
from shards.jpeg import encode_jpeg
from shards.shardset import ShardSet
from shards.writer import PackedSample, ShardSetWriter

if TYPE_CHECKING:
    from tests.support.download_server import Server

pytest.register_assert_rewrite(
    "tests.support.report_pages", "tests.support.train_runs"
)  # a failing assert shows its values there too


def pytest_configure() -> None:
    """No test depends on how long an example takes: other work may run beside it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and one under nohup this
    try:
        from hypothesis import HealthCheck, settings
    except ImportError:  # the peers' environment, where the tests of benchmarks alone are run
        return
    settings.register_profile("dermscale", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("dermscale")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command as its `__main__` does: its exit code, standard output and standard error."""

    def run(main: click.Command, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.run(main)
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The folder of real HAM10000 images, from the environment variable HAM10000_SAMPLE."""
    folder = os.environ.get("HAM10000_SAMPLE")
    if not folder or not Path(folder).is_dir():
        pytest.skip("HAM10000_SAMPLE names no folder of real images")
    return Path(folder)


@pytest.fixture
def server() -> "Iterator[Server]":
    """A server of small files in the official layout of HAM10000."""
    from tests.support.download_server import serving

    with serving() as running:
        yield running


def picture(rng: np.random.Generator, label: int, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8 RGB: smooth texture, a blob whose colour hangs on the label, and some noise."""
    yy, xx = np.mgrid[0:height, 0:width].astype(np.float32)
    cy, cx = rng.uniform(0.4, 0.6) * height, rng.uniform(0.4, 0.6) * width
    blob = np.exp(-(((yy - cy) / (0.25 * height)) ** 2 + ((xx - cx) / (0.25 * width)) ** 2))[..., None]
    skin = (
        np.array([210, 160, 140], np.float32)
        + 20 * np.sin(xx / rng.uniform(5, 20) + yy / rng.uniform(5, 20))[..., None]
    )
    lesion = np.array([(37 * label) % 150, (61 * label) % 150, (23 * label) % 150], np.float32)
    noise = rng.normal(0, 6, (height, width, 3)).astype(np.float32)
    return np.clip(skin * (1 - blob) + lesion * blob + noise, 0, 255).astype(np.uint8)


def write_set(
    out: Path,
    encoding: str = "jpg",
    images: int = 120,
    size: tuple[int, int] | None = (72, 96),
    shares: tuple[float, float, float] = (0.6, 0.2, 0.2),
    classes: Classes = HAM10000,
) -> Path:
    """Write a set of `images` pictures, lesions of one to three views. encoding: jpg, raw or mixed.

    shares: of train, val and test.
    """
    rng, of_all = np.random.default_rng(0), len(classes)
    spec = EncodeSpec(write_mode="jpg" if encoding == "jpg" else "raw")
    with ShardSetWriter(out, spec, 1 << 20, classes=classes) as writer:
        number = 0
        for split, share in zip(("train", "val", "test"), shares, strict=True):
            for i in range(int(images * share)):
                label = i % of_all
                height, width = size or (int(rng.integers(40, 120)), int(rng.integers(40, 120)))
                image = picture(rng, label, height, width)
                kind = encoding if encoding != "mixed" else ("jpg", "raw")[number % 2]
                write_sample(writer, number, f"LES_{split}_{label}_{i // (3 * of_all)}", label, split, image, kind)
                number += 1
        finish_set(writer)
    return out


def little_metadata(image_id: str, dx: str) -> dict[str, str | None]:
    """The metadata of an image of which nothing else is known."""
    return {"image_id": image_id, "dx": dx} | dict.fromkeys(
        ("lesion_id", "dx_type", "age", "sex", "localization", "dataset")
    )


def write_sample(
    writer: ShardSetWriter, number: int, lesion: str, label: int, split: str, image: np.ndarray, kind: str = "jpg"
) -> None:
    """Add one picture as image `number` of a lesion, with all metadata."""
    metadata = {
        "image_id": f"IMG_{number:05d}",
        "lesion_id": lesion,
        "dx": writer.classes.names[label],
        "dx_type": "histo",
        "age": None if number % 9 == 0 else float(20 + number % 60),
        "sex": "unknown",
        "localization": "back",
        "dataset": "test",
    }
    payload = encode_jpeg(image) if kind == "jpg" else npy_bytes(image)
    writer.add(PackedSample(payload, kind, *image.shape[:2], split, metadata))


def finish_set(writer: ShardSetWriter, unit: str = "lesion") -> None:
    """Finish a set of test pictures that was split by `unit`: lesion or image."""
    writer.finish(
        mean=(0.7, 0.55, 0.5),
        std=(0.2, 0.2, 0.2),
        split={"ratio": [60, 20, 20], "seed": 0, "unit": unit},
        source={"name": "test pictures"},
        citation="none",
        licence="none",
        versions={},
    )


def npy_bytes(image: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    import io

    file = io.BytesIO()
    np.save(file, image)
    return file.getvalue()


def anonymous_bytes() -> int:
    """This process's own memory, without pages of files, of which libraries and shards map more at any time."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def growth_bytes(epoch: Callable[[int], None]) -> float:
    """By how much memory grows over 15 epochs, `epoch(number)` each, once it is at its size.

    Threads take and give back a few MB between epochs, up to ten more in the first dozen than after the second: so the
    middle of many epochs is compared, and not one epoch with another.
    """
    sizes = []
    for number in range(45):
        epoch(number)
        gc.collect()
        sizes.append(anonymous_bytes())
    return median(sizes[30:]) - median(sizes[15:30])


def free_port() -> int:
    """A port of this machine that nobody listens on, out of those that the system gives nobody of itself."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port among 100")


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG set of 120 pictures, 96x72 px, in train, val and test."""
    return write_set(tmp_path_factory.mktemp("sets") / "tiny")


@pytest.fixture(scope="session")
def shard_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    """jpg, raw and mixed sets of one size, and `sizes`: a mixed set whose pictures all differ in size."""
    folder = tmp_path_factory.mktemp("sets")
    sets = {kind: ShardSet(write_set(folder / kind, kind)) for kind in ("jpg", "raw", "mixed")}
    return sets | {"sizes": ShardSet(write_set(folder / "sizes", "mixed", size=None))}


@pytest.fixture(scope="session")
def whole(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of `tests.support.train_runs.small`, to compare others with; nobody may change it."""
    from tests.support.train_runs import small
    from train.loop import train_once

    out = tmp_path_factory.mktemp("runs") / "whole"
    train_once(small(tiny_shards), out)
    return out
