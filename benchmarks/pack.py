"""The `pack` benchmark: how fast each writer packs, into how many bytes, and what is left of the images."""

import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.datasets import names, originals, packed_size
from benchmarks.machine import Environment
from benchmarks.measure import Row, ratio_row, series_rows
from benchmarks.packers import PACKERS, Packer
from benchmarks.peers.pytorch import need
from benchmarks.peers.system import Work
from benchmarks.tables import busy_text, cell, grid, machine_text, notes, pivot
from benchmarks.targets import targets_text
from benchmarks.worker import Running, Told, take_turns

_JUDGED = 64
"""Originals, the first by name, whose packed pixels are compared with the source: the same of every packer."""

RATIOS = (
    ("dermscale jpg", "FFCV jpg"),
    ("dermscale raw", "FFCV raw"),
    ("dermscale proportion", "FFCV proportion"),
    ("dermscale smart", "FFCV smart"),
    ("dermscale jpg", "webdataset"),
    ("dermscale jpg", "ceiling: bare calls"),
    ("dermscale jpg", "ceiling: bare OpenCV calls"),
)


FIGURES = {
    "bytes_per_image": ("bytes", "payload bytes / image"),
    "file_bytes_per_image": ("bytes", "file bytes / image"),
    "psnr_source_db": ("dB", "PSNR to the source, dB"),
    "psnr_reduced_db": ("dB", "PSNR to the reduced source, dB"),
}
"""What is found once per packer: metric → unit and title."""


def psnr_db(images: Iterator[tuple[np.ndarray, np.ndarray]]) -> float:
    """Peak signal-to-noise ratio in dB of pairs of images on the scale 0 to 255, over their pooled squared error."""
    total, count = 0.0, 0
    for one, other in images:
        total += float(np.square(one.astype(np.float64) - other.astype(np.float64)).sum())
        count += one.size
    if not count:
        raise ValueError("no images to compare")
    return 10 * float(np.log10(255.0**2 / (total / count))) if total else float("inf")


def judge(work: Work, packed: Iterator[tuple[str, np.ndarray]]) -> dict[str, float]:
    """What is left of the first images, in dB: `psnr_source_db` and `psnr_reduced_db`.

    The first compares with the original, the packed image enlarged to its size (bilinear): what was lost in all. The
    second with the original reduced to the packed size in floating point (area): what encoding and rounding lost.
    """
    import cv2

    files = {path.stem: path for path, _, _ in originals(work)[:_JUDGED]}
    pairs = []
    for name, pixels in packed:
        path = files.pop(name, None)  # of copies the first; packers write in orders of their own
        if path is None:
            continue
        original = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
        assert original is not None  # the packer has read it too
        pairs.append((original.astype(np.float32), pixels))
        if not files:
            break

    def enlarged() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for original, pixels in pairs:
            size = original.shape[1::-1]
            yield original, cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)

    def reduced() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for original, pixels in pairs:
            yield cv2.resize(original, pixels.shape[1::-1], interpolation=cv2.INTER_AREA), pixels

    return {"psnr_source_db": psnr_db(enlarged()), "psnr_reduced_db": psnr_db(reduced())}


def set_up(name: str, work: Work) -> Running:
    """Pack once, look at what came out, and be ready to pack again."""
    packer = PACKERS[name]
    need(packer.packages)
    home = work.cache / "packing" / name.replace(" ", "-").replace(":", "").replace(",", "")
    shutil.rmtree(home, ignore_errors=True)
    turn = iter(range(1_000_000))

    def clean() -> None:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)

    def once() -> int:
        folder = home / str(next(turn))
        folder.mkdir()
        packer.write(work, folder)
        return count

    count = len(names(work))
    clean()
    first = home / "first"
    first.mkdir()
    packer.write(work, first)
    about: dict[str, float] = {}
    if packer.read is not None and packer.payload_bytes is not None:
        size = sum(path.stat().st_size for path in first.rglob("*") if path.is_file())
        about = {"bytes_per_image": packer.payload_bytes(first) / count, "file_bytes_per_image": size / count}
        about |= judge(work, packer.read(work, first))
    return Running(once, clean, about=about)


def measure_packing(
    packers: Sequence[Packer], work: Work, environment: Environment, *, rounds: int, seconds: float, told: Told
) -> list[Row]:
    """Time the packers in turn; each row set has images/s, CPU seconds, bytes per image and the two PSNRs."""
    size = "x".join(map(str, reversed(_packed_size(work))))
    packed_names = [packer.name for packer in packers]
    series, about = take_turns(
        set_up, packed_names, work, work.cache / "logs", rounds=rounds, seconds=seconds, told=told, at_once=2
    )
    shutil.rmtree(work.cache / "packing", ignore_errors=True)
    rows: list[Row] = []
    for packer in packers:
        columns: dict[str, Any] = _columns(packer, work, size, environment) | {"note": packer.note}
        rows += series_rows(series[packer.name], **columns)
        found = about.get(packer.name)
        for metric, (unit, _) in FIGURES.items():
            if found is None:  # it could not even be set up
                rows.append(Row(metric=metric, unit=unit, value=None, failed=series[packer.name].failed, **columns))
            elif metric in found:
                rows.append(Row(metric=metric, unit=unit, value=found[metric], **columns))
    for above, below in RATIOS:
        if above in series and below in series:
            columns = _columns(PACKERS[above], work, size, environment)
            rows.append(ratio_row(series[above], series[below], beside=below, **columns))
    return rows


def _columns(packer: Packer, work: Work, size: str, environment: Environment) -> dict[str, Any]:
    return {
        "benchmark": "pack",
        "system": packer.name,
        "packed": f"{size} {packer.encoding}",
        "workers": work.workers,
        "page_cache": "warm",
        "environment": environment,
    }


def _packed_size(work: Work) -> tuple[int, int]:
    import cv2

    image = cv2.imread(str(originals(work)[0][0]), cv2.IMREAD_COLOR)
    assert image is not None  # `originals` found it, and the forms decode all of them
    return packed_size(image.shape[0], image.shape[1], work.packed_px)


def packing_text(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    own = [row for row in rows if row.benchmark == "pack"]
    parts = ["## Packing\n"]
    for packed in dict.fromkeys(row.packed.split()[0] for row in own):
        part = [row for row in own if row.packed.split()[0] == packed]
        titles = {"img_per_s": "images/s", "cpu_s_per_1000": "CPU s / 1,000"}
        titles |= {metric: title for metric, (_, title) in FIGURES.items()}
        across = [(title, lambda row, metric=metric: row.metric == metric) for metric, title in titles.items()]
        parts += [f"### Packed at {packed}\n", pivot([row for row in part if not row.beside], across)]
        lines = [[f"{row.system} / {row.beside}", cell(row)] for row in part if row.beside]
        parts.append(busy_text(part))
        if lines:
            parts += ["Ratios of images per second, taken within each round:\n", grid(["ratio", "images/s"], lines)]
    parts += [targets_text(own), notes(own), machine_text(own)]
    return "\n".join(part for part in parts if part)
