"""The `scale` benchmark: memory and time of the process that packs on a cluster, by the number of images.

The tasks are replaced: nothing is decoded and no shard is written, for that is done on other machines. Everything else
is what `preprocess.shard --runner ray` does in its own process: it lists the images, which are empty files, reads their
table, makes the plan, and writes the index. Copies are not looked for: the images have no detail.
"""

import csv
import multiprocessing
import shutil
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import click

from shards.common.cli import Command

_PIXELS, _JPEG_BYTES = 400 * 300, 30_000
_SAMPLE_S = 0.02
PHASES = ("reading", "planning", "packing")


@click.command("scale", cls=Command)
@click.option(
    "--images",
    multiple=True,
    type=click.IntRange(10),
    default=(10_000, 100_000, 1_000_000),
    show_default=True,
    help="A number of images. Repeatable. A million takes three minutes, and as many empty files.",
)
def command(images: tuple[int, ...]) -> None:
    """Memory and time of the process that packs on a cluster, without the work of the tasks. Prints a table."""
    click.echo(f"| images | at first | {', most | '.join(PHASES)}, most | packing, least | packing, per image |")
    click.echo("|---|---|---|---|---|---|---|")
    for number in images:
        folder = Path(tempfile.mkdtemp(prefix="scale-"))
        try:
            write_source(folder / "source", number)
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                *sizes, seconds = fresh.apply(measure, (folder / "source", folder / "set"))
        finally:
            shutil.rmtree(folder)
        cells = " | ".join(f"{size / 1e6:,.0f} MB" for size in sizes)
        click.echo(f"| {number:,} | {cells} | {1e6 * seconds / number:,.0f} µs |")


def measure(source: Path, out: Path) -> tuple[float, ...]:
    """Bytes of the process: before it reads; at most in each of PHASES; at least while it packs. And the seconds of
    packing.

    The memory is the process's own (RssAnon): pages of files are left out, which the system takes back when it needs
    them.
    """
    from preprocess.cluster import RemoteShard, Stored
    from preprocess.labelled import Columns
    from preprocess.layouts import read_folder
    from preprocess.packing import Crew, Settings, pack
    from shards.encode import Encoded
    from shards.format import ShardInfo, shard_name
    from shards.tar import BLOCK, member_bytes

    seen: dict[str, list[int]] = {phase: [] for phase in PHASES}
    phase, ended = PHASES[0], threading.Event()
    began = 0.0

    def sample() -> None:
        while not ended.wait(_SAMPLE_S):
            seen[phase].append(own_bytes())

    class Tasks:
        """Answers as tasks would: the size of a shard, and no file."""

        def write(self, place: Path, number: int, split: str, samples: list[Any], *parts: object) -> ShardInfo:
            contents = (content for _, members in samples for _, content in members)
            lengths = (content[2] if isinstance(content, tuple) else len(content) for content in contents)
            size = sum(map(member_bytes, lengths)) + 2 * BLOCK
            return ShardInfo(shard_name(number), split, len(samples), size, "0" * 64)

    def enter(name: str) -> None:
        nonlocal phase
        seen[phase].append(own_bytes())
        phase = name

    def encode(jobs: list[Any], spec: object) -> list[Encoded]:
        nonlocal began
        if phase != "packing":
            enter("packing")
            began = time.perf_counter()
        payload: Any = Stored(0, 0, _JPEG_BYTES, 0)
        sums = (_PIXELS * 150, _PIXELS * 150, _PIXELS * 150, _PIXELS * 22_600, _PIXELS * 22_600, _PIXELS * 22_600)
        return [Encoded(payload, "jpg", 300, 400, sums, 0) for _ in jobs]

    tasks: Any = Tasks()
    first = own_bytes()
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        raw, _, _ = read_folder(source, (), Columns(), None)
        enter("planning")
        pack(raw, out, Settings(workers=1), crew=Crew(encode, 64, partial(RemoteShard, tasks), 2))
        seconds = time.perf_counter() - began
        enter("packing")
    finally:
        ended.set()
        sampler.join()
    return first, *(max(seen[phase]) for phase in PHASES), min(seen["packing"]), seconds


def write_source(folder: Path, images: int) -> None:
    """A table as HAM10000's, in which every second lesion has two images, and an empty file for each image."""
    names = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    files = folder / "HAM10000_images"
    files.mkdir(parents=True)
    with (folder / "HAM10000_metadata.csv").open("w") as table:
        rows = csv.writer(table)
        rows.writerow(("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization", "dataset"))
        for number in range(images):
            image, lesion = f"ISIC_{number:09d}", number * 2 // 3
            rows.writerow(
                (f"HAM_{lesion:09d}", image, names[lesion % 7], "histo", number % 90, "female", "back", "made")
            )
            (files / f"{image}.jpg").touch()


def own_bytes() -> int:
    """This process's own memory, without pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
