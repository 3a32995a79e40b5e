"""Train and evaluate one model on one fraction of the training lesions with one seed.

python -m train.run --model mixer_b16 --fraction 0.5
torchrun --nproc-per-node 2 -m train.run --model resnet50 --batch-size 256
"""

import signal
import time
from pathlib import Path
from typing import Any

import click

from shards.common import cli
from train.options import training_options

_STARTED = time.perf_counter()


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option(
    "--model", required=True, help="alexnet, resnet18/34/50/101/152, vit_b16, mixer_b16, or any name of timm."
)
@click.option(
    "--out", type=click.Path(), default=None, show_default="runs/MODEL_fFRACTION_sSEED_uSUBSET", help="Run folder."
)
@click.option("--fraction", default=1.0, help="Share of the training lesions, in (0, 1].")
@click.option("--seed", default=0, help="Seed of weights, order and augmentation.")
@click.option("--subset-seed", default=0, help="Which lesions a fraction holds.")
@training_options
@click.option("--sync-batch-norm", is_flag=True, help="Batch norm over all processes of the job.")
@click.option("--resume", is_flag=True, help="Go on from the run folder's checkpoint, if it has one.")
def main(out: str | None, resume: bool, **options: Any) -> int:
    """Train and evaluate one model; write everything about it into a run folder.

    One line an epoch; metrics with 95 % intervals in OUT/result.json. Stopped by SIGTERM it writes a checkpoint.
    """
    from train.config import Config
    from train.study.cells import cell_name

    config = Config(**options)
    return run(config, Path(out or f"runs/{cell_name(config)}"), resume)


def run(config: Any, out: Path, resume: bool) -> int:
    """Train in the world that torchrun describes, or alone; the exit code."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    with cli.importing():
        from train.console import Silent, Terminal
        from train.distributed import world
        from train.loop import Stopped, train_once

    with world(config.device) as here, Terminal() as terminal:
        try:
            train_once(
                config,
                out,
                resume=resume or here.restart > 0,
                world=here,
                stop=lambda: bool(stopping),
                console=terminal if here.first else Silent(),
                started=_STARTED,
            )
        except Stopped as error:
            if here.first:
                terminal.say(str(error))
            return error.exit_code
    return 0


if __name__ == "__main__":
    cli.run(main)
