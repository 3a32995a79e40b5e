"""ENTRY: does everything work on this GPU, and what slows it down? Ten minutes, and a file of evidence.

    python -m benchmarks.gpu_check --out benchmarks/results/gpu/my-gpu.json

Makes its own data, and then runs the sections below, the most valuable first: checks of the engines
(`benchmarks/checks.py`) and of training (`benchmarks/trainings.py`). Each section has a process and a time limit of its
own. A failure, a crash or a limit is written down, and the rest goes on. The file is written after every check.
`benchmarks/evidence.py` makes the tables of docs/gpu.md from the files that are committed.
"""

import contextlib
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from benchmarks.evidence import CPU_NOTE, FOLDER, FORMAT, Evidence
from benchmarks.options import command_line
from shards.common import cli
from shards.common.errors import DataError

if TYPE_CHECKING:
    import torch

    from benchmarks.checks import Check, Context, Settings

LIMIT_S = 600.0
"""Seconds for everything, with making the data."""


@dataclass(frozen=True)
class Section:
    """Checks that share a process. limit_s: seconds, after which it is ended."""

    name: str
    limit_s: float
    checks: "Sequence[Check]"


def sections_of(settings: "Settings", contents: Sequence[str], device_type: str) -> list[Section]:
    """Every section, in order. contents: keys of `checks.WRITE_MODES`. device_type: `cuda` or `cpu`."""
    from benchmarks import checks, trainings
    from benchmarks.checks import Check
    from train.models import MODELS

    half = "fp16" if device_type == "cuda" else "bf16"
    engines = [check for each in contents for check in checks.engine_checks(each, device_type)]
    causes = [
        Section(
            f"causes, {model}{' compiled' if compiled else ''}",
            75 if compiled else 45,  # compiles three times: with a graph of its own, without, and with it again
            trainings.causes(model, compiled),
        )
        for model, compiled in settings.causes
    ]
    whole = [
        Check("resumed run", trainings.resumed),
        Check(f"run in {half}", partial(trainings.whole_run, name=half, precision=half)),
        Check("run with averaged weights", partial(trainings.whole_run, name="ema", ema=0.9)),
    ]
    cells = [Check(f"{count} cells at a time", partial(trainings.cells_at_once, count)) for count in settings.at_once]
    phases = [
        Check(f"whole run of {settings.whole_run}", partial(trainings.whole_run, name="whole", steps=None, epochs=1)),
        Check("grid of 2 × 2", trainings.grid),
    ]
    return [
        Section("engines", 120, engines),
        *causes,
        Section("models", 125, trainings.speeds(settings.models or tuple(MODELS), settings.styles)),
        Section("losses", 30, [Check("losses of graphed steps", trainings.losses)]),
        Section("whole runs", 45, whole),
        Section("cells", 45, cells),
        Section("phases", 60, phases),
    ]


def attempt(check: "Check", context: "Context") -> dict[str, Any]:
    """Run one check, and return what it found; `not run` if the check that it needs did not pass."""
    from benchmarks.measure import reason

    if check.needs and check.needs not in context.numbers:
        return result(check.name, "not run", error=f"it needs `{check.needs}`, which did not pass")
    began, passed, numbers, error = time.perf_counter(), False, {}, ""
    try:
        passed, numbers = check.run(context)
    except Exception as problem:  # noqa: BLE001 - it is kept, and the other checks go on
        error = reason(problem)[:2000]
    if passed:
        context.numbers[check.name] = numbers
    return result(check.name, "pass" if passed else "fail", numbers, error, time.perf_counter() - began)


def result(
    name: str, result: str, numbers: Mapping[str, Any] | None = None, error: str = "", seconds: float = 0.0
) -> dict[str, Any]:
    """What the evidence keeps of a check."""
    return {"name": name, "result": result, "error": error, "seconds": round(seconds, 3), "numbers": numbers or {}}


Given: TypeAlias = "tuple[torch.device, Settings, Mapping[str, Path], Path]"
"""What a Context is made of: device, settings, sets and scratch."""


def run_section(section: Section, given: Given, evidence: Evidence, limit_s: float) -> None:
    """Run a section in a process of its own, and keep each result when it comes; after `limit_s` end the process."""
    left, end = [check.name for check in section.checks], time.perf_counter() + limit_s
    why = f"not done when the {limit_s:.0f} s of its section were over"
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_serve, args=(theirs, section.name, given))
    process.start()
    theirs.close()
    try:
        while ours.poll(max(end - time.perf_counter(), 0.0)):
            evidence.keep(section.name, ours.recv())
            left.pop(0)
    except EOFError:
        process.join()
        why = f"its process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        with contextlib.suppress(ProcessLookupError):  # it started no other processes, or none that are left
            os.killpg(process.ident, signal.SIGKILL)  # pyright: ignore[reportArgumentType] - it was started
        process.join()
    for number, name in enumerate(left):
        evidence.keep(section.name, result(name, "not run" if number else "fail", error=why))


def _serve(pipe: Connection, name: str, given: Given) -> None:
    """The code of that process."""
    from benchmarks.checks import Context
    from train import device as devices

    os.setsid()  # its own group: what it starts can be ended with it
    context = Context(*given)
    devices.prepare(context.device)
    sections = sections_of(context.settings, list(context.sets), context.device.type)
    with closing(context):
        for check in next(section for section in sections if section.name == name).checks:
            pipe.send(attempt(check, context))


def run_checks(
    device: "torch.device",
    out: Path,
    settings: "Settings",
    sets: Mapping[str, Path] | None = None,
    *,
    command: str = "",
    announce: Callable[[str], None] = lambda line: None,
    limit_s: float = LIMIT_S,
) -> Evidence:
    """Run every section on `device` and write the evidence to `out`. sets: shard sets by contents; None makes them.

    A file that was made on a CPU says that it is no evidence.
    """
    from benchmarks.checks import make_sets
    from benchmarks.machine import environment
    from train import device as devices

    end = time.perf_counter() + limit_s
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
            sets = make_sets(Path(scratch), settings)
        for section in sections_of(settings, list(sets), device.type):
            left_s = max(end - time.perf_counter(), 0.0)
            run_section(section, (device, settings, sets, Path(scratch)), evidence, min(section.limit_s, left_s))
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
