"""Labelled images → a packed shard set.

    python -m preprocess.shard --source data/ham10000 --out data/shards
    python -m preprocess.shard --source photos --table labels.csv --out data/mine

Finds the layout of HAM10000 and other public sets, or reads any table; splits by lesion, decodes every image strictly,
reduces it to 400 px and writes tar shards of 64 MiB with an index and a manifest. The same source and settings give the
same set byte for byte, with any number of workers.
"""

import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import click

from shards.common import cli, cluster
from shards.common.errors import DermscaleError, UsageError
from shards.common.machine import available_cores
from shards.format import QUARANTINE, WRITE_MODES, EncodeSpec
from shards.store import Place, is_address


class _TerminatedError(DermscaleError):
    exit_code = 143


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM clean up and end with one line, as Ctrl-C does."""

    def terminate(number: int, frame: object) -> None:
        raise _TerminatedError("terminated")

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Ratio(click.ParamType):
    """`70/10/20`: ratio of images in train, val and test; or `5fold:2`, a fold and how many there are."""

    name = "train/val/test"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse and check: three numbers, or fold and folds. Wrong usage ends in exit code 2."""
        if isinstance(value, tuple):
            return value
        if found := re.fullmatch(r"([0-9]{1,3})fold(?::([0-9]{1,3}))?", str(value)):
            folds, fold = int(found[1]), int(found[2] or 1)
            if not 2 <= folds <= 100 or not 1 <= fold <= folds:
                self.fail(f"'{value}': give 2 to 100 folds, and the one for test from 1, as in 5fold:2", param, ctx)
            return fold, folds
        parts = str(value).split("/")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts) or int(parts[0]) == 0:
            self.fail(
                f"'{value}': give train/val/test as three whole numbers, train above 0, as in 70/10/20; or 5fold:2",
                param,
                ctx,
            )
        return int(parts[0]), int(parts[1]), int(parts[2])


@click.command(cls=cli.Command, context_settings={"show_default": True})
@click.option(
    "--source",
    type=Place(),
    default=Path("data/ham10000"),
    help="Folder of the images: HAM10000, another set whose layout is known, a folder for each class, or any images "
    "with --table. Or a tar of images and labels, in webdataset's form. Or the address of either, such as "
    "s3://bucket/images. It is only read.",
)
@click.option(
    "--out",
    type=Place(),
    default=Path("data/shards"),
    help="Shard set to write: a folder, or an address such as s3://bucket/set. It must be new, except with "
    "--overwrite.",
)
@click.option(
    "--table",
    "tables",
    multiple=True,
    type=Place(),
    help="Labels of the images: a text file with a row for each image, with any usual separator. Given again, a file "
    "is joined by the first column that it shares.",
)
@click.option(
    "--image", metavar="COLUMN", show_default="found", help="Names the images, with or without folder and ending."
)
@click.option(
    "--label",
    metavar="COLUMN,...",
    show_default="found",
    help="The class, or a column for each class with 1 in one of them. `a,b,else=c`: rows without a 1 are of class c. "
    "none: images without labels, for prediction alone.",
)
@click.option(
    "--group",
    metavar="COLUMN,...",
    show_default="patient or lesion",
    help="What no split divides. Several columns name it together. none: each image is split on its own.",
)
@click.option(
    "--where",
    metavar="CONDITION",
    help="Use only the rows of the table that meet a condition, such as \"image_type == 'dermoscopic'\".",
)
@click.option("--split-column", metavar="COLUMN", help="Says train, val or test of each image, instead of --split.")
@click.option(
    "--classes",
    "classes_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Table with the columns name, long_name and sets (such as malignant): the classes in this order. A label that "
    "is not in it is a bad image.",
)
@click.option(
    "--map",
    "map_name",
    metavar="NAME|FILE",
    help="Make labels the classes of another set: isic2019-ham10000, pad-ufes-20-malignant …, or a table with the "
    "columns from and to. Labels without a counterpart are left out.",
)
@click.option(
    "--test-source",
    type=Place(),
    help="Official ISIC 2018 Task 3 test images and labels, used as the test split. --source then has "
    "train and val alone.",
)
@click.option(
    "--write-mode",
    type=click.Choice(WRITE_MODES),
    default="jpg",
    help="How images are stored, in FFCV's terms. raw loads faster and takes about ten times the disk of jpg.",
)
@click.option(
    "--max-resolution",
    type=int,
    default=400,
    help="Longer side in px; larger images are reduced to this, which loses detail and saves disk and time.",
)
@click.option(
    "--jpeg-quality", type=int, default=90, help="1 to 100. A higher one keeps more detail and takes more disk."
)
@click.option(
    "--subsampling",
    type=click.Choice(("420", "422", "444")),
    default="420",
    help="Chroma of the JPEGs. 444 keeps all colour detail, takes more disk and loads slower.",
)
@click.option(
    "--restart/--no-restart", default=True, help="Add a restart table, for decoding regions (about 2 % more bytes)."
)
@click.option(
    "--compress-probability",
    type=float,
    default=0.5,
    help="With --write-mode proportion: share of JPEGs; the rest is raw.",
)
@click.option(
    "--smart-threshold",
    type=int,
    default=500_000,
    help="With --write-mode smart: images of more raw bytes than this become JPEGs.",
)
@click.option("--shard-mb", type=int, default=64, help="Largest size of a tar, MiB. A smaller one makes more files.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    show_default="the cores",
    help="Threads; with --runner ray, tasks that are waited for. Their number changes the time, and no byte.",
)
@click.option(
    "--split",
    type=Ratio(),
    default="70/10/20",
    help="Ratio of images in train, val and test, in any unit. More for test makes intervals narrower, and "
    "leaves less to train on. Or 5fold:2: of five equal parts the second is for test, and the rest for train and val, "
    "7 to 1.",
)
@click.option(
    "--split-unit",
    type=click.Choice(("lesion", "image")),
    default="lesion",
    help="What is kept in one split. image lets lesions leak into the test split: for comparison only.",
)
@click.option(
    "--split-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Published splits instead of --split: a table with the columns image_id and split. It must list all images.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Another seed gives another split.")
