"""ENTRY: does everything work on this GPU? Ten minutes, and a file of evidence.

    python -m benchmarks.gpu_check --out benchmarks/results/gpu/my-gpu.json

Runs the list of `benchmarks/checks.py` on data that it makes itself: every engine beside native's pixels, alone and
under load, and the training of all eight models while the GPU is sampled. A failure is written down, and the rest goes
on. `benchmarks/evidence.py` makes the tables of docs/gpu.md from the files that are committed.
"""

import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.evidence import CPU_NOTE, FOLDER, FORMAT, Evidence
from benchmarks.options import command_line
from shards.common import cli
from shards.common.errors import DataError

if TYPE_CHECKING:
    import torch

    from benchmarks.checks import Check, Context, Settings


def attempt(check: "Check", context: "Context", evidence: Evidence) -> None:
    """Run one check, and keep what it found; or why it is not run, if the check that it needs did not pass."""
    if check.needs and check.needs not in context.numbers:
        evidence.leave_out(check.name, f"it needs `{check.needs}`, which did not pass")
    elif (numbers := evidence.check(check.name, lambda: check.run(context))) is not None:
        context.numbers[check.name] = numbers


def run_checks(
    device: "torch.device",
    out: Path,
    settings: "Settings",
    sets: Mapping[str, Path] | None = None,
    *,
    command: str = "",
    announce: Callable[[str], None] = lambda line: None,
) -> Evidence:
    """Run every check on `device` and write the evidence to `out`. sets: shard sets by contents; None makes them.

    A file that was made on a CPU says that it is no evidence.
    """
    from benchmarks.checks import Context, checks_of, make_sets
    from benchmarks.machine import environment
    from train import device as devices

    devices.prepare(device)
    about = devices.environment(device)
    head = {
        "format": FORMAT,
        "device": device.type,
        "counts_as_gpu_evidence": device.type == "cuda",
        "note": "" if device.type == "cuda" else CPU_NOTE,
        "name": about["device_name"],
        "environment": asdict(environment(command, devices.gpu_uuid(device))) | {"torch": about},
        "settings": asdict(settings),
        "data": "given" if sets else f"{settings.images} computed images",
    }
    evidence = Evidence(out, head, announce)
    with tempfile.TemporaryDirectory(prefix="dermscale-gpu-check-") as scratch:
        if sets is None:
            announce(f"making {settings.images} images")
            sets = make_sets(Path(scratch), settings.images, settings.packed_px)
        with closing(Context(device, settings, sets, Path(scratch))) as context:
            for check in checks_of(settings, list(sets), device.type):
                attempt(check, context, evidence)
    evidence.write(finished=True)
    return evidence


@click.command(cls=cli.Command)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Evidence file. An older one is replaced.  [default: {FOLDER}/<gpu>.json]",
)
@click.option("--device", "device_name", default="cuda", show_default=True, help="The GPU to check: cuda or cuda:N.")
def main(out: Path | None, device_name: str) -> int:
    """Check everything on a GPU and write the results to a file of evidence."""
    import torch

    from benchmarks.checks import Settings
    from train import device as devices

    if not torch.cuda.is_available():
        raise DataError(
            f"no CUDA device: PyTorch {torch.__version__} sees none here; gpu-check needs a GPU, its driver, and a "
            "PyTorch that is built for CUDA"
        )
    if not device_name.startswith("cuda"):
        raise click.UsageError(f"--device {device_name}: use cuda or cuda:N; this checks GPUs")
    device = devices.choose(device_name)
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    out = out or FOLDER / f"{name}.json"
    command = command_line("benchmarks.gpu_check")
    evidence = run_checks(device, out, Settings(), command=command, announce=click.echo)
    total = len(evidence.checks)
    click.echo(f"{total - len(evidence.failed)} of {total} checks passed; evidence in {out}")
    return 1 if evidence.failed else 0


if __name__ == "__main__":
    cli.run(main)
