"""ENTRY: the command `dermscale`, with all commands of the project under short names.

    dermscale shard --source data/ham10000 --out data/shards      # the same as python -m preprocess.shard …

`python -m` searches the working folder first, so a file `train.py` there hides the package `train`. This command does
not search it. Only the module of the command that is called is imported.
"""

import os
from importlib import import_module
from typing import NamedTuple

import click
from click.shell_completion import CompletionItem

from shards.common import cli
from shards.common.errors import UsageError


class Command(NamedTuple):
    """Where a command is defined, and what it does in one sentence."""

    module: str
    does: str
    function: str = "main"


COMMANDS = {
    "download": Command("preprocess.download", "Fetch the official HAM10000 files, check and unpack them."),
    "synthetic": Command("preprocess.synthetic", "Write a folder of computed skin lesions, to try things out."),
    "shard": Command("preprocess.shard", "Pack a folder of labelled images into a shard set."),
    "info": Command("shards.__main__", "Print the settings, sizes and counts of a shard set.", "info"),
    "verify": Command("shards.__main__", "Read every byte of a shard set and compare all checksums.", "verify"),
    "show": Command("shards.__main__", "Draw the first training batch of a shard set.", "show"),
    "overlap": Command("shards.__main__", "List the images that are in two shard sets.", "overlap"),
    "push": Command("shards.__main__", "Copy a shard set to a store.", "push"),
    "pull": Command("shards.__main__", "Copy a shard set from a store to a folder.", "pull"),
    "card": Command("shards.__main__", "Describe a shard set for catalogues.", "card"),
    "run": Command("train.run", "Train and evaluate one model."),
    "grid": Command("train.grid", "Train every model on every fraction with every seed: a study."),
    "leakage": Command("train.leakage", "Measure how much a split by image overestimates accuracy."),
    "evaluate": Command("train.evaluate", "Test trained runs on another image set, by subgroup if asked."),
    "report": Command("train.report", "Write the report of a study as one HTML page."),
    "predict": Command("train.predict", "Print or write the probability of each class for each image."),
    "serve": Command("train.serve", "Serve a web page on this machine that predicts images."),
    "bench": Command("benchmarks.run", "Measure this project beside its peers."),
    "gpu-check": Command("benchmarks.gpu_check", "Check everything on a GPU and write the results to a file."),
}
"""The commands, in the order of use."""


class _Group(click.Group):
    """Lists COMMANDS without their modules. click would import all of them for its help and its completion."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = COMMANDS.get(cmd_name)
        if command is None:
            if ctx.resilient_parsing or cmd_name.startswith("-"):  # click completes a line, or names a wrong option
                return None
            raise UsageError(f"'{cmd_name}' is no command: use one of {', '.join(COMMANDS)}")
        return getattr(import_module(command.module), command.function)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.does) for name, command in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [name for name in COMMANDS if name.startswith(incomplete)]
        return [CompletionItem(name, help=COMMANDS[name].does) for name in names] + click.Command.shell_complete(
            self, ctx, incomplete
        )


_TYPED = {command.module: f"dermscale {name}" for name, command in COMMANDS.items()}
"""What a user of this command types instead of `python -m MODULE`, for `cli.typed`."""


@click.group(cls=_Group, context_settings={"obj": _TYPED, "max_content_width": 120})
def group() -> None:
    """Pack skin images, train networks on parts of them, and measure how accurate and how fast that is.

    `dermscale COMMAND --help` explains a command.
    """


def main() -> None:
    """Run the command that is named on the command line."""
    # The Python processes that a command starts do not search the working folder either.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    cli.run(group)
