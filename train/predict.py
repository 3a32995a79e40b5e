"""Judge unseen images with a trained run, decoded and cut exactly as its evaluation did.

python -m train.predict --run runs/resnet18_f1_s0_u0 mole.jpg
python -m train.predict --run runs/resnet18_f1_s0_u0 photos/ --out predictions.csv --explain

Research software, not a medical device.
"""

import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shards.common import cli
from shards.common.errors import DataError, UsageError
from shards.common.readahead import read_ahead

if TYPE_CHECKING:
    from train.inference.explain import Explainer
    from train.inference.output import Answer, Refused
    from train.inference.predictor import Predictor, Prepared

_SPARSE_S = 15.0
"""Seconds between lines of progress where standard error is no terminal."""


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE_OR_FOLDER...")
@click.option("--run", "folder", required=True, type=click.Path(path_type=Path), help="Folder of a finished run.")
@click.option("--out", type=click.Path(path_type=Path), help="Write a CSV (or what --json, --isic say) to this file.")
@click.option("--json", "as_json", is_flag=True, help="JSON, with what was refused and why.")
@click.option("--isic", is_flag=True, help="The submission CSV of ISIC 2018 Task 3.")
@click.option("--prior", show_default="the run's own", help="Class frequencies to assume: balanced or training.")
@click.option("--flips", is_flag=True, help="Average over the image and its three mirrorings (4 times the work).")
@click.option("--explain", is_flag=True, help="Also draw which places of each image speak for its likeliest class.")
@click.option(
    "--explain-out", default="explanations", type=click.Path(path_type=Path), help="Folder for --explain's PNG files."
)
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--batch-size", default=32, type=click.IntRange(1), help="Images judged at a time.")
def main(
    images: tuple[Path, ...],
    folder: Path,
    out: Path | None,
    as_json: bool,
    isic: bool,
    prior: str | None,
    flips: bool,
    explain: bool,
    explain_out: Path,
    device: str,
    batch_size: int,
) -> int:
    """Print or write the probability of each class for each image. Research software, not a medical device.

    JPEG, PNG, TIFF, BMP and WebP are read; folders are searched for them. A file that cannot be judged is named on
    standard error with the reason, the rest goes on, and the exit code is 1.
    """
    if as_json and isic:
        raise UsageError("--json and --isic exclude each other: choose one form of output")
    if prior not in (None, "balanced", "training"):
        raise UsageError(f"--prior '{prior}' is unknown: use balanced or training")
    _check_outputs(out, explain_out if explain else None)
    # Pillow's, about tags that it cannot read; what is wrong with an image is said by `refused`
    warnings.filterwarnings("ignore", module="PIL")
    from train.inference import output as output
    from train.inference.images import find_images
    from train.inference.notice import NOTICE

    files, left_out = find_images(images)
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        click.echo(f"left out, no image by its name: {left_out[0]}{more}", err=True)
    if not files:
        raise DataError(f"{images[0]}: holds no image (JPEG, PNG, TIFF, BMP or WebP)")
    if isic:
        output.check_names(files)
    with cli.importing():
        from train.inference.predictor import Predictor

        predictor = Predictor(folder, device)
    explainer = None
    if explain:
        from train.inference.explain import Explainer

        explainer = Explainer(predictor)
        explain_out.mkdir(parents=True, exist_ok=True)
    click.echo(NOTICE, err=True)
    found: list[Answer | Refused] = []
    with _Progress(len(files)) as progress:
        for batch in judge(predictor, files, prior, flips, explainer, explain_out, batch_size):
            found += batch
            progress.at(len(found))
    answers = [one for one in found if isinstance(one, output.Answer)]
    refused = [one for one in found if isinstance(one, output.Refused)]
    for one in refused:
        click.echo(f"refused: {one.file} {one.reason}", err=True)
    whole = output.Predictions(predictor.about, folder, prior or predictor.about.prior, flips, answers, refused)
    form = output.as_json if as_json else output.as_isic if isic else output.as_csv if out else output.as_lines
    text = form(whole)
    if out is None:
        click.echo(text, nl=False)
    else:
        from shards.common.files import write_durably

        write_durably(out, text.encode())
        click.echo(f"{len(answers)} images judged, {len(refused)} refused: {out}", err=True)
    return 1 if refused else 0


