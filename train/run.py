"""Train and evaluate one model on one fraction of the training lesions with one seed.

python -m train.run --model mixer_b16 --fraction 0.5
torchrun --nproc-per-node 2 -m train.run --model resnet50 --batch-size 256
"""

import signal
import time
from pathlib import Path
from typing import Any

import click

from shards import cli

_STARTED = time.perf_counter()


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option(
    "--model", required=True, help="alexnet, resnet18/34/50/101/152, vit_b16, mixer_b16, or any name of timm."
)
@click.option("--data", default="data/shards", type=click.Path(), help="Folder of the shard set.")
@click.option(
    "--out", type=click.Path(), default=None, show_default="runs/MODEL_fFRACTION_sSEED_uSUBSET", help="Run folder."
)
@click.option("--fraction", default=1.0, help="Share of the training lesions, in (0, 1].")
@click.option("--epochs", default=30, help="Passes over the training images.")
@click.option("--batch-size", default=64, help="Images in a global batch, shared by all processes.")
@click.option("--resolution", default=224, help="Side of the images in px.")
@click.option("--start-resolution", type=int, help="Start at this side and go up in steps of 32 px.")
@click.option("--lr", type=float, show_default="by model", help="Peak learning rate, after the warm-up.")
@click.option("--weight-decay", type=float, show_default="by model", help="Not applied to biases and normalisation.")
@click.option("--loss", default="logit-adjusted", help="logit-adjusted, class-weighted or plain.")
@click.option("--ema", type=float, help="Evaluate and keep an average of the weights with this decay, e.g. 0.999.")
@click.option("--seed", default=0, help="Seed of weights, order and augmentation.")
@click.option("--subset-seed", default=0, help="Which lesions a fraction holds.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--precision", default="auto", help="auto, fp32, bf16 or fp16.")
@click.option("--compile", "compile_", default="auto", help="torch.compile: auto, on or off.")
@click.option("--engine", default="auto", help="Loader: auto, native, dali or resident.")
@click.option("--pretrained", is_flag=True, help="Start from ImageNet weights (downloaded once).")
@click.option("--weights", type=click.Path(), help="Start from the weights in this file (.safetensors or .pt).")
@click.option("--sync-batch-norm", is_flag=True, help="Batch norm over all processes of the job.")
@click.option("--checkpoint-s", default=60.0, help="Least seconds between two checkpoints; 0: after every step.")
@click.option("--resume", is_flag=True, help="Go on from the run folder's checkpoint, if it has one.")
def main(compile_: str, out: str | None, resume: bool, **options: Any) -> int:
    """Train and evaluate one model; write everything about it into a run folder.

    One line an epoch; metrics with 95 % intervals in OUT/result.json. Stopped by SIGTERM it writes a checkpoint.
    """
    from train.config import Config

    config = Config(compile=compile_, **options)
    name = f"{config.model}_f{config.fraction:g}_s{config.seed}_u{config.subset_seed}"
    return run(config, Path(out or f"runs/{name}"), resume)


def run(config: Any, out: Path, resume: bool) -> int:
    """Train in the world that torchrun describes, or alone; the exit code."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
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
