"""A small raw folder in HAM10000's layout, made on the spot, to be spoilt by the tests of bad input."""

import csv
import io
from pathlib import Path

import numpy as np
import simplejpeg

from preprocess.labelled import Columns
from preprocess.layouts import read_folder
from shards.format import HAM10000
from tests.conftest import picture

COLUMNS = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization", "dataset")
ONE_HOT_18, ONE_HOT_19 = (
    ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"],
    ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"],
)


def jpeg(seed: int = 0, label: int = 0, height: int = 45, width: int = 60) -> bytes:
    """A JPEG as the official files are: 4:4:4, quality 100, no restart markers."""
    image = picture(np.random.default_rng(seed), label, height, width)
    return simplejpeg.encode_jpeg(image, quality=100, colorsubsampling="444")


def rows(images: int) -> list[dict[str, str]]:
    """Metadata of `images` images; every third lesion has two, and every class comes by."""
    out = []
    lesion = 0
    while len(out) < images:
        for _ in range(1 + (lesion % 3 == 0)):
            out.append(
                {
                    "lesion_id": f"HAM_{lesion:07d}",
                    "image_id": f"ISIC_{len(out):07d}",
                    "dx": HAM10000.names[lesion % 7],
                    "dx_type": "histo",
                    "age": "" if len(out) % 5 == 0 else "45.0",
                    "sex": "unknown",
                    "localization": "back",
                    "dataset": "vidir_modern",
                }
            )
        lesion += 1
    return out[:images]


def write_table(path: Path, table: list[dict[str, str]], delimiter: str = ",") -> None:
    """Write rows as CSV, with the columns of the first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    path.write_text(text.getvalue(), encoding="utf-8")


def write_raw(folder: Path, images: int = 60, size: tuple[int, int] = (45, 60)) -> Path:
    """Write a whole raw folder: two image folders and the metadata."""
    table = rows(images)
    parts = [folder / f"HAM10000_images_part_{n}" for n in (1, 2)]
    for part in parts:
        part.mkdir(parents=True)
    for number, row in enumerate(table):
        data = jpeg(number, HAM10000.names.index(row["dx"]), *size)
        (parts[number >= images // 2] / f"{row['image_id']}.jpg").write_bytes(data)
    write_table(folder / "HAM10000_metadata.csv", table)
    return folder


def read_columns(folder: Path, *tables: Path, **given):
    """What `read_folder` finds, with the columns that are given by name."""
    columns = {name: value for name, value in given.items() if name in Columns.__dataclass_fields__}
    return read_folder(folder, tables, Columns(**columns), given.get("classes"))
