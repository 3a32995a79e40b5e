"""The options of the commands that use a finished run: `train.predict` and `train.serve`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from train.config import MEMORY_FORMATS


def network_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command `--run`, as `folders`, and the options that say where and how the network computes."""
    for option in (
        click.option(
            "--threads",
            type=click.IntRange(1),
            show_default="the cores",
            help="CPU threads of the network. Fewer leave cores to other programs.",
        ),
        click.option(
            "--memory-format",
            default="auto",
            type=click.Choice(MEMORY_FORMATS),
            help="Layout of images and weights. contiguous is slower; auto takes it where channels-last is unsafe.",
        ),
        click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N. auto takes a GPU if there is one."),
        click.option(
            "--run",
            "folders",
            required=True,
            multiple=True,
            type=click.Path(path_type=Path),
            help="Folder of a finished run, whose weights predict. Given again, the mean of the probabilities counts, "
            "and each run adds its work.",
        ),
    ):
        command = option(command)
    return command
