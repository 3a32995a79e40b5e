"""Predict the classes of new images with a trained run. Images are decoded and cropped exactly as in its evaluation.

python -m train.predict --run runs/resnet18_f1_s0_u0 mole.jpg
python -m train.predict --run runs/resnet18_f1_s0_u0 photos/ --out predictions.csv --explain

Research software, not a medical device.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from shards.common import cli
from shards.common.errors import DataError, UsageError
from shards.common.files import encoded, growing_file
from shards.store import Place, folder_of, is_address
from train.config import TTA
from train.inference.options import network_options

if TYPE_CHECKING:
    from train.inference.explain import Explainer


@click.command(cls=cli.Command, context_settings={"show_default": True, "max_content_width": 120})
@click.argument("images", nargs=-1, required=True, type=Place(), metavar="IMAGE_OR_FOLDER...")
@network_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write to this file instead of the terminal: CSV, or as --json or --isic say. Until all is done, the answers "
    "so far are in FILE.part.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON, which also lists the refused files with the reasons.")
@click.option("--isic", is_flag=True, help="CSV in the form of the ISIC challenges, a column for each class.")
@click.option(
    "--prior",
    type=click.Choice(["balanced", "training"]),
    show_default="the run's own",
    help="Class frequencies that the probabilities assume. Another prior moves them all.",
)
@click.option(
    "--tta",
    type=click.Choice(tuple(TTA)),
    show_default="the run's own",
    help="Average over views of each image. flips are 4 times the work, symmetries 8 times.",
)
@click.option(
    "--explain",
    is_flag=True,
    help="Also draw which parts of each image support its most likely class (up to 50 times the work).",
)
@click.option(
    "--explain-out",
    default="explanations",
    type=click.Path(path_type=Path),
    help="Folder for the PNG files of --explain. Files of the same name are replaced.",
)
@click.option("--batch-size", default=32, type=click.IntRange(1), help="Images in a batch. More take more memory.")
def main(
    images: tuple[str | Path, ...],
    folders: tuple[Path, ...],
    out: Path | None,
    as_json: bool,
    isic: bool,
    prior: str | None,
    tta: str | None,
    explain: bool,
    explain_out: Path,
    device: str,
    memory_format: str,
    batch_size: int,
    threads: int | None,
) -> int:
    """Print or write the probability of each class for each image. Research software, not a medical device.

    Reads JPEG, PNG, TIFF, BMP, WebP, AVIF and HEIC files, and searches folders and linked folders for them. It
    may also be one shard set, in a folder or a store, whose images are then all predicted. A file or folder that cannot
    be used is named on standard error with the reason. All other files are still predicted, and the exit code is 1. It
    is also 1 if an image was predicted but could not be explained.
    """
    if as_json and isic:
        raise UsageError("--json and --isic exclude each other: choose one")
    _check_outputs(out, explain_out if explain else None)
    # Pillow warns about tags that it cannot read; what is wrong with an image is reported below
    warnings.filterwarnings("ignore", module="PIL")
    from shards.common.progress import Progress
    from shards.place import has_manifest
    from shards.shardset import ShardSet
    from train.inference import output
    from train.inference.images import find_images, images_of, read_image

    packed = next((place for place in images if is_address(place) or has_manifest(folder_of(place))), None)
    if packed is not None and images != (packed,):
        raise UsageError(f"{packed}: is a shard set; predict it alone")
    files, left_out = find_images(() if packed else map(folder_of, images))
    read = read_image
    if packed is not None:
        files, read = images_of(ShardSet(packed))
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        click.echo(f"skipped, its name does not end like that of an image: {left_out[0]}{more}", err=True)
    if not files:
        raise DataError(f"{images[0]}: holds no image (JPEG, PNG, TIFF, BMP, WebP, AVIF or HEIC)")
    if isic:
        output.check_names(files)
    form: Callable[[output.Settings, output.Answers], Iterator[str]]
    form = output.as_json if as_json else output.as_isic if isic else output.as_csv if out else output.as_lines
    refused = unexplained = 0
    with _opened(out) as file:
        with cli.importing():
            from train import device as devices
            from train.crowding import Crowding
            from train.inference.predictor import Ensemble, predict_files

            crowding = Crowding(int(devices.use_threads(threads).value))
            ensemble = Ensemble(folders, device, memory_format, prior)
        for layout in {member.memory_format for member in ensemble.members}:
            if layout.value == "contiguous":
                click.echo(f"memory format: contiguous ({layout.reason})", err=True)
        explainers: list[Explainer] = []
        if explain:
            from train.inference.explain import explainers_of

            explainers = explainers_of(ensemble)
            explain_out.mkdir(parents=True, exist_ok=True)
            if not os.access(explain_out, os.W_OK | os.X_OK):
                raise UsageError(f"--explain-out {explain_out}: cannot be written; check the permissions")
        longest = max(len(str(one)) for one in files)
        settings = output.Settings(ensemble.abouts, folders, ensemble.prior, tta, longest)
        click.echo(output.NOTICE, err=True)
        with Progress("predicting", len(files), "images", transient=True) as progress:

            def answers() -> output.Answers:
                nonlocal refused, unexplained
                for batch in predict_files(ensemble, files, tta, explainers, explain_out, batch_size, read):
                    for one in batch:
                        if isinstance(one, output.Refused):
                            refused += 1
                            progress.warn(f"{one.file} {one.reason}", "refused")
                        elif one.explanation_error:
                            unexplained += 1
                            progress.warn(f"{one.file} ({one.explanation_error})", "predicted but not explained")
                        yield one
                        progress.advance(1)
                    if ensemble.members[0].device.type == "cpu" and (text := crowding.after_step(len(batch))):
                        progress.warn(text)

            for text in form(settings, answers()):
                if out is None and sys.stdout.isatty():
                    progress.say(text.removesuffix("\n"))
                else:  # only lines for people show a path that is not UTF-8 with its own bytes
                    file.write(os.fsencode(text) if form is output.as_lines else encoded(text))
                    file.flush()
    if out is not None:
        click.echo(f"{len(files) - refused} images predicted, {refused} refused: {out}", err=True)
    return 1 if refused or unexplained else 0


@contextmanager
def _opened(out: Path | None) -> Iterator[IO[bytes]]:
    """The file for the answers, or standard output. If an error ends the command, a line names what was written."""
    if out is None:
        yield sys.stdout.buffer
        return
    with growing_file(out) as file:
        try:
            yield file
        except BaseException:
            if os.fstat(file.fileno()).st_size:
                click.echo(f"the answers so far are in {file.name}", err=True)
            raise


def _check_outputs(out: Path | None, explain_out: Path | None) -> None:
    """Raise UsageError if the results could not be written, before anything is computed."""
    from train.inference.images import SUFFIXES

    if out is not None and out.is_dir():
        raise UsageError(f"--out {out}: is a folder; give the name of a file")
    if out is not None and out.exists() and not out.is_file():
        raise UsageError(f"--out {out}: is not a regular file; leave --out out and redirect the output instead")
    if out is not None and out.suffix.lower() in SUFFIXES:
        raise UsageError(f"--out {out}: is the name of an image; give one that ends in .csv or .json")
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--out {out}: {out.parent} is not a folder; create it or choose another")
    if explain_out is not None and explain_out.exists() and not explain_out.is_dir():
        raise UsageError(f"--explain-out {explain_out}: is a file; choose a folder")


if __name__ == "__main__":
    cli.run(main)
