"""Measure how much a split by image overestimates accuracy: a paired experiment on one shared test set.

    python -m preprocess.shard --source data/ham10000 --out data/shards-by-image --split-unit image
    python -m train.leakage --data data/shards-by-image --model resnet18 --seeds 0,1,2 --out runs/study/leakage

Takes two training sets from a set that was split by image, with equally many images of each class. `apart` has no
images of test lesions; `leaky` has those that the split put into training. Both are tested on the same images, and the
paired difference is the effect of the leak. `python -m train.report runs/study` shows it.
"""

from pathlib import Path
from typing import Any

import click

from shards.common import cli
from shards.common.errors import DataError
from train.config import training_options


@click.command(cls=cli.Command, context_settings={"show_default": True})
@click.option(
    "--model", default="resnet18", help="Name of the model to train. A larger one takes longer and more memory."
)
@click.option(
    "--seeds",
    default="0,1,2",
    help="Seeds of weights, order and augmentation. Each trains on both sets, so it adds two runs.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/study/leakage"),
    help="Folder to write. One that holds this experiment is continued.",
)
@training_options
def main(model: str, seeds: str, out: Path, **options: Any) -> int:
    """Measure how much a split by image overestimates accuracy. --data: a set packed with --split-unit image."""
    from dataclasses import replace

    from shards.common.files import write_durably
    from shards.shardset import ShardSet
    from train.config import Config
    from train.record import to_json
    from train.study.cells import Cell, fitting_batch, parse_seeds
    from train.study.folder import StudyFolder
    from train.study.grid import check_settings, study_settings, train_cells
    from train.study.leakage import ARMS, RESULT, arms, measure, sentences, write_arm

    base = Config(model=model, **options)
    numbers = parse_seeds(seeds, "--seeds")
    check_settings([model], base)
    with ShardSet(base.data) as data:
        data.require_labels()
        if data.manifest.split.get("unit") != "image":
            raise DataError(
                f"{base.data}: is split by {data.manifest.split.get('unit')}, and this command needs a split by image; "
                f"pack one with `{cli.typed('preprocess.shard')} --split-unit image`"
            )
        click.echo("warning: training on a split by image, to measure how much it overestimates accuracy", err=True)
        rows = arms(
            data.column("split"),
            data.column("label"),
            data.lesion_names,
            data.column("image_id"),
            data.manifest.classes.names,
        )
        # A folder holds one experiment, so the model is one of its settings.
        settings = study_settings(base, "epochs", data) | {"model": model, "experiment": "leakage"}
        with StudyFolder(out, settings) as folder:
            images = len(rows["apart"])
            batch = fitting_batch(base.batch_size, images)
            steps = base.steps or base.epochs * (images // batch)
            cells = []
            for arm in ARMS:
                write_arm(data, rows[arm], arm, out / "sets" / arm)
                config = replace(base, data=str(out / "sets" / arm), batch_size=batch)
                cells += [Cell(replace(config, seed=seed), images, steps, prefix=f"{arm}_") for seed in numbers]
            cells.sort(key=lambda cell: cell.config.seed)
            code = train_cells(cells, folder, base.device)
            if code == 0:
                result = measure(data, rows, cells, folder)
                write_durably(out / RESULT, to_json(result))
                for line in sentences(result):
                    click.echo(line)
            return code


if __name__ == "__main__":
    cli.run(main)
