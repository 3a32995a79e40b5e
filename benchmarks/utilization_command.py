"""The subcommand `utilization` of `benchmarks.run`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.options import (
    advance,
    check_models,
    chosen,
    measured_on,
    publish,
    seconds_option,
    shared,
    training_options,
    training_work,
)

if TYPE_CHECKING:
    from benchmarks.measure import Row
    from benchmarks.timeline import Moment


@click.command()
@shared
@training_options(["resnet18"])
@click.option(
    "--style",
    type=click.Choice(["channels-last", "compiled"]),
    default="channels-last",
    show_default=True,
    help="How this project's network is run; compiling starts cold in every round.",
)
@seconds_option("10", quick="1.5")
def utilization(
    quick: bool,
    out: Path,
    cache: Path,
    source: Path,
    rounds: int | None,
    workers: int,
    only: tuple[str, ...],
    models: tuple[str, ...],
    style: str,
    seconds: float | None,
    resolution: int,
    batch_size: int,
    device: str,
) -> None:
    """What the GPU, or without one the CPU's cores, do while a model trains: summary and timeline of each run.

    The raw readings go to utilization-timeline.csv beside the table, from which `report` draws them.
    Rounds are 6 here unless --rounds says otherwise, 5 with --quick.
    """
    from benchmarks.suite import readings_of
    from benchmarks.timeline import write_timeline
    from benchmarks.training import TrainingJob
    from benchmarks.utilization import measure_utilization, systems
    from benchmarks.utilization_page import utilization_text
    from shards.common.progress import Progress
    from train import device as devices

    chosen_device = devices.choose(device)
    names = chosen({name: name for name in systems(style, chosen_device.type == "cuda")}, only)
    check_models(models, resolution)
    rounds = rounds or (5 if quick else 6)
    work = training_work(source, cache, resolution, batch_size, workers, quick)
    machine = measured_on(work, device)
    name = "utilization-quick" if quick else "utilization"
    rows: list[Row] = []
    moments: list[Moment] = []
    with Progress("utilization", len(models) * len(names) * rounds, "runs") as bar:
        for model in models:
            found, read = measure_utilization(
                TrainingJob(work, model, device),
                names,
                machine,
                rounds=rounds,
                seconds=seconds or (1.5 if quick else 10.0),
                told=advance(bar),
                source=lambda: readings_of(chosen_device),
            )
            rows += found
            moments += read
            write_timeline(out / f"{name}-timeline.csv", moments)
            publish(out, name, rows, utilization_text, show=model == models[-1])
