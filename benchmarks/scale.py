"""The `scale` benchmark: memory and time of the process that packs on a cluster, by the number of images.

The tasks are replaced: nothing is decoded and no shard is written, for that is done on other machines. Everything else
is what `preprocess.shard --runner ray` does in its own process: the plan, the order, the checks, the index. Copies are
not looked for: the images have no detail.
"""

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


@click.command("scale", cls=Command)
@click.option(
    "--images",
    multiple=True,
    type=click.IntRange(10),
    default=(10_000, 100_000, 1_000_000),
    show_default=True,
    help="A number of images. Repeatable. A million takes a minute.",
)
def command(images: tuple[int, ...]) -> None:
    """Memory and time of the process that packs on a cluster, without the work of the tasks. Prints a table."""
    click.echo("| images | records as read | planning, most | packing, least | packing, most | packing, per image |")
    click.echo("|---|---|---|---|---|---|")
    for number in images:
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            *sizes, seconds = fresh.apply(measure, (number,))
        cells = " | ".join(f"{size / 1e6:,.0f} MB" for size in sizes)
        click.echo(f"| {number:,} | {cells} | {1e6 * seconds / number:,.0f} µs |")


def measure(images: int) -> tuple[float, ...]:
    """Bytes of the records as they are read; of the process, at most, until packing begins; at least and at most from
    then on; and the seconds of packing.

    The memory is the process's own (RssAnon): pages of files are left out, which the system takes back when it needs
    them.
    """
    from preprocess.cluster import RemoteShard, Stored
    from preprocess.packing import Crew, Settings, pack
    from preprocess.records import Source
    from shards.encode import Encoded
    from shards.format import ShardInfo, shard_name
    from shards.tar import BLOCK, member_bytes

    seen: dict[str, list[int]] = {"planning": [], "packing": []}
    phase, ended = "planning", threading.Event()
    began = 0.0

    def sample() -> None:
        seen[phase].append(own_bytes())
        while not ended.wait(_SAMPLE_S):
            seen[phase].append(own_bytes())
        seen[phase].append(own_bytes())

    class Tasks:
        """Answers as tasks would: the size of a shard, and no file."""

        def write(self, place: Path, number: int, split: str, samples: list[Any], *parts: object) -> ShardInfo:
            contents = (content for _, members in samples for _, content in members)
            lengths = (content[2] if isinstance(content, tuple) else len(content) for content in contents)
            size = sum(map(member_bytes, lengths)) + 2 * BLOCK
            return ShardInfo(shard_name(number), split, len(samples), size, "0" * 64)

    def encode(jobs: list[Any], spec: object) -> list[Encoded]:
        nonlocal phase, began
        if phase == "planning":
            phase, began = "packing", time.perf_counter()
        payload: Any = Stored(0, 0, _JPEG_BYTES, 0)
        sums = (_PIXELS * 150, _PIXELS * 150, _PIXELS * 150, _PIXELS * 22_600, _PIXELS * 22_600, _PIXELS * 22_600)
        return [Encoded(payload, "jpg", 300, 400, sums, 0) for _ in jobs]

    folder = Path(tempfile.mkdtemp(prefix="scale-"))
    tasks: Any = Tasks()
    before = own_bytes()
    source = Source(folder, "none", "none", made_records(images), about={"dataset": "made"})
    records = own_bytes() - before
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        pack(source, folder / "set", Settings(workers=1), crew=Crew(encode, 64, partial(RemoteShard, tasks), 2))
    finally:
        ended.set()
        sampler.join()
        shutil.rmtree(folder)
    seconds = time.perf_counter() - began
    return records, max(seen["planning"]), min(seen["packing"]), max(seen["packing"]), seconds


def made_records(images: int) -> list[Any]:
    """Records as a table of HAM10000's columns gives them; every second lesion has two images."""
    from preprocess.records import Record

    names = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    return [
        Record(
            f"ISIC_{number:09d}",
            f"images/ISIC_{number:09d}.jpg",
            f"HAM_{number * 2 // 3:09d}",
            names[number * 2 // 3 % 7],
            "histo",
            float(number % 90),
            "female",
            "back",
            "made",
            f"HAM_{number * 2 // 3:09d}",
        )
        for number in range(images)
    ]


def own_bytes() -> int:
    """This process's own memory, without pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
