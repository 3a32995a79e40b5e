"""Train and evaluate one model, on one fraction of the training lesions, with one seed.

python -m train.run --model mixer_b16 --fraction 0.5
torchrun --nproc-per-node 2 -m train.run --model resnet50 --batch-size 256
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import click

from shards.common import cli
from train.config import Config, training_options

_STARTED = time.perf_counter()


@click.command(cls=cli.Command, context_settings={"show_default": True, "max_content_width": 120})
@partial(training_options, run_only=True)
@click.option(
    "--out",
    type=click.Path(),
    default=None,
    show_default="runs/MODEL_fFRACTION_sSEED_uSUBSET",
    help="Run folder. It must be new, except with --resume.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue from the run folder's checkpoint, if it has one. On a CPU the result is the same to the bit.",
)
def main(out: str | None, resume: bool, **options: Any) -> int:
    """Train and evaluate one model; write everything about it into a run folder.

    It prints one line per epoch and writes metrics with 95 % intervals to OUT/result.json. On Ctrl-C, SIGTERM,
    SIGHUP and SIGUSR1 it writes a checkpoint and ends; a second signal ends it at once.
    """
    from train.study.cells import cell_name

    config = Config(**options)
    return run(config, Path(out or f"runs/{cell_name(config)}"), resume)


def run(config: Config, out: Path, resume: bool) -> int:
    """Train with the processes that torchrun started, or alone; return the exit code."""
    from train.interrupts import asked_to_stop

    signals = asked_to_stop(second_ends=True)
    with cli.importing():
        from shards.common.progress import Progress
        from train.console import Silent
        from train.distributed import world
        from train.loop import Stopped, train_once

    with world(config.device) as here, Progress("start", lines=False, transient=True) as display:
        try:
            train_once(
                config,
                out,
                resume=resume or here.restart > 0,
                world=here,
                stop=lambda: bool(signals),
                console=display if here.first else Silent(),
                started=_STARTED,
            )
        except Stopped as error:
            if here.first:
                display.say(str(error))
            return 128 + signals[0] if signals else error.exit_code
    return 0


if __name__ == "__main__":
    cli.run(main)
