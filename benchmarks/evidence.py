"""ENTRY: what was measured on which GPU, from the evidence files that are committed.

    python -m benchmarks.evidence --write docs/gpu.md

`make gpu-check` writes such a file. This makes the tables of docs/gpu.md from all of them.
"""

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from shards.common import cli
from shards.common.errors import DataError

FOLDER = Path("benchmarks/results/gpu")
PAGE = Path("docs/gpu.md")
"""The page with the tables."""
FORMAT = 1
"""Version of the evidence files."""
CPU_NOTE = "made on a CPU: shows that the checks run, and nothing about any GPU"
MARK = re.compile(r"<!-- /?gpu evidence -->")
"""The marks before and after the tables in the page."""
NOTHING = (
    "Nothing has run on a GPU yet: no evidence file is committed. The CUDA code is tested as far as a CPU allows. "
    "`make gpu-check` writes the first file, in ten minutes on a GPU.\n"
)


# ------------------------------------------------------------------ writing


@dataclass
class Evidence:
    """What was found, written after every check, so that a crash loses only the checks after it."""

    out: Path
    head: dict[str, Any]
    announce: Callable[[str], None]
    checks: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def keep(self, section: str, check: dict[str, Any]) -> None:
        """Keep what was found by a check: its name, result (`pass`, `fail` or `not run`), error, seconds, numbers."""
        self.checks.append(check | {"section": section})
        name, result, error, seconds = (check[key] for key in ("name", "result", "error", "seconds"))
        self.announce(f"{result:8} {name}  {seconds:.1f} s{f'  ({error})' if error else ''}")
        self.write(finished=False)

    @property
    def failed(self) -> list[str]:
        """Names of the checks that did not pass."""
        return [check["name"] for check in self.checks if check["result"] != "pass"]

    def write(self, finished: bool) -> None:
        """Write the file, whole or not at all."""
        from shards.common.files import write_durably
        from train.record import to_json

        seconds = round(time.perf_counter() - self.started, 1)
        end = {"finished": finished, "passed": finished and not self.failed, "seconds": seconds}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self.out, to_json(_plain(self.head | end | {"checks": self.checks})))


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinity become text. The path of the home folder becomes `~`."""
    if isinstance(value, str):
        return value.replace(f"{Path.home()}/", "~/")
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value


# ------------------------------------------------------------------ reading


def read_evidence(path: Path) -> dict[str, Any]:
    """One evidence file. Raises DataError where it is damaged, of another format, or not of a GPU."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version, counts = found["format"], found["counts_as_gpu_evidence"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not an evidence file ({error})") from None
    if version != FORMAT:
        raise DataError(f"{path}: evidence of format {version}, and this release reads format {FORMAT}")
    if counts is not True or found.get("device") != "cuda":
        raise DataError(f"{path}: was {CPU_NOTE}; remove it from the evidence")
    return found


def tables(folder: Path, page: Path = PAGE) -> str:
    """Markdown made from every file of `folder`, with links for `page`; a sentence if there is no file."""
    from benchmarks.tables import table

    files = sorted(folder.glob("*.json"))
    if not files:
        return NOTHING
    found = [(path, read_evidence(path)) for path in files]
    runs, trainings, speeds = [], "", ""
    for path, one in found:
        machine, checks = one["environment"], one["checks"]
        others = [check["name"] for check in checks if check["result"] != "pass"]
        engine = next((c["numbers"].get("engine") for c in checks if c["name"].startswith("choice of auto")), None)
        runs.append(
            [
                one["name"],
                f"driver {machine['gpu_driver']}; {_versions(machine['versions'])}",
                f"{machine['date'][:10]}, {machine['commit'] or 'commit unknown'}",
                f"{len(checks) - len(others)} of {len(checks)} passed{'' if one['finished'] else ', unfinished'}",
                "; ".join(others) or "none",
                engine or "not found out",
                f"[{path.name}]({Path(os.path.relpath(path, page.parent)).as_posix()})",
            ]
        )
        trained = {c["name"]: c["numbers"] for c in checks if c["name"].startswith("training of ")}
        if any(trained.values()):
            rows = [[name.removeprefix("training of "), *_trained(numbers)] for name, numbers in trained.items()]
            settings = one["settings"]
            trainings += (
                f"\nTraining on {one['name']}, {machine['cores']} cores, batches of {settings['batch_size']} at "
                f"{settings['resolution']} px: img/s with the loader that `auto` takes, and with one cached batch, "
                "which is the most that the model could take; the share of the time that was spent waiting for data, "
                "in steps that end before the next one begins; and the GPU's own counters (GPM), with the loader:\n\n"
            ) + table(["model", "img/s", "cached batch", "data wait", *_COUNTED.values()], rows)
        measured = [check["numbers"] for check in checks if "source" in check["numbers"]]
        if measured:
            speeds += (
                f"\nTraining on {one['name']}, batches of {one['settings']['batch_size']} at "
                f"{one['settings']['resolution']} px from each source: img/s, also as a share of the speed on one "
                "cached batch; the shares of the time in which kernels ran, by PyTorch's profiler, and by the driver; "
                "the CPU time of the main thread, of the time; and how often it gave up its core, for each step:\n\n"
            ) + table(list(_SPEEDS), _speeds(measured))
    header = ["GPU", "software", "date, commit", "checks", "failed or not run", "engine that auto takes", "evidence"]
    return table(header, runs) + trainings + speeds


