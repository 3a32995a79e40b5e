"""Train models × fractions × seeds: the study, in one command that can be started again.

    python -m train.grid --models resnet18,alexnet --fractions 0.1,0.25,0.5,1 --seeds 0,1,2 --out runs/study

Writes a run folder a cell and results.csv. Cells of one model share a process, so that start-up and compiling are paid
once. Finished cells are skipped, interrupted ones gone on with, failed ones tried again.
"""

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.common import cli
from train.config import training_options
from train.study.cells import BUDGETS, EIGHT, FRACTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shards.shardset import ShardSet
    from train.config import Config
    from train.study.cells import Cell
    from train.study.folder import StudyFolder

UNWANTED = {"all": (), "weights": ("checkpoint.pt",), "results": ("checkpoint.pt", "model.safetensors")}
KEEP = tuple(UNWANTED)

_OF_CELLS = ("model", "fraction", "seed", "subset_seed")
"""Fields of Config that differ from cell to cell."""


@click.command(context_settings={"show_default": True})
@click.option("--models", default="all", help=f"Names, separated by commas; all: {', '.join(EIGHT)}.")
@click.option(
    "--fractions",
    default=",".join(f"{f:g}" for f in FRACTIONS),
    show_default="1/64,1/32,1/16,1/8,1/4,1/2,1",
    help="Shares of the training lesions, in (0, 1].",
)
@click.option("--seeds", default="0,1,2", help="Seeds of weights, order and augmentation.")
@click.option(
    "--subset-seeds",
    show_default="vary together with --seeds",
    help="Which lesions a fraction holds; given, every seed meets every one of them.",
)
@click.option(
    "--budget",
    type=click.Choice(BUDGETS),
    default="epochs",
    help="Every fraction takes the same epochs, or the optimizer steps that --epochs take on the whole training split.",
)
@click.option(
    "--keep",
    type=click.Choice(KEEP),
    default="weights",
    help="What stays of a finished cell besides its records: weights, results alone, or all with the checkpoint.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/study"), help="Folder of the study.")
@training_options
def main(
    models: str,
    fractions: str,
    seeds: str,
    subset_seeds: str | None,
    budget: str,
    keep: str,
    out: Path,
    **options: Any,
) -> int:
    """Train every model on every fraction with every seed; one run folder a cell, and results.csv.

    Start it again to go on: finished cells are skipped. A batch that is larger than a fraction is made to fit, and the
    table says so. Ctrl-C and SIGTERM write checkpoints and end.
    """
    from shards.shardset import ShardSet
    from train.config import Config
    from train.study.cells import parse_fractions, parse_models, parse_seeds, plan
    from train.study.folder import StudyFolder

    names = parse_models(models)
    base = Config(model=names[0], **options)
    check(names, base)
    with ShardSet(base.data) as data:
        cells = plan(
            base,
            names,
            parse_fractions(fractions),
            parse_seeds(seeds, "--seeds"),
            None if subset_seeds is None else parse_seeds(subset_seeds, "--subset-seeds"),
            budget,
            lambda fraction, seed: len(data.select("train", fraction, seed)),
        )
        study = settings(base, budget, data)
    with StudyFolder(out, study) as folder:
        return run(cells, folder, base.device, keep)


def settings(base: "Config", budget: str, data: "ShardSet") -> dict[str, Any]:
    """What all cells of a study share: a study goes on only with the same."""
    from train.config import DECIDES_NOTHING

    shared = {k: v for k, v in base.to_dict().items() if k not in (*_OF_CELLS, *DECIDES_NOTHING)}
    split = data.manifest.split
    return shared | {"budget": budget, "shard_set": data.manifest.index_sha256, "split_unit": split.get("unit")}


def check(names: "Sequence[str]", base: "Config") -> None:
    """Refuse, before anything is written, what would fail every cell.

    Raises UsageError for an unknown model, an impossible resolution, too small a batch, a device that is not there or a
    precision that it cannot compute in, DataError for weights that cannot be read.
    """
    any_size_does = base.resolution >= 64 and base.resolution % 32 == 0 and base.start_resolution is None
    any_model_does = any_size_does and base.batch_size > 1 and all(name in EIGHT for name in names)
    any_device_does = base.device in ("auto", "cpu") and base.precision in ("auto", "fp32")
    if any_model_does and any_device_does and base.weights is None:
        return  # and torch, which takes seconds, stays out of this process
    from train import device as devices
    from train import models
    from train.config import check_batch
    from train.weights import read_weights

    for name in names:
        models.check_resolution(name, base.resolution, base.start_resolution)
        check_batch(base.batch_size, models.family(name))
    if not any_device_does:
        devices.precision(devices.choose(base.device), base.precision)
    if base.weights is not None:
        read_weights(Path(base.weights))


def run(cells: "list[Cell]", folder: "StudyFolder", device: str, keep: str = "weights") -> int:
    """Train the cells that are not finished; the exit code: 0 all finished, 1 some failed, 130 or 143 interrupted.

    keep: one of KEEP. A checkpoint holds the optimizer's state too, two to three times the weights.
    """
    from train.study.pool import Pool, visible_gpus
    from train.study.table import RESULTS, read_row, read_rows, write_table
    from train.study.view import Lines, LiveTable

    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: asked.append(n))
    rows = read_rows(folder.path)
    left = [cell for cell in cells if rows.get(cell.name, {}).get("status") != "finished"]
    done = len(cells) - len(left)
    gpus = visible_gpus(device)

    def recorded(entry: dict[str, Any]) -> None:
        row = read_row(folder.path, entry["cell"], entry)
        if entry["outcome"] == "finished":
            for name in UNWANTED[keep]:
                (folder.cell(entry["cell"]) / name).unlink(missing_ok=True)
        if row is not None:
            rows[entry["cell"]] = row
            write_table(folder.path, rows)

    with (LiveTable if sys.stderr.isatty() else Lines)(left, done, len(gpus)) as view:
        if done:
            view.say(f"{done} of {len(cells)} cells are finished already")
        failed = Pool(folder, view, gpus, recorded, UNWANTED[keep]).run(left, lambda: len(asked))
    write_table(folder.path, rows)
    if asked:
        click.echo(f"stopped; the same command goes on ({folder.path})", err=True)
        return 128 + asked[0]
    click.echo(f"{len(cells) - len(failed)} of {len(cells)} cells finished; {folder.path / RESULTS}")
    if failed:
        some = ", ".join(failed[:5]) + (", …" if len(failed) > 5 else "")
        click.echo(f"error: {len(failed)} cells failed ({some}); the same command tries them again", err=True)
        return 1
    return 0


if __name__ == "__main__":
    cli.run(main)
