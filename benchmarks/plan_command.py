"""The subcommand `plan` of `benchmarks.run`."""

from pathlib import Path

import click

from benchmarks.options import command_line

_FILE = click.Path(path_type=Path, dir_okay=False)
_ROUNDS = 7


@click.command()
@click.option("--gpu", default="h100", show_default=True, help="a100 or h100.")
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="Of them in the machine.")
@click.option("--cores", type=click.IntRange(2), default=16, show_default=True, help="Of the machine's CPUs, in all.")
@click.option("--model", default="resnet18", show_default=True, help="One of the eight.")
@click.option("--images", type=click.IntRange(1), help="Of the training split.  [default: HAM10000's 10,015]")
@click.option("--ram-gb", type=click.FloatRange(0, min_open=True), help="The host's RAM: does the set fit?")
@click.option("--costs", "costs_file", type=_FILE, help="Per-image costs.  [default: the committed ones]")
@click.option("--page", type=_FILE, help="Write all models and machines as a page, docs/scaling.md, and stop.")
@click.option("--measure", is_flag=True, help="Measure the per-image costs on this CPU, into --costs, and stop.")
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False), help="Packed set of JPEGs for --measure, 64 or more."
)
@click.option("--resolution", type=click.IntRange(32, 4096), default=224, show_default=True, help="For --measure, px.")
def plan(
    gpu: str,
    gpus: int,
    cores: int,
    model: str,
    images: int | None,
    ram_gb: float | None,
    costs_file: Path | None,
    page: Path | None,
    measure: bool,
    data: Path | None,
    resolution: int,
) -> None:
    """On paper: which engine to use on a machine you do not have, and what will limit it."""
    from benchmarks import plan_costs
    from shards.errors import UsageError

    given = click.get_current_context().get_parameter_source("resolution")
    if not measure and (data is not None or given is not click.core.ParameterSource.DEFAULT):
        raise UsageError("--data and --resolution go with --measure: a plan takes the resolution of its costs")
    costs_file = costs_file or plan_costs.DEFAULT
    if measure:
        if data is None:
            raise UsageError(
                "--measure needs --data, a packed set of JPEGs; pack one with `python -m preprocess.shard`"
            )
        _measure(data, costs_file, resolution)
        return
    costs = plan_costs.read(costs_file)
    if page is not None:
        from benchmarks import plan_page
        from shards.durable import write_durably

        write_durably(page, plan_page.page(costs).encode())
        click.echo(f"wrote {page}", err=True)
        return
    from benchmarks import plan as on_paper
    from benchmarks.plan_words import in_words

    machine = on_paper.Machine(gpu, gpus, cores)
    found = on_paper.plan(machine, model, costs, images or on_paper.HAM10000_IMAGES)
    click.echo(in_words(found, costs, ram_gb))


def _measure(data: Path, out: Path, resolution_px: int) -> None:
    """Measure, write and show the costs."""
    from benchmarks import plan_costs
    from preprocess.progress import Progress

    with Progress("plan", _ROUNDS + 1, "rounds") as bar:
        costs = plan_costs.measure(
            data,
            resolution_px=resolution_px,
            rounds=_ROUNDS,
            command=command_line(),
            told=lambda: bar.advance(1),
        )
    plan_costs.write(out, costs)
    for name, cost in costs.seconds.items():
        click.echo(f"{name:13} {1e6 * cost.median:7.1f} [{1e6 * cost.low:.1f}, {1e6 * cost.high:.1f}] µs")
    click.echo(f"wrote {out}", err=True)
