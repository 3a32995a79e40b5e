"""Train models × fractions × seeds: a whole study in one command.

    python -m train.grid --models resnet18,alexnet --fractions 0.1,0.25,0.5,1 --seeds 0,1,2 --out runs/study

Writes one run folder per cell, and results.csv. The cells of a model share a process, so that start-up and compilation
take place once. Run the same command again to continue: it skips finished cells, resumes interrupted cells, and
trains failed cells again.
"""

from pathlib import Path
from typing import Any

import click

from shards.common import cli
from shards.common.cluster import runner_options
from train.config import training_options
from train.study.cells import BUDGETS, EIGHT, FRACTIONS
from train.study.folder import UNWANTED


@click.command(cls=cli.Command, context_settings={"show_default": True})
@click.option(
    "--models",
    default="all",
    help=f"Names, separated by commas. Each adds a cell for every fraction and seed. all: {', '.join(EIGHT)}.",
)
@click.option(
    "--fractions",
    default=",".join(f"{f:g}" for f in FRACTIONS),
    show_default="1/64,1/32,1/16,1/8,1/4,1/2,1",
    help="Shares of the training lesions, in (0, 1]. An epoch of each takes so much of the time.",
)
@click.option(
    "--seeds",
    default="0,1,2",
    help="Seeds of weights, order and augmentation. More make the intervals narrower, and the study longer.",
)
@click.option(
    "--subset-seeds",
    show_default="the seed of the run",
    help="Seeds that choose the lesions of a fraction. Each is combined with each of --seeds: so many more runs.",
)
@click.option(
    "--budget",
    type=click.Choice(BUDGETS),
    default="epochs",
    help="epochs: each fraction trains for --epochs. steps: each fraction trains for as many optimizer steps as the "
    "whole training split, which takes longer.",
)
@click.option(
    "--keep",
    type=click.Choice(tuple(UNWANTED)),
    default="weights",
    help="Files to keep of a finished cell: its results, also its weights, or all with the checkpoint, which is two to "
    "three times as large as the weights.",
)
@click.option(
    "--per-device",
    "--per-gpu",
    default="auto",
    help="Cells to train at the same time on each GPU, or on the CPU. They share its memory, and the cores unless "
    "--threads is given. auto: a short trial decides; on a CPU it is one for each core if they fit into the memory. "
    "Results on a CPU are those of one cell at a time with the same --threads.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/study"),
    help="Folder of the study. One that holds a study is continued.",
)
@runner_options
@training_options
def main(
    models: str,
    fractions: str,
    seeds: str,
    subset_seeds: str | None,
    budget: str,
    keep: str,
    per_device: str,
    out: Path,
    runner: str,
    address: str | None,
    **options: Any,
) -> int:
    """Train every model on every fraction with every seed. Writes one run folder per cell, and results.csv.

    Run the same command again to continue: finished cells are skipped. If a fraction has fewer images than a batch, the
    batch is made smaller, and the table says so. Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 write checkpoints and stop; a
    second signal does not wait for them.
    """
    from shards.common import cluster
    from shards.shardset import ShardSet
    from train.config import Config
    from train.study.cells import grid_cells, parse_fractions, parse_models, parse_seeds
    from train.study.folder import StudyFolder
    from train.study.grid import check_settings, study_settings, train_cells
    from train.study.sharing import parse_per_device

    at_once = parse_per_device(per_device)
    names = parse_models(models)
    base = Config(model=names[0], **options)
    check_settings(names, base)
    with ShardSet(base.data) as data:
        data.require_labels()
        cells = grid_cells(
            base,
            names,
            parse_fractions(fractions),
            parse_seeds(seeds, "--seeds"),
            None if subset_seeds is None else parse_seeds(subset_seeds, "--subset-seeds"),
            budget,
            lambda fraction, seed: len(data.select("train", fraction, seed, base.where)),
        )
        settings = study_settings(base, budget, data)
    with StudyFolder(out, settings) as folder, cluster.runner(runner, address):
        return train_cells(cells, folder, base.device, keep, at_once, runner)


if __name__ == "__main__":
    cli.run(main)
