"""Folders of procedural lesions in the layouts of public sets, for the demo, tests, and studies with a known truth.

    python -m preprocess.synthetic --out data/synthetic --images 700 --seed 0 --difficulty 0.5

Writes 600×450 JPEGs (quality 100, 4:4:4 and about 260 KB each, like the official files; PNGs where a layout has them)
with HAM10000's class imbalance and several views of about a quarter of the lesions. Every pixel is computed; no patient
is shown. The same settings and library versions give the same files byte for byte, with any number of workers.
"""

import csv
import io
import math
import os
import shutil
import time
import tomllib
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.common import cli
from shards.common.errors import DataError, UsageError
from shards.common.files import full_disk_names
from shards.common.machine import available_cores, single_threaded_opencv
from shards.format import HAM10000

if TYPE_CHECKING:
    import numpy as np

SETS = Path(__file__).parent / "sets"
LAYOUTS = (
    "ham10000", "isic2018", "isic2019", "isic2020", "isic2024", "milk10k", "bcn20000", "pad-ufes-20", "isic-archive",
    "folders",
)  # fmt: skip

_IMAGES = {"akiec": 327, "bcc": 514, "bkl": 1099, "df": 115, "mel": 1113, "nv": 6705, "vasc": 142}
_LESIONS = {"akiec": 228, "bcc": 327, "bkl": 727, "df": 73, "mel": 614, "nv": 5403, "vasc": 98}
"""Images and lesions per class in HAM10000 (counted in its metadata)."""

_PATIENTS = {  # age: mean and standard deviation; share of men; also counted in HAM10000's metadata
    "akiec": (66.5, 11.5, 0.68),
    "bcc": (66.8, 13.7, 0.62),
    "bkl": (64.3, 14.1, 0.57),
    "df": (53.0, 13.6, 0.55),
    "mel": (60.7, 15.2, 0.62),
    "nv": (46.5, 15.2, 0.51),
    "vasc": (51.4, 21.6, 0.49),
}
_DX_TYPES = {
    "akiec": {"histo": 1.0},
    "bcc": {"histo": 1.0},
    "bkl": {"histo": 0.7, "consensus": 0.24, "confocal": 0.06},
    "df": {"consensus": 0.52, "histo": 0.48},
    "mel": {"histo": 1.0},
    "nv": {"follow_up": 0.55, "histo": 0.37, "consensus": 0.08},
    "vasc": {"consensus": 0.53, "histo": 0.47},
}
_SITES = {"back": 0.23, "lower extremity": 0.21, "trunk": 0.15, "upper extremity": 0.12, "abdomen": 0.11, "face": 0.08,
          "chest": 0.04, "foot": 0.03, "unknown": 0.03}  # fmt: skip
_EXTRA_VIEWS = 1.3  # images after the first, of lesions that have several: 2,545 of 1,956 lesions in HAM10000
_LEAST_LESIONS = 3
LEAST_IMAGES = 40


@dataclass(frozen=True, slots=True)
class UnpaintedLesion:
    """One lesion before it is painted: its metadata rows, one per view, and its number, which seeds its appearance."""

    number: int
    dx: str
    rows: tuple[dict[str, str], ...]


