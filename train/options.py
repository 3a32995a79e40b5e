"""The options of training that `train.run`, `train.grid` and `train.leakage` share: fields of `train.config.Config`."""

from collections.abc import Callable
from typing import Any

import click

_OPTIONS = (
    click.option("--data", default="data/shards", type=click.Path(), help="Folder of the shard set."),
    click.option("--epochs", default=30, help="Passes over the training images."),
    click.option("--batch-size", default=64, help="Images in a global batch, shared by all processes."),
    click.option("--resolution", default=224, help="Side of the images in px."),
    click.option("--start-resolution", type=int, help="Start at this side and go up in steps of 32 px."),
    click.option("--lr", type=float, show_default="by model", help="Peak learning rate, after the warm-up."),
    click.option(
        "--weight-decay", type=float, show_default="by model", help="Not applied to biases and normalisation."
    ),
    click.option("--loss", default="logit-adjusted", help="logit-adjusted, class-weighted or plain."),
    click.option("--ema", type=float, help="Evaluate and keep an average of the weights with this decay, e.g. 0.999."),
    click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N."),
    click.option("--precision", default="auto", help="auto, fp32, bf16 or fp16."),
    click.option("--compile", default="auto", help="torch.compile: auto, on or off."),
    click.option("--engine", default="auto", help="Loader: auto, native, dali or resident."),
    click.option("--pretrained", is_flag=True, help="Start from ImageNet weights (downloaded once)."),
    click.option("--weights", type=click.Path(), help="Start from the weights in this file (.safetensors or .pt)."),
    click.option("--eval-epochs", default=1, help="Epochs from one evaluation on the validation split to the next."),
    click.option("--checkpoint-s", default=60.0, help="Least seconds between two checkpoints; 0: after every step."),
)


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add them to a click command, which gets them as keyword arguments named like the fields of Config."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
