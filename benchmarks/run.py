"""ENTRY: measure this project beside its peers.

    .venv-peers/bin/python -m benchmarks.run loader --source data/ham10000 --quick

Each benchmark writes one CSV under --out and the Markdown made from it. The peers need `make peers` and its
interpreter; with another one their rows say so.
"""

import click

from benchmarks import (
    grid,
    latency,
    loader,
    pack,
    predict,
    report,
    scale,
    stalls,
    store,
    together,
    training,
    utilization,
)
from shards.common import cli


@click.group(cls=cli.Group)
def main() -> None:
    """Measure this project beside its peers: interleaved rounds, medians with intervals, the machine in every row."""


for _benchmark in (loader, latency, pack, training, together, stalls, utilization, grid, predict, store, scale, report):
    main.add_command(_benchmark.command)

if __name__ == "__main__":
    cli.run(main)