def class_counts(images: int) -> dict[str, tuple[int, int]]:
    """Lesions and images per class, `images` in total: HAM10000's shares, but no class too small to be split.

    Every class has at least 10 lesions (fewer below 140 images, never under 3), so that a 70/10/20 split by lesion has
    every class in every split; nv has fewer images instead. Raises UsageError below 40 images.
    """
    if images < LEAST_IMAGES:
        raise UsageError(
            f"--images {images}: at least {LEAST_IMAGES} are needed, so that every split has all its classes"
        )
    least = max(_LEAST_LESIONS, min(10, images // 14))
    total = sum(_IMAGES.values())
    counts: dict[str, tuple[int, int]] = {}
    for dx in HAM10000.names:
        views = _IMAGES[dx] / _LESIONS[dx]
        count = max(round(images * _IMAGES[dx] / total), round(least * views))
        counts[dx] = (min(count, max(least, round(count / views))), count)
    others = sum(count for dx, (_, count) in counts.items() if dx != "nv")
    nv = images - others
    counts["nv"] = (min(nv, max(least, round(nv * _LESIONS["nv"] / _IMAGES["nv"]))), nv)
    return counts


def unpainted_lesions(images: int, seed: int) -> list[UnpaintedLesion]:
    """Every lesion of the folder with its views and metadata, a pure function of its arguments."""
    import numpy as np

    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    views: list[tuple[str, int]] = []
    for dx, (lesions, count) in class_counts(images).items():
        each = np.ones(lesions, np.int64)
        extra = count - lesions  # never more than `lesions`: no class averages two views
        several = rng.permutation(lesions)[: math.ceil(extra / _EXTRA_VIEWS)]
        each[several] += 1
        each[rng.permutation(several)[: extra - len(several)]] += 1
        views += [(dx, v) for v in each.tolist()]
    order = rng.permutation(len(views))
    names = iter((rng.permutation(images) + 1).tolist())
    lesions = []
    for number, place in enumerate(order.tolist(), start=1):
        dx, count = views[place]
        about = _patient(rng, dx) | {"lesion_id": f"SYN_L{number:07d}", "dx": dx, "dataset": "synthetic"}
        rows = tuple(about | {"image_id": f"SYN_{next(names):07d}"} for _ in range(count))
        lesions.append(UnpaintedLesion(number, dx, rows))
    return lesions


def _patient(rng: "np.random.Generator", dx: str) -> dict[str, str]:
    """The metadata of a lesion's patient: age in steps of 5, sometimes empty or unknown, as in HAM10000."""
    mean, deviation, men = _PATIENTS[dx]
    age = min(85.0, max(0.0, round(rng.normal(mean, deviation) / 5) * 5.0))
    sex = "male" if rng.random() < men else "female"
    site = str(rng.choice(list(_SITES), p=list(_SITES.values())))
    dx_type = str(rng.choice(list(_DX_TYPES[dx]), p=list(_DX_TYPES[dx].values())))
    known_age, known_sex = rng.random(2) > 0.006
    return {
        "dx_type": dx_type,
        "age": str(age) if known_age else "",
        "sex": sex if known_sex else "unknown",
        "localization": site,
    }


def described(lesions: list[UnpaintedLesion], layout: dict[str, Any]) -> list[dict[str, str]]:
    """The values that a layout's tables and paths are made from, for each image in the order of their names.

    layout: the part `synthetic` of a file in `sets/`. Lesions of a diagnosis take its `labels` in turns; each has its
    column with 1.0 or 0.0. Two lesions have one patient.
    """
    labels = layout.get("labels", {dx: [dx] for dx in HAM10000.names})
    flags = {label: "0.0" for of_dx in labels.values() for label in of_dx}
    seen: Counter[str] = Counter()
    rows = []
    for lesion in lesions:
        label = labels[lesion.dx][seen[lesion.dx] % len(labels[lesion.dx])]
        seen[lesion.dx] += 1
        about = {"number": str(lesion.number), "patient_id": f"SYN_P{lesion.number // 2:07d}", "label": label}
        about |= {"target": str(int(label.lower() == "malignant"))} | flags | {label: "1.0"}
        for row, kind in zip(lesion.rows, cycle(("dermoscopic", "clinical: close-up"))):
            rows.append(about | row | {"image_type": kind})
    rows.sort(key=lambda row: row["image_id"])
    half = (len(rows) + 1) // 2
    return [row | {"part": str(1 + (number >= half))} for number, row in enumerate(rows)]


def _table(rows: list[dict[str, str]], table: dict[str, Any]) -> bytes:
    """A table of a layout as CSV. each: the value that every row has another of; image_id if it is not named."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table["columns"]), lineterminator="\n")
    writer.writeheader()
    of_each = {row[table.get("each", "image_id")]: row for row in rows}
    for row in of_each.values():
        writer.writerow({name: template.format_map(row) for name, template in table["columns"].items()})
    return text.getvalue().encode()


def _write_lesion(lesion: UnpaintedLesion, files: dict[str, Path], seed: int, difficulty: float) -> int:
    """Paint one lesion and write its views; returns their number. Randomness depends on seed and lesion number."""
    import cv2
    import numpy as np
    import simplejpeg

    from preprocess.phantom.appearance import draw_lesion
    from preprocess.phantom.camera import photograph
    from preprocess.phantom.paint import paint_lesion

    def stream(*key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, lesion.number, *key])))

    drawn = draw_lesion(stream(0), lesion.dx, difficulty)
    canvas = paint_lesion(drawn)
    for view, row in enumerate(lesion.rows, start=1):
        picture = photograph(drawn, canvas, stream(view))
        file = files[row["image_id"]]
        if file.suffix == ".jpg":
            content = simplejpeg.encode_jpeg(picture, quality=100, colorsubsampling="444")
        else:
            content = cv2.imencode(file.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
        file.write_bytes(content)
    return len(lesion.rows)


def write_folder(
    out: Path, images: int, seed: int, difficulty: float, workers: int, layout: str = "ham10000"
) -> list[UnpaintedLesion]:
    """Write `.NAME.partial`, renamed to `out` when complete; returns the lesions. layout: one of LAYOUTS.

    Raises DataError if `out` already holds something, is inside a file or the top of a file system, or if another
    process is writing it; UsageError for too few images.
    """
    from shards.common.files import exclusive, sync_folder, write_durably
    from shards.common.progress import Progress
    from shards.common.readahead import read_ahead
    from shards.place import beside, real_place, refuse_inside_file, refuse_mount

    refuse_mount(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is not empty; choose another --out, or remove it first")
    refuse_inside_file(out)
    lesions = unpainted_lesions(images, seed)
    about = tomllib.loads((SETS / f"{layout}.toml").read_text(encoding="utf-8"))["synthetic"]
    rows = described(lesions, about)
    place = real_place(out)
    partial = beside(place, "partial")
    with exclusive(partial, f"writing {out}"):
        for left in partial.iterdir():  # by a killed run
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        files = {row["image_id"]: partial / about["images"].format_map(row) for row in rows}
        for folder in {file.parent for file in (*files.values(), *(partial / name for name in about["tables"]))}:
            folder.mkdir(parents=True, exist_ok=True)

        def submit(lesion: UnpaintedLesion) -> list[Future[int]]:
            return [pool.submit(_write_lesion, lesion, files, seed, difficulty)]

        try:
            with (
                single_threaded_opencv(),
                Progress("painting lesions", images, "images") as bar,
                ThreadPoolExecutor(workers, thread_name_prefix="paint") as pool,
                closing(read_ahead(submit, lesions, 4 * workers)) as painted,
            ):
                for _, (views,) in painted:
                    bar.advance(views)
            for name, table in about["tables"].items():
                write_durably(partial / name, _table(rows, table))
            os.sync()  # one flush for thousands of files
            partial.rename(place)  # replaces only an empty folder
            sync_folder(place.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return lesions


@click.command(cls=cli.Command, context_settings={"show_default": True})
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="New or empty folder to write. An image takes about 260 kB.",
)
@click.option(
    "--images",
    type=int,
    default=700,
    help=f"Number of images, at least {LEAST_IMAGES}. Time and disk grow in proportion.",
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="ham10000",
    help="The public set whose tables and folders are imitated. Diagnoses become its classes.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Another seed gives other lesions.")
@click.option(
    "--difficulty",
    type=click.FloatRange(0, 1),
    default=0.5,
    help="0: classes look clearly different; 1: most lesions resemble another class, and light varies most.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    show_default="the cores",
    help="Threads. Their number changes the time, and no byte.",
)
def main(out: Path, images: int, layout: str, seed: int, difficulty: float, workers: int | None) -> None:
    """Write a folder of computed skin lesions in HAM10000's or another layout, to try things out without real data."""
    started = time.monotonic()
    with full_disk_names(out):
        lesions = write_folder(out, images, seed, difficulty, workers or available_cores(), layout)
    seconds = time.monotonic() - started
    click.echo(f"{'class':8}{'lesions':>9}{'images':>9}")
    of_class = Counter(lesion.dx for lesion in lesions)
    pictures = Counter(row["dx"] for lesion in lesions for row in lesion.rows)
    for dx in HAM10000.names:
        click.echo(f"{dx:8}{of_class[dx]:9,}{pictures[dx]:9,}")
    click.echo(f"{'all':8}{len(lesions):9,}{images:9,}")
    click.echo(f"{images:,} synthetic images in {out}, {seconds:.1f} s, {images / seconds:.0f} images/s")
    click.echo(f"Pack them: {cli.typed('preprocess.shard')} --source {out}")


if __name__ == "__main__":
    cli.run(main)
