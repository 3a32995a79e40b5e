"""ENTRY: measure this project beside its peers.

    .venv-peers/bin/python -m benchmarks.run loader --source data/ham10000 --quick

Each benchmark writes one CSV under --out and the Markdown made from it. The peers need `make peers` and its
interpreter; with another one their rows say so.
"""

from dataclasses import replace
from pathlib import Path

import click

from benchmarks.commands import grid, predict, stalls, training
from benchmarks.options import advance, chosen, images, measured_on, publish, seconds_option, shared
from benchmarks.utilization_command import utilization
from shards.common import cli


@click.group()
def main() -> None:
    """Measure this project beside its peers: interleaved rounds, medians with intervals, the machine in every row."""


@main.command()
@shared
@click.option(
    "--packed",
    "packed_px",
    type=click.IntRange(1),
    multiple=True,
    help="Longer side packed.  [default: 341 400, quick 341]",
)
@click.option(
    "--resolution",
    "resolutions_px",
    type=click.IntRange(1),
    multiple=True,
    help="Output side.  [default: 224 128, quick 224]",
)
@seconds_option("2")
def loader(
    quick: bool,
    out: Path,
    cache: Path,
    source: Path,
    rounds: int | None,
    workers: int,
    only: tuple[str, ...],
    packed_px: tuple[int, ...],
    resolutions_px: tuple[int, ...],
    seconds: float | None,
) -> None:
    """Images per second and CPU seconds of loaders at equal work.

    --quick leaves out half-raw sets, engines on one thread, and GPU engines on a CPU, but for what --only names.
    """
    from benchmarks.datasets import sized
    from benchmarks.loader import jobs, loader_text, measure_loaders
    from benchmarks.peers.pytorch import NOT_IN_QUICK, SYSTEMS
    from benchmarks.peers.system import Work
    from shards.common.progress import Progress
    from train import device as devices

    here = {name: system for name, system in SYSTEMS.items() if devices.gpu_count() or not system.on_gpu}
    systems = chosen(here, only, NOT_IN_QUICK if quick else ())
    work = sized(Work(images(source), cache, workers=workers), 624 if quick else 2496, whole_batches=True)
    machine = measured_on(work, "auto")
    rounds, seconds = rounds or (5 if quick else 9), seconds or (0.5 if quick else 2.0)
    packed_px = packed_px or ((341,) if quick else (341, 400))
    todo = jobs(work, packed_px, resolutions_px or ((224,) if quick else (224, 128)))
    rows = []
    with Progress("loader", len(todo) * len(systems) * (2 + rounds), "runs") as bar:
        for job in todo:
            rows += measure_loaders(systems, job, machine, rounds=rounds, seconds=seconds, told=advance(bar))
            publish(out, "loader-quick" if quick else "loader", rows, loader_text, show=job is todo[-1])


@main.command()
@shared
@click.option(
    "--packed", "packed_px", type=click.IntRange(1), multiple=True, help="Longer side packed.  [default: 400]"
)
def pack(
    quick: bool,
    out: Path,
    cache: Path,
    source: Path,
    rounds: int | None,
    workers: int,
    only: tuple[str, ...],
    packed_px: tuple[int, ...],
) -> None:
    """Images per second, bytes and PSNR of writers, by write mode.

    --quick leaves out mixed write modes and the packer without a restart table, but for what --only names.
    """
    from benchmarks.datasets import sized
    from benchmarks.pack import measure_packing, packing_text
    from benchmarks.packers import NOT_IN_QUICK, PACKERS
    from benchmarks.peers.system import Work
    from shards.common.progress import Progress

    systems = chosen(PACKERS, only, NOT_IN_QUICK if quick else ())
    rounds = rounds or (6 if quick else 9)
    work = sized(Work(images(source), cache, workers=workers), 312 if quick else 624)
    machine = measured_on(work, "cpu")
    rows = []
    with Progress("pack", len(packed_px or (400,)) * len(systems) * (2 + rounds), "runs") as bar:
        for px in packed_px or (400,):
            job, seconds, told = replace(work, packed_px=px), 0.5 if quick else 2.0, advance(bar)
            rows += measure_packing(systems, job, machine, rounds=rounds, seconds=seconds, told=told)
    publish(out, "pack-quick" if quick else "pack", rows, packing_text)


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="benchmarks/results",
    show_default=True,
    help="Folder of the CSV files, and where RESULTS.md and report.html go.",
)
def report(out: Path) -> None:
    """RESULTS.md and report.html from the CSV files of the other subcommands."""
    from benchmarks.report import markdown, page, read_results, read_timelines
    from shards.common.files import write_durably

    results = read_results(out)
    write_durably(out / "RESULTS.md", markdown(results).encode())
    write_durably(out / "report.html", page(results, read_timelines(out)).encode())
    click.echo(f"wrote {out / 'RESULTS.md'} and {out / 'report.html'} from {', '.join(results)}")


for _command in (training, stalls, utilization, grid, predict):
    main.add_command(_command)

if __name__ == "__main__":
    cli.run(main)
