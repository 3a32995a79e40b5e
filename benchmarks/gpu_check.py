"""ENTRY: does everything work on this GPU? Ten minutes, and a file of evidence.

    python -m benchmarks.gpu_check --out benchmarks/results/gpu/my-gpu.json

Checks each engine against native's pixels (alone, and under load on lagging streams), trains each of the eight models
for a few steps, and samples the GPU meanwhile, on data that it makes itself. What fails is written down, and the rest
goes on. `benchmarks/evidence.py` makes the README's table of the files that are committed.
"""

import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.evidence import CPU_NOTE, FOLDER, FORMAT, Evidence
from shards.common import cli
from shards.common.errors import DataError
from shards.common.machine import available_cores

if TYPE_CHECKING:
    import torch

    from benchmarks.suite import Settings


def make_sets(folder: Path, images: int, packed_px: int) -> dict[str, Path]:
    """Paint lesions and pack them as JPEG, raw, and half of each; the sets by what they hold."""
    from preprocess.ham10000 import read_source
    from preprocess.packing import Settings as PackSettings
    from preprocess.packing import pack
    from preprocess.synthetic import write_folder
    from shards.format import EncodeSpec

    workers = available_cores()
    write_folder(folder / "images", images, seed=0, difficulty=0.5, workers=workers)
    sets = {}
    for contents, mode in (("jpg", "jpg"), ("raw", "raw"), ("mixed", "proportion")):
        spec = EncodeSpec(write_mode=mode, max_resolution=packed_px)
        sets[contents] = folder / contents
        pack(read_source(folder / "images"), sets[contents], PackSettings(encode=spec, workers=workers))
    return sets


def run_checks(
    device: "torch.device",
    out: Path,
    settings: "Settings",
    sets: Mapping[str, Path] | None = None,
    *,
    command: str = "",
    told: Callable[[str], None] = lambda line: None,
) -> Evidence:
    """Run every check on `device` and write the evidence to `out`. sets: shard sets by name; None makes them.

    On a CPU the file says that it counts for nothing but the checks themselves.
    """
    from benchmarks.machine import environment
    from benchmarks.suite import run_suite
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
    evidence = Evidence(out, head, told)
    with tempfile.TemporaryDirectory(prefix="dermscale-gpu-check-") as scratch:
        if sets is None:
            told(f"making {settings.images} images")
            sets = make_sets(Path(scratch), settings.images, settings.packed_px)
        run_suite(evidence, device, settings, sets, Path(scratch))
    evidence.write(finished=True)
    return evidence


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help=f"Evidence.  [default: {FOLDER}/<gpu>.json]"
)
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), help="A shard set, instead of made data.")
@click.option("--device", "device_name", default="cuda", show_default=True, help="cuda or cuda:N.")
def main(out: Path | None, data: Path | None, device_name: str) -> int:
    """Check everything on a GPU and write down what was found."""
    import torch

    from benchmarks.suite import Settings
    from shards import ShardSet
    from shards.engines.selfcheck import contents
    from train import device as devices

    if not torch.cuda.is_available():
        raise DataError(
            f"no CUDA device: PyTorch {torch.__version__} sees none here; gpu-check needs a GPU, its driver, and a "
            "PyTorch that is built for CUDA"
        )
    if not device_name.startswith("cuda"):
        raise click.UsageError(f"--device {device_name}: use cuda or cuda:N, this check is of GPUs")
    device = devices.choose(device_name)
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    out = out or FOLDER / f"{name}.json"
    sets = None
    if data is not None:
        with ShardSet(data) as opened:
            sets = {contents(opened, opened.select("train").samples): data}
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = shlex.join(["python", "-m", "benchmarks.gpu_check", *words])
    evidence = run_checks(device, out, Settings(), sets, command=command, told=click.echo)
    total = len(evidence.checks)
    click.echo(f"{total - len(evidence.failed)} of {total} checks passed; evidence in {out}")
    return 1 if evidence.failed else 0


if __name__ == "__main__":
    cli.run(main)