_COUNTED = {
    "sm_percent": "SMs busy",
    "occupancy_percent": "SM occupancy",
    "tensor_percent": "tensor cores",
    "dram_percent": "memory bandwidth",
    "nvjpg_percent": "JPEG decoders",
}
"""The readings of a GPU (`monitor.METRICS`) that are shown, and their names in the table."""


def _trained(numbers: Mapping[str, Any]) -> list[str]:
    """A line of the table of trainings; `failed` and empty cells for one that failed."""
    from benchmarks.tables import number

    if not numbers:
        return ["failed"] + [""] * (2 + len(_COUNTED))
    cells = [number(numbers["img_per_s"]), number(numbers["cached_img_per_s"])]
    cells.append(_share(numbers["data_wait_share"]))
    read = numbers.get("utilization", {})
    return cells + [_share(read[name]["mean"] / 100) if name in read else "" for name in _COUNTED]


_SPEEDS = (
    "model",
    "style",
    "batches",
    "img/s",
    "of one cached batch",
    "kernels",
    "GPU busy",
    "main thread",
    "switches",
)


def _speeds(measured: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The lines of the table of speeds, from the numbers of `trainings.timed`."""
    from benchmarks.tables import number

    cached = {(one["model"], one["style"]): one["img_per_s"] for one in measured if one["source"] == "cached"}
    return [
        [
            *(one[name] for name in ("model", "style", "source")),
            number(one["img_per_s"]),
            _share(one["img_per_s"] / ceiling if (ceiling := cached.get((one["model"], one["style"]))) else None),
            *(_share(one[name]) for name in ("kernel_share", "gpu_busy", "main_cpu_share")),
            number(one["switches_per_step"]),
        ]
        for one in measured
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _versions(text: str) -> str:
    """The versions, of those in an environment, that decide what runs on the GPU."""
    wanted = ("torch ", "nvidia-dali")
    return ", ".join(part for part in text.split("; ") if part.startswith(wanted))


def renewed(text: str, tables: str, name: str) -> str:
    """The text of a page with other tables between its two marks. Raises DataError if there are not two."""
    marks = list(MARK.finditer(text))
    if len(marks) != 2:
        raise DataError(f"{name}: {len(marks)} marks like <!-- gpu evidence -->, but there must be two")
    return f"{text[: marks[0].end()]}\n{tables}{text[marks[1].start() :]}"


@click.command(cls=cli.Command)
@click.option(
    "--write",
    "page",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Page whose tables are written again, docs/gpu.md for example; the rest of it stays.",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=FOLDER,
    show_default=True,
    help="Folder of the evidence files. It is only read.",
)
def main(page: Path | None, folder: Path) -> None:
    """Show what was measured on which GPU, or write it between the marks of a page."""
    text = tables(folder, page or PAGE)
    if page is None:
        click.echo(text, nl=False)
        return
    from shards.common.files import write_durably

    write_durably(page, renewed(page.read_text(encoding="utf-8"), text, str(page)).encode())
    click.echo(f"{page}: written from {len(list(folder.glob('*.json')))} evidence files")


if __name__ == "__main__":
    cli.run(main)
