"""The layouts in which public sets come, as descriptions, and what finds which one a folder has."""

from dataclasses import dataclass
from pathlib import Path

from preprocess.ham10000 import CITATION, LICENCE, METADATA, read_source
from preprocess.labelled import NONE, Columns, Folders, Images, Joined, read_labelled
from preprocess.records import Source
from preprocess.tables import PICTURES, Table
from shards.common.errors import DataError, UsageError
from shards.format import HAM10000, Classes

_ISIC_NAMES = {
    "MEL": "melanoma",
    "NV": "melanocytic nevus",
    "BCC": "basal cell carcinoma",
    "AK": "actinic keratosis",
    "BKL": "benign keratosis",
    "DF": "dermatofibroma",
    "VASC": "vascular lesion",
    "SCC": "squamous cell carcinoma",
}


@dataclass(frozen=True)
class Layout:
    """One layout. tables: patterns of file names; the first has a row for each image, the others are joined to it.

    needed: columns of the first table without which it is of another layout. classes: None: all labels of the table.
    labels: the label column is the first of these that the tables have.
    """

    name: str
    tables: tuple[str, ...]
    needed: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    image: str
    group: tuple[str, ...] = ()
    classes: Classes | None = None
    citation: str = "not named"
    licence: str = "CC BY-NC 4.0"


LAYOUTS = (
    Layout(  # of the user's columns or classes; `read_source` reads it as it is
        "HAM10000",
        ("HAM10000_metadata*",),
        ("image_id", "lesion_id", "dx"),
        (("dx",),),
        "image_id",
        ("lesion_id",),
        HAM10000,
        CITATION,
        LICENCE,
    ),
    Layout(
        "ISIC 2018 Task 3",
        ("ISIC2018_Task3_Training_GroundTruth*.csv", "ISIC2018_Task3_Training_LesionGroupings*.csv"),
        ("image", "MEL", "AKIEC"),
        (("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"),),
        "image",
        ("lesion_id",),
        HAM10000,
        "Codella, N. et al. Skin Lesion Analysis Toward Melanoma Detection 2018: A Challenge Hosted by the "
        "International Skin Imaging Collaboration (ISIC). arXiv:1902.03368 (2019); Tschandl, P., Rosendahl, C. & "
        "Kittler, H. The HAM10000 dataset. Sci. Data 5, 180161 (2018)",
    ),
    Layout(
        "ISIC 2019",
        ("ISIC_2019_Training_GroundTruth*.csv", "ISIC_2019_Training_Metadata*.csv"),
        ("image", "MEL", "SCC"),
        (("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"),),
        "image",
        ("lesion_id",),
        Classes(tuple(_ISIC_NAMES), _ISIC_NAMES, {"melanoma": ("MEL",), "malignant": ("MEL", "BCC", "SCC")}),
        "ISIC 2019: Tschandl, P. et al. Sci. Data 5, 180161 (2018); Codella, N. et al. arXiv:1710.05006; Hernández-"
        "Pérez, C. et al. BCN20000: Dermoscopic lesions in the wild. Sci. Data 11, 641 (2024)",
    ),
    Layout(
        "PAD-UFES-20",
        ("metadata.csv",),
        ("img_id", "diagnostic", "patient_id", "lesion_id"),
        (("diagnostic",),),
        "img_id",
        ("patient_id", "lesion_id"),  # a lesion_id alone is given to lesions of several patients
        Classes(
            ("ACK", "BCC", "MEL", "NEV", "SCC", "SEK"),
            {
                "ACK": "actinic keratosis",
                "BCC": "basal cell carcinoma",
                "MEL": "melanoma",
                "NEV": "nevus",
                "SCC": "squamous cell carcinoma",
                "SEK": "seborrheic keratosis",
            },
            {"melanoma": ("MEL",), "malignant": ("BCC", "MEL", "SCC")},
        ),
        "Pacheco, A. G. C. et al. PAD-UFES-20: A skin lesion dataset composed of patient data and clinical images "
        "collected from smartphones. Data in Brief 32, 106221 (2020)",
        "CC BY 4.0",
    ),
    Layout(
        "ISIC archive export",
        ("*metadata*.csv",),
        ("isic_id",),
        (("diagnosis_1",), ("benign_malignant",), ("diagnosis",)),
        "isic_id",
        citation="International Skin Imaging Collaboration (ISIC) archive, www.isic-archive.com",
        licence="as in the columns attribution and copyright_license of the table",
    ),
)


def read_folder(
    folder: Path, tables: tuple[Path, ...], given: Columns, classes: Classes | None
) -> tuple[Source, dict[str, str] | None, str]:
    """The records in a folder, the split of each image where the source names it, and a line that says what was found.

    tables: those that the user named; without any, the layout is found. given, classes: what the user named, which
    replaces what a layout says. Raises DataError or UsageError if nothing fits.
    """
    images = Images(folder)
    official = any((folder / name).is_file() for name in METADATA) and given == Columns() and classes is None
    if not tables and (official or not images.files):
        return read_source(folder), None, "HAM10000"
    if not images.files:
        raise DataError(f"{folder}: holds no image ({', '.join(PICTURES)}), here or below; name another --source")
    if tables:
        rows = _joined(tables, images)
        source, splits = read_labelled(images, rows, given, classes)
        return source, splits, f"table {rows.path.name}"
    for layout in LAYOUTS:
        if (found := _tables_of(layout, folder)) is not None and (rows := _fitting(layout, found, images)) is not None:
            label = next((one for one in layout.labels if set(one) <= set(rows.columns)), ())
            group = layout.group if set(layout.group) <= set(rows.columns) else ()
            columns = Columns(given.image or layout.image, given.label or label, given.group or group, given.split)
            own = layout.classes if not given.label else None
            source, splits = read_labelled(images, rows, columns, classes or own, layout.name)
            source.citation, source.licence = layout.citation, layout.licence
            return source, splits, layout.name
    folders = Folders(folder, images.files)
    if len(folders.classes) > 1:
        if given != Columns():
            raise UsageError(
                f"{folder}: has a folder for each class and no table of a known layout, so it has no columns to name; "
                "name the table with --table, or leave --image, --label, --group and --split-column out"
            )
        columns = Columns("image", ("label",), (NONE,), "split" if folders.all_split else None)
        source, splits = read_labelled(images, folders, columns, classes, folder.resolve().name)
        return source, splits, "a folder for each class" + (", in train, val and test" if splits else "")
    raise DataError(
        f"{folder}: holds images and no table of a known layout "
        f"({', '.join(layout.name for layout in LAYOUTS)}), nor a folder for each class; name a table with --table"
    )


def _joined(tables: tuple[Path, ...], images: Images) -> Joined:
    first, *others = (Table(path, "a table of images and labels", images.keys.keys()) for path in tables)
    return Joined(first, others)


def _tables_of(layout: Layout, folder: Path) -> tuple[Path, ...] | None:
    """The files of a layout in a folder or in those directly in it; None if one is missing."""
    found: list[Path] = []
    for pattern in layout.tables:
        here = sorted(p for place in ("", "*/") for p in folder.glob(place + pattern) if p.name[0] != ".")
        if not here:
            return None
        found.append(here[0])
    return tuple(found)


def _fitting(layout: Layout, tables: tuple[Path, ...], images: Images) -> Joined | None:
    """The tables of a layout, if the first has its columns."""
    first = Table(tables[0], "the official table", images.keys.keys())
    return _joined(tables, images) if set(layout.needed) <= set(first.columns) else None