def _check_outputs(out: Path | None, explain_out: Path | None) -> None:
    """Raise UsageError where the answers could not be written, while none is lost by it."""
    if out is not None and out.is_dir():
        raise UsageError(f"--out {out}: is a folder; give the name of a file")
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--out {out}: {out.parent} is no folder; make it, or choose another")
    if explain_out is not None and explain_out.exists() and not explain_out.is_dir():
        raise UsageError(f"--explain-out {explain_out}: is a file; choose a folder")


def judge(
    predictor: "Predictor",
    files: Iterable[Path],
    prior: str | None = None,
    flips: bool = False,
    explainer: "Explainer | None" = None,
    explain_out: Path = Path(),
    batch_size: int = 32,
) -> "Iterator[list[Answer | Refused]]":
    """The files in order, a batch at a time, each judged or refused. Threads read ahead, by two batches at most."""
    from shards.common.machine import available_cores
    from train.inference.output import Refused

    named: set[Path] = set()
    with ThreadPoolExecutor(available_cores(), thread_name_prefix="predict") as pool:

        def submit(file: Path) -> "list[Future[Prepared | str]]":
            return [pool.submit(_prepare, predictor, file)]

        with closing(read_ahead(submit, files, 3 * batch_size)) as prepared:
            while ready := [(file, item) for file, (item,) in islice(prepared, batch_size)]:
                good = [(file, item) for file, item in ready if not isinstance(item, str)]
                answers = iter(_answers(predictor, good, prior, flips, explainer, explain_out, named))
                yield [Refused(file, item) if isinstance(item, str) else next(answers) for file, item in ready]


def _prepare(predictor: "Predictor", file: Path) -> "Prepared | str":
    """One file ready for the network, or why not; in a reader thread."""
    from train.inference.images import BadImageError, read_image

    try:
        return predictor.prepare(read_image(file), file.stem)
    except BadImageError as error:
        return str(error)
    except MemoryError:
        return "does not fit into the memory"


def _answers(
    predictor: "Predictor",
    good: "list[tuple[Path, Prepared]]",
    prior: str | None,
    flips: bool,
    explainer: "Explainer | None",
    explain_out: Path,
    named: set[Path],
) -> "list[Answer]":
    """Judge one batch, and draw its explanations. named: the explanations that have been written."""
    import numpy as np

    from train.inference.output import Answer

    if not good:
        return []
    squares = np.stack([item.square for _, item in good])
    shares = predictor.probabilities(predictor.logits(squares, flips), prior)
    answers = [Answer(file, row) for (file, _), row in zip(good, shares, strict=True)]
    if explainer is None:
        return answers
    from shards.common.files import write_durably
    from train.inference.explain import beside, png

    drawn = []
    maps = explainer.maps(squares, shares.argmax(axis=1))
    for answer, (_, item), evidence in zip(answers, good, maps, strict=True):
        number, path = 1, explain_out / f"{answer.name}.png"
        while path in named:  # two files of one name in different folders
            number += 1
            path = explain_out / f"{answer.name}-{number}.png"
        named.add(path)
        write_durably(path, png(beside(item, evidence)))
        drawn.append(replace(answer, explanation=path))
    return drawn


class _Progress:
    """A bar on a terminal, a line now and then elsewhere; nothing for what is done at once."""

    def __init__(self, total: int) -> None:
        from train.console import Terminal

        self._total, self._spoken = total, time.monotonic()
        self._terminal = Terminal()

    def __enter__(self) -> "_Progress":
        self._terminal.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._terminal.__exit__(None, None, None)

    def at(self, done: int) -> None:
        """Show how many files are done."""
        self._terminal.at("predicting", done, self._total)
        if not sys.stderr.isatty() and time.monotonic() - self._spoken >= _SPARSE_S:
            self._spoken = time.monotonic()
            click.echo(f"predicting: {done} of {self._total} images", err=True)


if __name__ == "__main__":
    cli.run(main)