@click.option(
    "--on-bad",
    type=click.Choice(("stop", "skip")),
    default="stop",
    help="What to do at an image that cannot be packed. skip leaves it out and lists it in quarantine.csv.",
)
@click.option(
    "--join-duplicates",
    is_flag=True,
    help="Make one group of images that are copies of each other. Decodes all images once more. Without it, copies in "
    "different groups are listed in duplicates.csv.",
)
@click.option("--overwrite", is_flag=True, help="Replace the set in --out when the new one is complete.")
@cluster.runner_options
def main(
    source: str | Path,
    out: str | Path,
    tables: tuple[str | Path, ...],
    image: str | None,
    label: str | None,
    group: str | None,
    where: str | None,
    split_column: str | None,
    classes_file: Path | None,
    map_name: str | None,
    test_source: str | Path | None,
    shard_mb: int,
    workers: int | None,
    split: tuple[int, ...],
    split_unit: str,
    split_file: Path | None,
    seed: int,
    on_bad: str,
    join_duplicates: bool,
    overwrite: bool,
    runner: str,
    address: str | None,
    **encode: Any,
) -> None:
    """Pack a folder of labelled images into shards."""
    spec = EncodeSpec(**encode)
    if shard_mb < 1:
        raise UsageError(f"--shard-mb {shard_mb}: at least 1")
    given = click.get_current_context().get_parameter_source
    by_ratio = click.core.ParameterSource.COMMANDLINE in (given("split"), given("split_unit"))
    named = [name for name, value in (("--split-file", split_file), ("--split-column", split_column)) if value]
    if named and by_ratio:
        raise UsageError(f"{named[0]} names the split of each image: leave --split and --split-unit out")
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} exclude each other: choose one")

    from preprocess.isic2018 import read_test_source
    from preprocess.labelled import NONE, Columns, read_classes_file
    from preprocess.layouts import read_folder
    from preprocess.mapping import map_labels
    from preprocess.packing import Settings, pack
    from preprocess.places import near
    from preprocess.records import read_splits, sha256_of
    from preprocess.rows import Texts
    from shards.labelmap import read_map
    from shards.place import refuse_occupied

    if test_source and len(split) == 2:
        raise UsageError("--split 5fold and --test-source both name the test split: leave one of them out")
    idle = [("--test-source", test_source), ("--classes", classes_file), ("--split", by_ratio), ("--map", map_name)]
    if label == NONE and (idle := [name for name, given in idle if given]):
        raise UsageError(f"--label {NONE}: a set without labels has no classes and is not split; leave {idle[0]} out")
    if not is_address(out):
        refuse_occupied(Path(out), overwrite)
    assigned = None if split_file is None else read_splits(split_file)
    assigned_from = {} if split_file is None else {"file": split_file.name, "file_sha256": sha256_of(split_file)}
    columns = Columns(image, _listed("--label", label), _listed("--group", group), split_column, where)
    named_classes = None if classes_file is None else read_classes_file(classes_file)
    labels = None if map_name is None else read_map(map_name)
    with _terminable(), ExitStack() as stack:
        copy, *further = (stack.enter_context(near(place)) for place in (source, *tables))
        own_classes = named_classes if labels is None else None
        raw, splits, layout = read_folder(copy.path, tuple(one.path for one in further), columns, own_classes)
        raw.folder = copy.named(raw.folder)
        for one in further:
            raw.tables = {name: one.named(path) for name, path in raw.tables.items()}
    if labels is not None:
        map_labels(raw, labels, named_classes)
    if splits is not None and assigned is None and not by_ratio:
        assigned, assigned_from = splits, {"column": raw.about["columns"]["split"]}
    test = None
    if test_source:
        with _terminable(), near(test_source) as copy:
            test = read_test_source(copy.path)
            test.folder = copy.named(test.folder)
    if assigned is not None and (labels is not None or where is not None):  # these leave images out: no fault of a list
        sources = [one for one in (raw, test) if one]
        names = chain.from_iterable(one.records.column("image_id") for one in sources)
        there = Texts(chain(names, (rejected.image_id for one in sources for rejected in one.rejected)))
        assigned = {image_id: part for image_id, part in assigned.items() if image_id in there}
    for warning in raw.warnings + (test.warnings if test else []):
        _warn(warning)
    if split_unit == "image":
        _warn(
            "SPLITTING BY IMAGE: views of one lesion are in training and test, so results look better than they are; "
            "use it only to measure that effect"
        )
    settings = Settings(
        encode=spec,
        ratio=(split[0], split[1], split[2]) if len(split) == 3 else Settings.ratio,
        fold=(split[0], split[1]) if len(split) == 2 else None,
        seed=seed,
        unit=split_unit,
        assigned=assigned,
        assigned_from=assigned_from,
        shard_bytes=shard_mb << 20,
        workers=workers or available_cores(),
        skip_bad=on_bad == "skip",
        overwrite=overwrite,
        join_duplicates=join_duplicates,
    )
    with _terminable(), cluster.runner(runner, address):
        crew = None
        if runner == "ray":
            from preprocess.cluster import cores
            from preprocess.cluster import crew as tasks

            crew, settings = tasks(), replace(settings, workers=workers or 2 * cores())
        with _terminable():  # Ray has set its own handler
            packed = pack(raw, out, settings, test, crew)
    for warning in packed.warnings:
        _warn(warning)
    classes = f"{len(raw.classes)} classes" if raw.classes else "no labels, for prediction alone"
    click.echo(f"layout: {layout}; {classes}, groups by {' and '.join(raw.group) or 'image'}")
    click.echo(packed.manifest.table())
    if test is not None and test.about["known_missing"]:
        click.echo(f"{', '.join(test.about['known_missing'])}: left out, as the official test archive and scoring do")
    if packed.rejected:
        click.echo(f"{len(packed.rejected)} left out, listed with reasons in {out}/{QUARANTINE}")
    seconds, shards = packed.seconds, packed.manifest.shards
    images, size = sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards)
    rate = f"{seconds:.1f} s, {images / seconds:.0f} images/s"
    click.echo(f"{images:,} images packed in {out}, {size:,} bytes, {rate}")


def _listed(option: str, names: str | None) -> tuple[str, ...]:
    """The names in a list with commas; none without a list. Raises UsageError for a list without names."""
    found = tuple(name.strip() for name in (names or "").split(",") if name.strip())
    if names is not None and not found:
        raise UsageError(f"{option} '{names}': names no column; leave it out, and it is found")
    return found


def _warn(text: str) -> None:
    click.echo(f"warning: {text}", err=True)


if __name__ == "__main__":
    cli.run(main)
